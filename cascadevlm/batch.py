"""Providers' batch APIs: escalated questions go out in bulk, at a discount, and come back within a day.

The cascade is run until it has no question left that has not been answered: every run collects what is new, submits it and waits
for the answers. What was submitted is kept on disk, so that a run cut off anywhere goes on where it was and nothing is paid
for twice.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, JsonValue

from cascadevlm.budget import NANODOLLARS, Ledger
from cascadevlm.cache import Payload, VerdictStore, at_no_cost, default_cache_folder, key_of, question_payload
from cascadevlm.cascade import Cascade
from cascadevlm.engine import OnFailure
from cascadevlm.errors import BackendError, FatalError, JudgeError, PermanentError
from cascadevlm.hosted import HostedJudge
from cascadevlm.images import ImageSource
from cascadevlm.judge import WrapperJudge
from cascadevlm.retry import patient
from cascadevlm.types import Prediction, Question, Usage, Verdict

MOST_ATTEMPTS = 3
"""In how many batches a question may be before what came of it counts."""

POLL_SECONDS = 30.0


class Waiting(JudgeError):
    """The question is in a batch that has not come back."""


class Chunk(BaseModel):
    """One batch: its questions by key, with what each may cost in nanodollars, and, once known, its id and what came back.

    A chunk that was ``attempted`` and has no id may have been submitted all the same: ``token`` is how the provider's list is
    searched for it.
    """

    name: str
    token: str = ""
    attempted: bool = False
    batch_id: str | None = None
    worst_cases: dict[str, int] = {}
    results: dict[str, JsonValue] | None = None


class BatchJudge(WrapperJudge):
    """Puts questions into batches, and answers those that have come back.

    Args:
        wrapped: the judge whose provider has the batch API.
        folder: where the state of its batches is kept.
        ledger: what may be spent.
    """

    def __init__(self, wrapped: HostedJudge, folder: Path, ledger: Ledger) -> None:
        super().__init__(wrapped)
        self.hosted = wrapped
        self.folder = folder / key_of(dict(wrapped.identity()))[:16]
        self.ledger = ledger
        self.concluding = False
        self.chunks: list[Chunk] = []
        self._open = Chunk(name=uuid.uuid4().hex)
        self._open_bytes = 0
        self._reserved: dict[str, int] = {}
        self._concluded: set[str] = set()
        self._lock = asyncio.Lock()

    def worst_case(self, question: Question) -> int:
        return 0  # reserved when a question is put into a batch

    async def prepare(self) -> None:
        """Take up the batches of an earlier run."""
        await super().prepare()
        if self.chunks:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            chunk = Chunk.model_validate_json(path.read_bytes())
            self.chunks.append(chunk)
            for key, worst_case in chunk.worst_cases.items():
                self._reserve(key, worst_case)

    async def judge(self, question: Question) -> Verdict:
        key = key_of(question_payload(self.hosted, question))
        asked = [chunk for chunk in self.chunks if key in chunk.worst_cases]
        if key in self._open.worst_cases or (asked and asked[-1].results is None):
            raise Waiting("The batch has not come back.")
        try:
            if asked and asked[-1].results is not None and key in asked[-1].results:
                return self._conclude(key, asked[-1].results[key], question)
            lost: JudgeError = PermanentError("The batch came back without an answer to the question.")
        except JudgeError as exc:
            if not exc.retryable:
                raise
            lost = exc
        if len(asked) >= MOST_ATTEMPTS:
            raise PermanentError(str(lost)) from lost
        async with self._lock:
            if key not in self._open.worst_cases:
                await self._add(key, question)
        raise Waiting("The question was put into a batch.")

    def _conclude(self, key: str, row: JsonValue, question: Question) -> Verdict:
        """The verdict; its reservation shrinks to the bill, which counts as spent when the last run takes it."""
        verdict = self.hosted.read(self.hosted.of_batch_row(row, question), question, batch=True)
        bill = round(verdict.usage.dollars * NANODOLLARS)
        self._reserve(key, 0 if self.concluding else bill)
        if not self.concluding:
            return replace(verdict, usage=Usage())
        if key in self._concluded:
            return at_no_cost(verdict)
        self._concluded.add(key)
        return verdict

    def _reserve(self, key: str, nanodollars: int) -> None:
        """Change what is reserved for a question.

        Raises:
            BudgetExhausted: if there is not so much.
        """
        before = self._reserved.get(key, 0)
        if nanodollars > before:
            self.ledger.reserve_now(nanodollars - before)
        else:
            self.ledger.settle(before - nanodollars, 0)
        self._reserved[key] = nanodollars

    async def _add(self, key: str, question: Question) -> None:
        worst_case = self.hosted.batch_worst_case(question)
        row = json.dumps(self.hosted.batch_row(key, question)).encode() + b"\n"
        limits = self.hosted.batch_limits
        if len(row) > limits.bytes:
            raise PermanentError(f"The question takes {len(row)} bytes, more than a whole batch may.")
        self._reserve(key, worst_case)
        if self._open_bytes + len(row) > limits.bytes or len(self._open.worst_cases) == limits.requests:
            await self.submit()
        with self._rows(self._open).open("ab") as file:
            file.write(row)
        self._open.worst_cases[key] = worst_case
        self._open_bytes += len(row)

    async def submit(self) -> None:
        """Submit what has been collected, if anything."""
        chunk, self._open, self._open_bytes = self._open, Chunk(name=uuid.uuid4().hex), 0
        if chunk.worst_cases:
            began = datetime.now(UTC).isoformat(timespec="seconds")
            chunk.token = f"{began}/{len(chunk.worst_cases)}/{chunk.name}"
            self.chunks.append(chunk)
            await self._submit(chunk)

    async def _submit(self, chunk: Chunk) -> None:
        """Submit a chunk, unless an attempt that broke off had submitted it already."""

        async def once() -> str:
            if chunk.attempted and (earlier := await self.hosted.call(self.hosted.find_batch(chunk.token))):
                return earlier
            chunk.attempted = True
            self._save(chunk)
            return await self.hosted.call(self.hosted.submit_batch(self._rows(chunk), chunk.token))

        chunk.batch_id = await patient()(once)
        self._save(chunk)

    async def wait(self, poll_seconds: float) -> None:
        """Wait until all that was submitted has come back.

        Raises:
            FatalError: if the provider refused a batch as a whole.
        """
        for chunk in self.chunks:
            if chunk.batch_id is None:
                await self._submit(chunk)
            while chunk.results is None:
                results: Mapping[str, JsonValue] | None
                try:
                    results = await patient()(self._results, chunk)
                except PermanentError as exc:
                    self._forget(chunk)
                    raise FatalError(str(exc)) from exc
                if results is None:
                    await asyncio.sleep(poll_seconds)
                else:
                    chunk.results = dict(results)
                    self._save(chunk)

    async def _results(self, chunk: Chunk) -> Mapping[str, JsonValue] | None:
        assert chunk.batch_id is not None
        return await self.hosted.call(self.hosted.batch_results(chunk.batch_id))

    @property
    def in_flight(self) -> int:
        """How many questions have not come back."""
        return sum(len(chunk.worst_cases) for chunk in self.chunks if chunk.results is None)

    def finish(self) -> None:
        """Forget the batches: their answers have been taken."""
        for chunk in self.chunks:
            self._forget(chunk)
        self.chunks = []

    def _forget(self, chunk: Chunk) -> None:
        self._state(chunk).unlink(missing_ok=True)
        self._rows(chunk).unlink(missing_ok=True)

    def _save(self, chunk: Chunk) -> None:
        part = self._state(chunk).with_suffix(".part")
        part.write_text(chunk.model_dump_json(), encoding="utf-8")
        part.replace(self._state(chunk))

    def _state(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.json"

    def _rows(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.jsonl"


class _ReadOnly(VerdictStore):
    """Keeps nothing: what a batch cost is told by the run that ends with it."""

    def __init__(self, store: VerdictStore) -> None:
        self.store = store

    def get(self, key: str) -> Verdict | None:
        return self.store.get(key)

    def put(self, payload: Payload, verdict: Verdict) -> None:
        pass


async def stream_in_batches(
    cascade: Cascade,
    images: Sequence[ImageSource],
    *,
    folder: Path | None = None,
    poll_seconds: float = POLL_SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Prediction]:
    """As `Cascade.astream`, with the questions to hosted judges in their providers' batches: half the price, up to a day.

    Args:
        folder: where the state of batches is kept; beside the user's cache, unless given. The same again resumes.
        poll_seconds: how often to ask whether a batch is done.
        progress: told what goes on, a line at a time.

    Raises:
        BackendError: if no judge of the cascade has a batch API.
    """
    folder = folder or default_cache_folder() / "batches"
    stages = [
        replace(stage, judge=BatchJudge(stage.judge, folder, cascade.ledger)) if isinstance(stage.judge, HostedJudge) else stage
        for stage in cascade.stages
    ]
    judges = [stage.judge for stage in stages if isinstance(stage.judge, BatchJudge)]
    if not judges:
        raise BackendError("No judge of this cascade has a batch API.", hint="openai: and anthropic: have.")

    def run(store: VerdictStore | None, on_failure: OnFailure) -> AsyncIterator[Prediction]:
        return Cascade(
            cascade.scorer,
            stages,
            labels=cascade.labels,
            on_failure=on_failure,
            store=store,
            ledger=cascade.ledger,
            batch_size=cascade.batch_size,
        ).astream(images)

    async with AsyncExitStack() as stack:
        for judge in judges:  # connected from beginning to end, not only while a run lasts
            stack.push_async_callback(judge.aclose)
            await judge.prepare()
        while True:
            escalated = [prediction.escalated async for prediction in run(cascade.store and _ReadOnly(cascade.store), "scorer")]
            for judge in judges:
                await judge.submit()
            waiting = sum(judge.in_flight for judge in judges)
            if not waiting:
                break
            progress(f"{sum(escalated)} of {len(escalated)} images escalated; {waiting} questions wait for their batches.")
            for judge in judges:
                await judge.wait(poll_seconds)
        for judge in judges:
            judge.concluding = True
        async for prediction in run(cascade.store, cascade.on_failure):
            yield prediction
        for judge in judges:
            judge.finish()
