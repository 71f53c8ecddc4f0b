"""Answers that were paid for are kept: a store on disk, its keys, and the wrappers that use it."""

import asyncio
import hashlib
import json
import os
import sqlite3
import sys
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import diskcache
import platformdirs
from PIL import Image
from pydantic import JsonValue, TypeAdapter

from cascadevlm.errors import BackendError
from cascadevlm.judge import Judge, WrapperJudge
from cascadevlm.prompt import answer_format, options, render
from cascadevlm.types import Question, Usage, Verdict

SCHEMA_VERSION = 1

ASKED_ELSEWHERE_SECONDS = 0.05
"""How often is looked whether a question that another process asks is answered."""

if sys.platform != "win32":
    import fcntl

Payload = dict[str, JsonValue]

_VERDICT = TypeAdapter(Verdict)
_DAMAGE = (KeyError, TypeError, ValueError, OSError, zlib.error)


def default_cache_folder() -> Path:
    """The platform's user cache directory, or ``$CASCADEVLM_CACHE_DIR``."""
    return Path(os.environ.get("CASCADEVLM_CACHE_DIR") or platformdirs.user_cache_dir("cascadevlm"))


def question_payload(judge: Judge, question: Question) -> Payload:
    """All that decides the answer to a question and nothing else."""
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
    """sha256 of the canonical JSON, in hexadecimal."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class VerdictStore(ABC):
    """Keeps valid verdicts by the key of their question."""

    @abstractmethod
    def get(self, key: str) -> Verdict | None:
        """The verdict stored under a key, if any."""

    @asynccontextmanager
    async def asking(self, key: str) -> AsyncGenerator[None, None]:
        """Around a question whose answer is not here: meanwhile, nobody else who shares the store asks it."""
        yield

    @abstractmethod
    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        """Store a verdict under its payload's key, see `key_of`.

        Raises:
            ValueError: if it is not valid.
        """


class Turns:
    """Who asks which question, of the processes and event loops that share a folder: the locked bytes of a file. The operating
    system frees those of a process that ends. Without such locks (on Windows, on some network file systems) all may ask at once.
    """

    def __init__(self, path: Path) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT)
            weakref.finalize(self, os.close, self._file)
        self._taken: dict[str, object] = {}

    def take(self, key: str) -> bool:
        """Whether the question is ours to ask."""
        mine = object()
        if self._taken.setdefault(key, mine) is not mine:
            return False
        if sys.platform != "win32":
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(key))
            except (BlockingIOError, PermissionError):
                del self._taken[key]
                return False
            except (OSError, ValueError):  # no such locks here, or no such file
                pass
        return True

    def give_back(self, key: str) -> None:
        """Let others ask."""
        if sys.platform != "win32":
            with suppress(OSError, ValueError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(key))
        del self._taken[key]


def _byte(key: str) -> int:
    return int(key[:8], 16)


class DiskStore(VerdictStore):
    """A store in a folder: SQLite through diskcache, JSON only, nothing ever evicted. Safe across threads and processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_cache_folder()
        self._opened: diskcache.Cache | None = None
        self._turns: Turns | None = None

    @property
    def _cache(self) -> diskcache.Cache:
        if self._opened is None:
            try:
                self._opened = diskcache.Cache(str(self.folder), disk=diskcache.JSONDisk, eviction_policy="none")
            except (OSError, sqlite3.Error, diskcache.Timeout) as exc:
                hint = "Set CASCADEVLM_CACHE_DIR, or cache.folder, to one that can."
                raise BackendError(f"The cache folder {str(self.folder)!r} cannot be used: {exc}.", hint=hint) from exc
        return self._opened

    @asynccontextmanager
    async def asking(self, key: str) -> AsyncGenerator[None, None]:
        self._turns = self._turns or Turns(self.folder / "asking.lock")
        while not self._turns.take(key):
            await asyncio.sleep(ASKED_ELSEWHERE_SECONDS)
        try:
            yield
        finally:
            self._turns.give_back(key)

    def get(self, key: str) -> Verdict | None:
        try:
            return _VERDICT.validate_python(self._cache.get(key, retry=True)["verdict"])
        except _DAMAGE:  # a missing entry is a KeyError; a damaged one is asked again and overwritten
            return None

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        _require_valid(verdict)
        self._cache.set(key, {"payload": payload, "verdict": verdict.to_dict()}, retry=True)

    def __len__(self) -> int:
        return len(self._cache)

    def size(self) -> int:
        """Bytes on disk."""
        return int(self._cache.volume())

    def clear(self) -> int:
        """Forget everything; returns how many verdicts that were."""
        return int(self._cache.clear())

    def damaged(self) -> Iterator[str]:
        """The keys whose entry cannot be read, is no valid verdict, or belongs to another question."""
        for key in self._cache.iterkeys():
            try:
                entry = self._cache[key]
                sound = key_of(entry["payload"]) == key and _VERDICT.validate_python(entry["verdict"]).valid
            except _DAMAGE:
                sound = False
            if not sound:
                yield str(key)


class MemoryStore(VerdictStore):
    """A store that ends with the process."""

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
    """Asks identical concurrent questions once. Who gives up waiting does not lose the answer for the others."""

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
            task.exception()  # marks it as seen: whoever asked may have given up

    async def aclose(self) -> None:
        """Give up what nobody waits for any more: it would be asked again and again after the run."""
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().aclose()

    async def _ask(self, key: str, payload: Payload, question: Question) -> Verdict:
        return await self.wrapped.judge(question)


class Cached(SingleFlight):
    """Looks into a store before asking and keeps valid answers there. What comes from it cost nothing and says what it saved."""

    def __init__(self, wrapped: Judge, store: VerdictStore) -> None:
        super().__init__(wrapped)
        self.store = store

    async def _ask(self, key: str, payload: Payload, question: Question) -> Verdict:
        if (stored := self.store.get(key)) is not None:
            return at_no_cost(stored)
        async with self.store.asking(key):
            if (stored := self.store.get(key)) is not None:  # somebody else was asking it
                return at_no_cost(stored)
            verdict = await super()._ask(key, payload, question)
            if verdict.valid:
                try:
                    self.store.put(key, payload, verdict)
                except (OSError, sqlite3.Error) as exc:  # a full disk: the answer is paid for and counts all the same
                    warnings.warn(f"An answer could not be kept in the cache: {exc}", RuntimeWarning, stacklevel=2)
            return verdict


def at_no_cost(verdict: Verdict) -> Verdict:
    """A verdict given again: it costs nothing and says what it saved."""
    spent = verdict.usage
    return replace(verdict, usage=Usage(cached=True, saved_dollars=spent.dollars + spent.saved_dollars))
