"""A judge that does not answer any more stops the run: failures by the thousand would look like a run that is done."""

import asyncio

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge

FEWEST, MOST = 8, 20
"""How many failures in a row are an outage: as many as are in flight, within these bounds. With fewer, a few images that a judge
cannot cope with would stop every run over them."""


PATIENCE = 0.5
"""Seconds for which a question that failed is held where no other is under way: the next ones may just be on their way."""


class Reachable(WrapperJudge):
    """Fails for good when question after question failed, in spite of retries, for a reason that should have passed.

    A question that failed is held until another one is answered, or for a while none is under way that could be: in an outage, no
    image gets a failure for a verdict that only had to wait. Where fewer than `FEWEST` are in flight at once, those before the
    last of so many do: they cannot be told from images that a judge cannot cope with.
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
                    f"The judge {self.spec!r} does not answer: the last {self._in_a_row} questions failed in spite of retries, "
                    f"as in: {exc}",
                    hint="What was answered is kept: once the judge is back, the same command goes on.",
                ) from exc
            raise
        else:
            self._heard(verdict)
            return verdict
        finally:
            self._under_way -= 1
            self._watch()

    def _heard(self, word: Verdict | JudgeError) -> None:
        """The judge is there, whatever it said; a question that was not asked for want of money says nothing."""
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
        """Have patience, from now on, if no question is under way but those that are held."""
        if self._patience is not None:
            self._patience.cancel()
        if 0 < len(self._held) == self._under_way:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE, self._let_go)

    def _let_go(self) -> None:
        held, self._held = self._held, set()
        for waiting in held:
            if not waiting.done():
                waiting.set_result(None)
