"""Money: a ledger that cannot be overdrawn, and the wrapper that asks it before every request.

Amounts are whole nanodollars, so that sums are exact: a dollar per million tokens is 1,000 nanodollars a token.
"""

import asyncio
import threading

from cascadevlm.errors import BudgetExhausted, JudgeError
from cascadevlm.judge import Judge, WrapperJudge
from cascadevlm.types import Question, Verdict

NANODOLLARS = 1_000_000_000


class Ledger:
    """What a run may spend, has spent, and has promised. Safe across tasks and threads.

    Args:
        dollars: the cap; None for no cap.
    """

    def __init__(self, dollars: float | None = None) -> None:
        self.cap = None if dollars is None else round(dollars * NANODOLLARS)
        self._lock = threading.Lock()
        self._spent = 0
        self._reserved = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def spent_dollars(self) -> float:
        return self._spent / NANODOLLARS

    @property
    def reserved_dollars(self) -> float:
        """Promised to requests in flight."""
        return self._reserved / NANODOLLARS

    async def reserve(self, nanodollars: int) -> None:
        """Promise an amount, waiting while only promises to others stand in its way.

        Raises:
            BudgetExhausted: if it would not fit even if all promises came back unspent.
        """
        while (waiter := self._try_to_reserve(nanodollars)) is not None:
            await waiter

    def _try_to_reserve(self, nanodollars: int) -> "asyncio.Future[None] | None":
        with self._lock:
            if self.cap is not None and self._spent + nanodollars > self.cap:
                left, wanted = (amount / NANODOLLARS for amount in (self.cap - self._spent, nanodollars))
                raise BudgetExhausted(f"The budget has ${left:.4f} left and this question may cost ${wanted:.4f}.")
            if self.cap is None or self._spent + self._reserved + nanodollars <= self.cap:
                self._reserved += nanodollars
                return None
            loop = asyncio.get_running_loop()
            self._waiting.append((loop, loop.create_future()))
            return self._waiting[-1][1]

    def settle(self, reserved: int, spent: int) -> None:
        """Turn a promise into what it really cost, and let those who waited for it try again."""
        with self._lock:
            self._reserved -= reserved
            self._spent += spent
            waiting, self._waiting = self._waiting, []
        for loop, waiter in waiting:
            loop.call_soon_threadsafe(_wake, waiter)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Metered(WrapperJudge):
    """Reserves the worst case before every request and settles with the bill after it.

    A request that broke off may have been served and billed all the same; it is counted as the worst case.
    """

    def __init__(self, wrapped: Judge, ledger: Ledger) -> None:
        super().__init__(wrapped)
        self.ledger = ledger

    async def judge(self, question: Question) -> Verdict:
        worst = self.wrapped.worst_case(question)
        await self.ledger.reserve(worst)
        spent = worst
        try:
            verdict = await self.wrapped.judge(question)
            spent = round(verdict.usage.dollars * NANODOLLARS)
            return verdict
        except JudgeError as exc:
            spent = worst if exc.may_be_billed else 0
            raise
        finally:
            self.ledger.settle(worst, spent)
