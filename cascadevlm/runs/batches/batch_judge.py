"""A judge that asks through its provider's batch API. It collects questions, submits them in batches, waits for the results and
reads the answers. The state of the batches is kept on disk. So an interrupted run can continue, and nothing is paid for twice.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, JsonValue

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError, PermanentError, TransientError, Waiting
from cascadevlm.base.files import write_whole
from cascadevlm.base.types import NANODOLLARS, Question, Usage, Verdict
from cascadevlm.judges.base import Quote, WrapperJudge
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import VerdictStore, at_no_cost, key_of, question_payload
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.judges.retry import patient

T = TypeVar("T")

TOLD = "told"
"""Name of the file with one line per question whose cost counts as spent."""

MOST_ATTEMPTS = 3
"""Maximum number of batches for one question. The result in the last of these batches counts, even if it is an error."""

TRANSFER_SECONDS = 1800.0
"""Longest time for one request to a batch API in seconds. A full batch of 256 MB then needs 150 kB per second."""

LONGEST_SLEEP = 1.0
"""Longest time in seconds until a run that waits for a batch notices that it is to stop."""

CLOCK_SKEW = timedelta(minutes=5)
"""Maximum time by which this machine's clock may be ahead of the provider's clock."""


class Chunk(BaseModel):
    """One batch.

    Attributes:
        name: name of its files.
        token: text that is sent with the batch. If the id of the batch is lost, the batch is found by its token.
        batch_id: the provider's id; None before it is known.
        worst_cases: maximum cost of each question in nanodollars, by the key of the question.
        results: results by the key of the question; None before they are known.
    """

    name: str
    token: str = ""
    batch_id: str | None = None
    worst_cases: dict[str, int] = {}
    results: dict[str, JsonValue] | None = None


def told_in(folder: Path) -> set[str]:
    """The keys of the questions in a judge's folder whose cost counts as spent. Only a folder that one run owns contains them."""
    path = folder / TOLD
    return set(path.read_text().split()) if path.exists() else set()


class AtBatchPrice(WrapperJudge):
    """A judge whose quotes have the prices of its provider's batch API, which does not limit the rate of questions."""

    def __init__(self, wrapped: SdkJudge) -> None:
        super().__init__(wrapped)
        self.requests_per_minute = self.tokens_per_minute = None
        self.hosted = wrapped

    def quote(self, question: Question) -> Quote:
        return self.hosted.quote(question, batch=True)


class BatchJudge(AtBatchPrice):
    """Puts questions into batches, and answers the questions whose batches have results. It reserves and books their costs
    itself, because a batch may be paid by another process than the one that reads it.

    Args:
        wrapped: the judge whose provider has the batch API.
        folder: folder for the state of the batches.
        ledger: the budget.
        owns_folder: true if all batches in the folder belong to one run, which pays for all their questions: also for those
            that it no longer asks.

    Attributes:
        closed: true if no more questions are collected.
        concluding: true if answers are returned with their costs. Before that, the costs stay reserved.
        freed: true if reserved money was released since this was last set to false.
    """

    keeps_ledger: ClassVar[bool] = True

    def __init__(self, wrapped: SdkJudge, folder: Path, ledger: Ledger, *, owns_folder: bool = False) -> None:
        super().__init__(wrapped)
        self.folder = folder
        self.ledger = ledger
        self.owns_folder = owns_folder
        self.closed = False
        self.concluding = False
        self.freed = False
        self.chunks: list[Chunk] = []
        self._open: Chunk | None = None
        self._open_bytes = 0
        self._reserved: dict[str, int] = {}
        self._short: dict[str, int] = {}
        self._asked: set[str] = set()
        self._told: set[str] = set()

    async def take_up(self) -> None:
        """Load the batches of an earlier run. Questions that the earlier run did not submit are collected again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        states = [Chunk.model_validate_json(path.read_bytes()) for path in self.folder.glob("*.json")]
        self.chunks = sorted(states, key=lambda chunk: chunk.token)
        for chunk in list(self.chunks):
            if chunk.batch_id is None:
                with self._without_batch_api():
                    chunk.batch_id = await patient()(self._find, chunk)
                if chunk.batch_id is None:
                    self.chunks.remove(chunk)
                    self._forget(chunk)
                else:
                    self._save(chunk)
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        self._told = told_in(self.folder)
        for chunk in self.chunks:
            for key, worst_case in chunk.worst_cases.items():
                if key not in self._told:
                    self._owe(key, worst_case)

    async def judge(self, question: Question) -> Verdict:
        key = key_of(question_payload(self.hosted, question))
        self._asked.add(key)
        asked = [chunk for chunk in self.chunks if key in chunk.worst_cases]
        if asked:
            results = asked[-1].results
            if results is None:
                raise Waiting("The batch has no results yet.")
            try:
                return self._conclude(key, self._read(results.get(key), question))
            except JudgeError as exc:
                if isinstance(exc, FatalError) and self._is_in_vain(asked[-1], question):
                    self._forget(asked[-1])
                    raise
                if self.closed or not exc.retryable or exc.may_be_billed or len(asked) >= MOST_ATTEMPTS:
                    self._give_up(key, asked[-1].worst_cases[key] if exc.may_be_billed else 0)
                    raise PermanentError(str(exc)) from exc
        self._collect(key, question)
        raise Waiting("The question was put into a batch.")

    def _read(self, row: JsonValue, question: Question) -> Verdict:
        if row is None:
            raise TransientError("The batch has no answer to the question.")
        try:
            return self.hosted.read_row(row, question)
        except JudgeError:
            raise
        except Exception as exc:  # the SDK's own objects may raise any error for a bad row
            raise PermanentError(f"The answer in the batch cannot be read: {exc}", may_be_billed=True) from exc

    def _is_in_vain(self, chunk: Chunk, question: Question) -> bool:
        """True if no row of a batch has an answer, each for a reason that would stop a run of direct questions."""
        for row in (chunk.results or {}).values():
            try:
                self._read(row, question)
            except FatalError:
                continue
            except JudgeError:
                pass
            return False
        return True

    def _conclude(self, key: str, verdict: Verdict) -> Verdict:
        bill = round(verdict.usage.dollars * NANODOLLARS)
        if not self.concluding:
            self._owe(key, bill)
            return replace(verdict, usage=Usage())
        if key in self._told:
            return at_no_cost(verdict)
        self._release(key, spent=bill)
        self._tell(key)
        return verdict

    def _tell(self, key: str) -> None:
        """Note that the cost of a question counts as spent now."""
        self._told.add(key)
        if self.owns_folder:
            with (self.folder / TOLD).open("a") as file:
                file.write(f"{key}\n")

    def _give_up(self, key: str, bill: int) -> None:
        """End a question without an answer. If the provider may still charge for it, its worst case counts as spent."""
        if self.concluding or not bill:
            self._release(key, spent=0 if key in self._told else bill)
        if self.concluding and key not in self._told:
            self._tell(key)

    def _collect(self, key: str, question: Question) -> None:
        worst_case = self.hosted.quote(question, batch=True).worst_case
        row = json.dumps(self.hosted.batch_row(key, question)).encode() + b"\n"
        limits = self.hosted.batch_limits
        if len(row) > limits.bytes:
            raise PermanentError(
                f"The question has {len(row)} bytes; a whole batch may have {limits.bytes}.",
                hint="Use fewer or smaller images in the question.",
            )
        if self.closed:
            raise BudgetExhausted(
                "The budget was too small for this question when the batches were filled.", hint="Raise budget.usd."
            )
        for owed, nanodollars in self._short.copy().items():  # questions that were submitted before come first
            self._reserve(owed, nanodollars)
        self._reserve(key, worst_case)
        chunk = self._open
        if chunk is None or self._open_bytes + len(row) > limits.bytes or len(chunk.worst_cases) == limits.requests:
            chunk = self._open = Chunk(name=uuid.uuid4().hex)
            self._open_bytes = 0
            self.chunks.append(chunk)
        with self._rows(chunk).open("ab") as file:
            file.write(row)
        chunk.worst_cases[key] = worst_case
        self._open_bytes += len(row)

    async def submit(self) -> None:
        """Submit all collected questions."""
        self._open = None
        for chunk in self.chunks:
            if chunk.batch_id is None:
                began = (datetime.now(UTC) - CLOCK_SKEW).isoformat(timespec="microseconds")
                chunk.token = f"{began}/{len(chunk.worst_cases)}/{chunk.name}"
                self._save(chunk)
                chunk.batch_id = await self._submit(chunk)
                self._save(chunk)
                self._rows(chunk).unlink()

    async def _submit(self, chunk: Chunk) -> str:
        """Submit a chunk, unless an earlier, interrupted attempt has submitted it."""
        attempted = False

        async def once() -> str:
            nonlocal attempted
            if attempted and (earlier := await self._find(chunk)) is not None:
                return earlier
            attempted = True
            try:
                return await self._call(self.hosted.submit_batch(self._rows(chunk), chunk.token))
            except (PermanentError, FatalError):  # the provider has no such batch
                self._forget(chunk)
                raise

        with self._without_batch_api():
            return await patient()(once)

    @contextmanager
    def _without_batch_api(self) -> Iterator[None]:
        try:
            yield
        except FatalError as exc:
            hint = "If there is no batch API at this address, leave out --batch."
            raise FatalError(f"The batch API of {self.spec!r} cannot be used: {exc}", hint=hint) from exc

    async def _call(self, request: Awaitable[T]) -> T:
        """The result of a request to the batch API.

        Raises:
            TransientError: if the request takes longer than `TRANSFER_SECONDS`, upload and download included.
        """
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                return await self.hosted.call(request)
        except TimeoutError:
            raise TransientError(f"The batch API of {self.spec!r} took longer than {TRANSFER_SECONDS:g} seconds.") from None

    async def _find(self, chunk: Chunk) -> str | None:
        """The provider's id of a chunk; None if the chunk was not submitted."""
        found = await self._call(self.hosted.find_batch(chunk.token))
        return None if any(found == other.batch_id for other in self.chunks) else found

    @property
    def collected(self) -> int:
        """Number of collected questions that are not submitted yet."""
        return sum(len(chunk.worst_cases) for chunk in self.chunks if chunk.batch_id is None)

    @property
    def submitted(self) -> int:
        """Number of submitted questions."""
        return sum(len(chunk.worst_cases) for chunk in self.chunks) - self.collected

    def drop_collected(self) -> None:
        """Forget the collected questions that are not submitted yet."""
        for chunk in [chunk for chunk in self.chunks if chunk.batch_id is None]:
            for key in chunk.worst_cases:
                self._release(key)
            self.chunks.remove(chunk)
            self._forget(chunk)
        self._open = None

    async def wait(self, poll_seconds: float, stopping: Callable[[], bool]) -> None:
        """Wait until all questions of this run have results.

        Args:
            poll_seconds: seconds between two checks whether a batch is done.
            stopping: function that is called every second. After it returns true, nothing is waited for.

        Raises:
            FatalError: if the provider refused a batch as a whole, or does not return its results.
        """
        for chunk in self._awaited():
            while (results := await self._results(chunk)) is None:
                until = time.monotonic() + poll_seconds
                while (left := until - time.monotonic()) > 0:
                    if stopping():
                        return
                    await asyncio.sleep(min(left, LONGEST_SLEEP))
            chunk.results = dict(results)
            self._save(chunk)

    async def _results(self, chunk: Chunk) -> Mapping[str, JsonValue] | None:
        assert chunk.batch_id is not None
        batch_id = chunk.batch_id

        async def once() -> Mapping[str, JsonValue] | None:
            return await self._call(self.hosted.batch_results(batch_id))

        try:
            return await patient()(once)
        except PermanentError as exc:
            self._forget(chunk)
            raise FatalError(str(exc)) from exc
        except FatalError as exc:
            hint = f"Use the key with which it was submitted, or delete {self._state(chunk)} to ask its questions again."
            raise FatalError(f"Batch {batch_id} cannot be fetched: {exc}", hint=hint) from exc

    def _awaited(self) -> list[Chunk]:
        """The chunks without results that contain questions of this run."""
        return [chunk for chunk in self.chunks if chunk.results is None and not self._asked.isdisjoint(chunk.worst_cases)]

    @property
    def in_flight(self) -> int:
        """Number of this run's questions without results."""
        return sum(len(self._asked.intersection(chunk.worst_cases)) for chunk in self._awaited())

    def _reserve(self, key: str, nanodollars: int) -> None:
        """Change the amount that is reserved for a question.

        Raises:
            BudgetExhausted: if the budget is too small for the new amount.
        """
        before = self._reserved.get(key, 0)
        if nanodollars > before:
            self.ledger.reserve_now(nanodollars - before)
        else:
            self.ledger.settle(before - nanodollars, 0, standing=True)
            self.freed |= nanodollars < before
        self._reserved[key] = nanodollars
        self._short.pop(key, None)

    def _owe(self, key: str, nanodollars: int) -> None:
        """Reserve an amount that must be paid. If the budget is too small, remember the amount."""
        try:
            self._reserve(key, nanodollars)
        except BudgetExhausted:
            self._short[key] = nanodollars

    def _release(self, key: str, *, spent: int = 0) -> None:
        reserved = self._reserved.pop(key, 0)
        self.ledger.settle(reserved, spent, standing=True)
        self.freed |= reserved > 0
        self._short.pop(key, None)

    def release_unasked(self) -> None:
        """Release the amounts for questions of an earlier run that this run has not asked, if other runs use the folder, too."""
        if not self.owns_folder:
            for key in {*self._reserved, *self._short} - self._asked:
                self._release(key)

    def release(self) -> None:
        """Release all reserved amounts."""
        for key in list(self._reserved):
            self._release(key)

    def conclude(self) -> None:
        """From now on, return answers with their costs."""
        self.closed = self.concluding = True
        self._asked.clear()
        if self._short:  # costs above the reserved amounts would wait for each other
            self.release()

    def finish(self, store: VerdictStore) -> None:
        """Delete the state of questions that are answered. Answers to other questions are kept, for another run or session."""
        for chunk in self.chunks:
            left = {key for key in chunk.worst_cases if not self._is_finished(key, store)}
            if not left:
                self._forget(chunk)
            elif chunk.results is not None and len(left) < len(chunk.worst_cases):
                chunk.worst_cases = {key: worst for key, worst in chunk.worst_cases.items() if key in left}
                chunk.results = {key: row for key, row in chunk.results.items() if key in left}
                self._save(chunk)
        (self.folder / TOLD).unlink(missing_ok=True)  # these questions are in no file now; if asked again, they cost again

    def _is_finished(self, key: str, store: VerdictStore) -> bool:
        return key in self._told if self.owns_folder else key in self._asked or store.get(key) is not None

    def _forget(self, chunk: Chunk) -> None:
        self._state(chunk).unlink(missing_ok=True)
        self._rows(chunk).unlink(missing_ok=True)

    def _save(self, chunk: Chunk) -> None:
        write_whole(self._state(chunk), chunk.model_dump_json())

    def _state(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.json"

    def _rows(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.jsonl"
