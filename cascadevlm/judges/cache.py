"""The cache of answers: its keys, its stores in memory and on disk, and the wrappers that use a store."""

import asyncio
import hashlib
import json
import os
import sqlite3
import sys
import threading
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import diskcache
import platformdirs
from PIL import Image
from pydantic import JsonValue, TypeAdapter

from cascadevlm.base.errors import BackendError
from cascadevlm.base.portable import Live, Portable
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge
from cascadevlm.judges.prompt import answer_format, options, render

SCHEMA_VERSION = 1

ASKED_ELSEWHERE_SECONDS = 0.05
"""Seconds between two checks whether another process has answered a question."""

if sys.platform != "win32":
    import fcntl

Payload = dict[str, JsonValue]

_LARGEST_ROW = 2**30
"""Size of the largest row of SQLite in bytes. diskcache writes larger values to files."""

_VERDICT = TypeAdapter(Verdict)
_DAMAGE = (KeyError, TypeError, ValueError, OSError, RecursionError, zlib.error, sqlite3.DatabaseError)


def default_cache_folder() -> Path:
    """``$CASCADEVLM_CACHE_DIR``. Default: the user cache directory of the platform."""
    return Path(os.environ.get("CASCADEVLM_CACHE_DIR") or platformdirs.user_cache_dir("cascadevlm"))


def question_payload(judge: Judge, question: Question) -> Payload:
    """Everything that determines the answer to a question, and nothing else."""
    messages: list[JsonValue] = [
        {"role": message.role, "parts": ["<image>" if isinstance(part, Image.Image) else part for part in message.parts]}
        for message in render(question)
    ]
    return {
        "schema": SCHEMA_VERSION,
        "judge": dict(judge.identity()),
        "messages": messages,
        "max_tokens": answer_format(question).max_tokens,
        "image": judge.image_digest(question),
        "options": list(options(question).values()),
        "names": [[label.name, *label.aliases] for label in question.labels],
        "others": question.label_set.digest if question.offer_none and question.label_set else None,
        "exemplars": [exemplar.digest for exemplar in question.exemplars],
        "sample": question.sample,
    }


def key_of(payload: Mapping[str, JsonValue]) -> str:
    """sha256 of the payload's canonical JSON, in hexadecimal."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class VerdictStore(Portable, ABC):
    """Keeps valid verdicts under the keys of their questions."""

    @abstractmethod
    def get(self, key: str) -> Verdict | None:
        """The verdict stored under a key. None if there is no verdict."""

    @asynccontextmanager
    async def asking(self, key: str) -> AsyncGenerator[None, None]:
        """A context for asking a question that is not in the store. All other users of the store wait before they ask the same
        question.
        """
        yield

    @abstractmethod
    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        """Store a verdict.

        Args:
            key: key of the question, see `key_of`.
            payload: payload of the question, see `question_payload`.
            verdict: the verdict.

        Raises:
            ValueError: if the verdict is not valid.
        """


class _JSONRows(diskcache.JSONDisk):  # type: ignore[misc]
    """Reads only JSON that is in the row itself. In contrast, `diskcache.JSONDisk` would unpickle keys and values, and would
    read and delete a file that a row names.
    """

    def get(self, key: object, raw: int) -> object:
        if not raw:
            raise ValueError("a pickled key")
        return super().get(key, raw)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> object:
        if mode != diskcache.core.MODE_RAW or filename is not None:
            raise ValueError("not a row of JSON")
        return super().fetch(mode, filename, value, read)

    def remove(self, file_path: str) -> None:
        pass


class Turns:
    """Decides which process or event loop asks a question, if several share a folder. The one that locks a byte of a file asks.

    The operating system releases the locks of a process that ends. Windows and some network file systems have no such locks.
    There, several processes may ask the same question.
    """

    def __init__(self, path: Path) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self._file)
        self._taken: dict[str, object] = {}

    def take(self, key: str) -> bool:
        """Try to take the turn for a question. Returns True if this caller has the turn now."""
        mine = object()
        if self._taken.setdefault(key, mine) is not mine:
            return False
        if sys.platform != "win32":
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(key))
            except (BlockingIOError, PermissionError):
                del self._taken[key]
                return False
            except (OSError, ValueError):  # no locks on this file system, or no file
                pass
        return True

    def give_back(self, key: str) -> None:
        """Release the turn for a question."""
        if sys.platform != "win32":
            with suppress(OSError, ValueError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(key))
        del self._taken[key]


def _byte(key: str) -> int:
    return int(key[:8], 16)


_turns: "weakref.WeakValueDictionary[Path, Turns]" = weakref.WeakValueDictionary()
_looking_up_turns = threading.Lock()


def turns_in(folder: Path) -> Turns:
    """The turns of a folder. All stores of this process share one object per folder, because the locks do not work between
    threads, and because a process that closes the file loses all its locks."""
    path = folder.resolve() / "asking.lock"
    with _looking_up_turns:
        turns = _turns.get(path) or Turns(path)
        _turns[path] = turns
    return turns


class DiskStore(VerdictStore):
    """A store in a folder, in SQLite through diskcache. Its rows are JSON, and it never evicts a row. Safe across threads and
    processes.

    Args:
        folder: the folder. Default: `default_cache_folder`.

    Warns:
        RuntimeWarning: at the first damaged row.
    """

    live: ClassVar[Live] = (("_opened", lambda: None), ("_turns", lambda: None))

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_cache_folder()
        self._opened: diskcache.Cache | None = None
        self._warned = False
        self._turns: Turns | None = None

    @property
    def _cache(self) -> diskcache.Cache:
        if self._opened is None:
            with self._usable():
                self._opened = diskcache.Cache(
                    str(self.folder), disk=_JSONRows, eviction_policy="none", disk_min_file_size=_LARGEST_ROW
                )
        return self._opened

    @property
    def exists(self) -> bool:
        """True if the folder contains verdicts. The folder is created when the first verdict is looked up."""
        return (self.folder / "cache.db").exists()

    @asynccontextmanager
    async def asking(self, key: str) -> AsyncGenerator[None, None]:
        self._turns = self._turns or turns_in(self.folder)
        while not self._turns.take(key):
            await asyncio.sleep(ASKED_ELSEWHERE_SECONDS)
        try:
            yield
        finally:
            self._turns.give_back(key)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Raise BackendError if the folder cannot be used, or if its tables are not tables of diskcache."""
        try:
            yield
        except (*_DAMAGE, AttributeError, diskcache.Timeout) as exc:
            hint = "Delete the folder, or set CASCADEVLM_CACHE_DIR or cache.folder to another folder."
            raise BackendError(f"The cache folder {str(self.folder)!r} cannot be used: {exc}.", hint=hint) from exc

    def get(self, key: str) -> Verdict | None:
        """The verdict stored under a key. None if there is no verdict, or if it is damaged. The next `put` replaces a damaged
        verdict.
        """
        cache = self._cache
        try:
            entry = cache.get(key, retry=True)
            return None if entry is None else _verdict_in(entry, key)
        except _DAMAGE as exc:
            if not self._warned:
                self._warned = True
                why = str(exc).partition("\n")[0]
                told = f"The cache {str(self.folder)!r} is damaged ({why}). Answers that cannot be read are asked again."
                warnings.warn(f"{told} 'cascadevlm cache verify' lists them.", RuntimeWarning, stacklevel=2)
            return None

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        _require_valid(verdict)
        self._cache.set(key, {"payload": payload, "verdict": verdict.to_dict()}, retry=True)

    def __len__(self) -> int:
        cache = self._cache
        with self._usable():
            return len(cache)

    def size(self) -> int:
        """Size on disk in bytes."""
        cache = self._cache
        with self._usable():
            return int(cache.volume())

    def clear(self) -> int:
        """Delete all verdicts. Returns their number."""
        cache = self._cache
        with self._usable():
            return int(cache.clear())

    def damaged(self) -> Iterator[str]:
        """The keys of damaged rows. Such a row cannot be read, contains no valid verdict, or belongs to another question.

        If the key itself cannot be read, the number of the row is given instead. The last item describes the damage of the
        database.
        """
        disk = self._cache.disk
        with closing(sqlite3.connect(self.folder / "cache.db")) as database:
            database.text_factory = bytes  # damaged texts may not be valid Unicode
            try:
                for number, key, raw, *stored in database.execute("SELECT rowid, key, raw, mode, filename, value FROM Cache"):
                    name = f"row {number}"
                    try:
                        name = str(disk.get(key, raw))
                        _verdict_in(disk.fetch(*stored, read=False), name)
                    except _DAMAGE:
                        yield name
                ((found,),) = database.execute("PRAGMA integrity_check(1)")
                if found != b"ok":
                    yield found.decode()
            except sqlite3.DatabaseError as exc:
                yield str(exc)


def _verdict_in(entry: dict[str, Payload], key: str) -> Verdict:
    """The verdict of a row.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: if the row contains no valid verdict, or belongs to another question.
    """
    verdict = _VERDICT.validate_python(entry["verdict"])
    if not verdict.valid or key_of(entry["payload"]) != key:
        raise ValueError("a verdict of another question")
    return verdict


class MemoryStore(VerdictStore):
    """A store in memory."""

    def __init__(self) -> None:
        self.verdicts: dict[str, Verdict] = {}

    def get(self, key: str) -> Verdict | None:
        return self.verdicts.get(key)

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        _require_valid(verdict)
        self.verdicts[key] = verdict


def _require_valid(verdict: Verdict) -> None:
    if not verdict.valid:
        raise ValueError(f"a verdict {verdict.outcome!r} is not kept")


class SingleFlight(WrapperJudge):
    """Asks identical concurrent questions once. If one caller is cancelled, the other callers still get the answer."""

    def __init__(self, wrapped: Judge) -> None:
        super().__init__(wrapped)
        self._in_flight: dict[str, asyncio.Task[Verdict]] = {}

    async def judge(self, question: Question) -> Verdict:
        payload = question_payload(self.wrapped, question)
        key = key_of(payload)
        if (running := self._in_flight.get(key)) is not None:
            return at_no_cost(await asyncio.shield(running))
        task = asyncio.create_task(self._ask(key, payload, question))
        self._in_flight[key] = task
        task.add_done_callback(partial(self._landed, key))
        return await asyncio.shield(task)

    def _landed(self, key: str, task: asyncio.Task[Verdict]) -> None:
        self._in_flight.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks the exception as seen: all callers may be cancelled

    async def aclose(self) -> None:
        """Cancel the questions in flight, so that their retries do not continue after the run."""
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().aclose()

    async def _ask(self, key: str, payload: Payload, question: Question) -> Verdict:
        return await self.wrapped.judge(question)


class Cached(SingleFlight):
    """Looks for the answer in a store before it asks the judge, and keeps valid answers in the store. An answer from the store
    costs nothing. Its usage contains the saved cost.
    """

    def __init__(self, wrapped: Judge, store: VerdictStore) -> None:
        super().__init__(wrapped)
        self.store = store

    async def _ask(self, key: str, payload: Payload, question: Question) -> Verdict:
        if (stored := self.store.get(key)) is not None:
            return at_no_cost(stored)
        async with self.store.asking(key):
            if (stored := self.store.get(key)) is not None:  # another process has asked the question in the meantime
                return at_no_cost(stored)
            verdict = await super()._ask(key, payload, question)
            if verdict.valid:
                try:
                    self.store.put(key, payload, verdict)
                except (OSError, sqlite3.Error, zlib.error) as exc:  # with a full disk, the answer is still valid and paid
                    warnings.warn(f"An answer could not be stored in the cache: {exc}", RuntimeWarning, stacklevel=2)
            return verdict


def at_no_cost(verdict: Verdict) -> Verdict:
    """A repeated verdict. Its usage has no cost, but contains the saved cost."""
    spent = verdict.usage
    return replace(verdict, usage=Usage(cached=True, saved_dollars=spent.dollars + spent.saved_dollars))
