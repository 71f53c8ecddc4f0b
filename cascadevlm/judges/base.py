"""Judges look at an image and choose one of the candidates.

A backend subclasses `Judge`. A backend whose model runs in this process subclasses `LocalJudge`. The features that all judges
share, such as cache, retries and repair questions, are wrappers around `Judge.judge`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from pydantic import JsonValue

from cascadevlm.base.errors import FatalError
from cascadevlm.base.portable import Live, Portable
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.answers import after_thoughts, read_answer


@dataclass(frozen=True, kw_only=True)
class Quote:
    """The price of one question, before the question is asked.

    Attributes:
        worst_case: maximum cost of one request, in nanodollars.
        usual_case: the expected cost of one request, in nanodollars; for estimates.
        tokens: maximum number of tokens of one request, input and output together.
    """

    worst_case: int = 0
    usual_case: int = 0
    tokens: int = 0

    def __add__(self, other: "Quote") -> "Quote":
        return Quote(
            worst_case=self.worst_case + other.worst_case,
            usual_case=self.usual_case + other.usual_case,
            tokens=self.tokens + other.tokens,
        )


class Judge(Portable, ABC):
    """Answers questions. The constructor only stores parameters. Models, clients and keys are loaded at first use.

    Attributes:
        spec: the spec string that names this judge, for example ``"hf_chat:aviary"``.
        requires: the distributions that the backend needs in addition to cascadevlm, by their names on PyPI.
        concurrency: the number of questions that the judge can answer at the same time.
        requests_per_minute: maximum number of requests per minute. None: no limit.
        tokens_per_minute: maximum number of tokens per minute, input and output together. None: no limit.
        replays: whether the judge only repeats recorded answers, immediately and without cost. Its answers are not cached, and
            its errors are not retried. A wrapper does not copy this attribute, because a wrapper may ask other judges.
        keeps_ledger: whether the judge reserves and books its costs itself.
    """

    spec: str
    requires: ClassVar[tuple[str, ...]] = ()
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    replays: bool = False
    keeps_ledger: ClassVar[bool] = False

    @property
    def costs_money(self) -> bool:
        """Whether answers cost money.

        Raises:
            BackendError: if the price is unknown.
        """
        return False

    @abstractmethod
    async def judge(self, question: Question) -> Verdict:
        """Answer one question.

        Raises:
            JudgeError: if there is no answer. `cascadevlm.base.errors` defines which subclass applies.
        """

    def identity(self) -> Mapping[str, JsonValue]:
        """Everything except the question that changes an answer: spec, model revision, endpoint, decoding parameters."""
        return {"judge": self.spec}

    def image_digest(self, question: Question) -> str:
        """The digest of the image in the form in which this judge receives it."""
        return question.image_digest

    def quote(self, question: Question) -> Quote:
        """The price of one request for this question. A judge that charges nothing has only zeros in its quote.

        Raises:
            BackendError: if the price is unknown.
            PermanentError: if the price is not known for a question of this length.
        """
        return Quote()

    def check(self) -> str:
        """Find out whether the first use can work. No model is loaded, and nothing is sent.

        Returns:
            A remark for people, for example that the model is downloaded at its first use. "" if there is nothing to say.

        Raises:
            BackendError: if something is missing: a package, a key, a price, or a model on a machine without a connection.
        """
        return ""

    async def prepare(self) -> None:
        """Get ready for a run. Called once, at the beginning of a run.

        Raises:
            BackendError: if the judge cannot work at all, for example without a key or a model.
        """

    async def aclose(self) -> None:
        """Close connections. Called once, at the end of a run."""


_not_sent: "set[asyncio.Task[object] | None]" = set()
"""The tasks that are inside `before_sending`."""


@contextmanager
def before_sending() -> Iterator[None]:
    """A judge enters this context while it waits and has not sent the question yet. A question that is cancelled in this
    context costs nothing.
    """
    task = asyncio.current_task()
    _not_sent.add(task)
    try:
        yield
    finally:
        _not_sent.discard(task)


def is_sent(asking: "asyncio.Task[Verdict]") -> bool:
    """Whether a task may have sent its question."""
    return asking not in _not_sent


_Waiting = list[tuple[Question, "asyncio.Future[Verdict]"]]


class LocalJudge(Judge):
    """A judge whose model runs in this process. Concurrent questions form batches. One batch is answered at a time.

    Attributes:
        batch_size: maximum number of questions in one batch.
    """

    live: ClassVar[Live] = (("_waiting", dict), ("_workers", set))

    def __init__(self, *, batch_size: int = 8) -> None:
        self.batch_size = batch_size
        self.concurrency = 2 * batch_size
        self._waiting: dict[asyncio.AbstractEventLoop, _Waiting] = {}
        self._workers: set[asyncio.Task[None]] = set()

    @abstractmethod
    def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
        """Answer up to ``batch_size`` questions: one verdict per question, in the same order.

        A verdict must not depend on the other questions of the batch.
        """

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """The thread of the model. All event loops share it, so that only one batch runs at a time."""
        return ThreadPoolExecutor(1, "judging")

    async def judge(self, question: Question) -> Verdict:
        loop = asyncio.get_running_loop()
        if loop not in self._waiting:  # a loop cannot wake the questions of another loop
            self._waiting[loop] = []
            worker = loop.create_task(self._work(loop))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        answer: asyncio.Future[Verdict] = loop.create_future()
        self._waiting[loop].append((question, answer))
        return await answer

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, wanted = self._waiting[loop], _Waiting()
        try:
            while waiting:
                await asyncio.sleep(0.005)  # lets concurrent callers join the batch
                batch = waiting[: self.batch_size]
                del waiting[: self.batch_size]
                if wanted := [(question, answer) for question, answer in batch if not answer.done()]:
                    await self._answer(wanted)
        except Exception as exc:  # a subclass may override private methods; no question may wait forever
            for _, answer in [*wanted, *waiting]:
                if not answer.done():
                    answer.set_exception(exc)
        finally:
            del self._waiting[loop]

    async def _answer(self, batch: _Waiting) -> None:
        questions = [question for question, _ in batch]
        try:
            verdicts = await asyncio.get_running_loop().run_in_executor(self._thread, self.judge_batch, questions)
            if len(verdicts) != len(questions):
                message = f"judge_batch of {self.spec!r} returned {len(verdicts)} verdicts for {len(questions)} questions."
                raise FatalError(message, hint="Return one verdict per question.")
        except Exception as exc:
            if len(batch) > 1 and not isinstance(exc, FatalError):  # one bad question must not fail the others
                for single in batch:
                    await self._answer([single])
                return
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(exc)
            return
        for (_, answer), verdict in zip(batch, verdicts, strict=True):
            if not answer.done():
                answer.set_result(verdict)


def verdict_from_text(
    text: str, question: Question, *, judge: str, usage: Usage, probabilities: Mapping[str, float] | None = None
) -> Verdict:
    """The verdict for a judge's text. Its outcome is ``"answered"``, ``"none"`` or ``"unparsed"``."""
    answer = read_answer(text, question)
    if answer is None:
        if not text.strip():
            error = "The answer is empty."
        elif after_thoughts(text, question) is None:
            error = "The answer ends within the model's thoughts."
        else:
            error = f"The answer names none of the {len(question.candidates)} candidates, or more than one."
        return Verdict(outcome="unparsed", text=text, error=error, judge=judge, usage=usage)
    return Verdict(
        outcome="none" if answer.label is None else "answered",
        label=answer.label.name if answer.label else None,
        probabilities=probabilities,
        rationale=answer.rationale,
        text=text,
        judge=judge,
        usage=usage,
    )


class WrapperJudge(Judge):
    """A judge that calls another judge for everything. Subclasses override `judge`."""

    def __init__(self, wrapped: Judge) -> None:
        self.wrapped = wrapped
        self.spec = wrapped.spec
        self.concurrency = wrapped.concurrency
        self.requests_per_minute = wrapped.requests_per_minute
        self.tokens_per_minute = wrapped.tokens_per_minute

    @property
    def costs_money(self) -> bool:
        return self.wrapped.costs_money

    async def judge(self, question: Question) -> Verdict:
        return await self.wrapped.judge(question)

    def identity(self) -> Mapping[str, JsonValue]:
        return self.wrapped.identity()

    def image_digest(self, question: Question) -> str:
        return self.wrapped.image_digest(question)

    def quote(self, question: Question) -> Quote:
        return self.wrapped.quote(question)

    async def prepare(self) -> None:
        await self.wrapped.prepare()

    async def aclose(self) -> None:
        await self.wrapped.aclose()
