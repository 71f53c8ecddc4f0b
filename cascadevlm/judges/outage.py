"""An outage of a judge stops the run, because a run with thousands of failures would look complete."""

import asyncio

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge

FEWEST, MOST = 8, 20
"""Minimum and maximum number of consecutive failures that count as an outage. Between them, the number of questions in flight
is used. With a lower number, a few difficult images could stop a run.
"""

PATIENCE = 0.5
"""Seconds that a failed question waits if no other question is in flight. The next questions may arrive within this time."""


class Reachable(WrapperJudge):
    """Raises FatalError after a series of consecutive failures with temporary causes. Each of these questions failed in spite
    of retries.

    A failed question waits until another question is answered, or until no other question has been in flight for `PATIENCE`. So
    an outage does not turn images into failures that could be answered later. If fewer than `FEWEST` questions are in flight,
    the first failures of the series count as failures of their images, because these images may be their cause.
    """

    def __init__(self, wrapped: Judge) -> None:
        super().__init__(wrapped)
        self.most = min(max(self.concurrency, FEWEST), MOST)
        self._in_a_row = 0
        self._under_way = 0
        self._held: set[asyncio.Future[None]] = set()
        self._patience: asyncio.TimerHandle | None = None

    async def judge(self, question: Question) -> Verdict:
        self._under_way += 1
        self._watch()
        try:
            verdict = await self.wrapped.judge(question)
        except JudgeError as exc:
            if not exc.retryable:
                self._heard(exc)
                raise
            self._in_a_row += 1
            await self._hold()
            if self._in_a_row >= self.most:
                raise FatalError(
                    f"The judge {self.spec!r} does not answer. The last {self._in_a_row} questions failed in spite of retries. "
                    f"The last error: {exc}",
                    hint="The answers so far are kept. Run the same command again when the judge is back.",
                ) from exc
            raise
        else:
            self._heard(verdict)
            return verdict
        finally:
            self._under_way -= 1
            self._watch()

    def _heard(self, word: Verdict | JudgeError) -> None:
        """Note that the judge responded. A question that was not sent because of the budget proves nothing."""
        if not isinstance(word, BudgetExhausted):
            self._in_a_row = 0
            self._let_go()

    async def _hold(self) -> None:
        if self._in_a_row >= self.most:
            self._let_go()
            return
        waiting = asyncio.get_running_loop().create_future()
        self._held.add(waiting)
        self._watch()
        try:
            await waiting
        finally:
            self._held.discard(waiting)

    def _watch(self) -> None:
        """Start the timer if all questions in flight are waiting failures."""
        if self._patience is not None:
            self._patience.cancel()
        if 0 < len(self._held) == self._under_way:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE, self._let_go)

    def _let_go(self) -> None:
        held, self._held = self._held, set()
        for waiting in held:
            if not waiting.done():
                waiting.set_result(None)
