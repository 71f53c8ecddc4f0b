"""Money: a ledger that cannot be overdrawn, and the wrapper that asks it before every request.

Amounts are whole nanodollars, so that sums are exact: a dollar per million tokens is 1,000 nanodollars a token.
"""

import asyncio
import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, NonNegativeInt

from cascadevlm.base.errors import BudgetExhausted, DataError, JudgeError
from cascadevlm.base.files import write_whole, writing_to
from cascadevlm.base.portable import Live, Portable
from cascadevlm.base.types import NANODOLLARS, Question, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge, is_sent

LAST_WORD = 0.5
"""Seconds that a request has to end once its question is given up: after a wrong key, all others in flight fail too, unbilled."""


class Ledger(Portable):
    """What a run may spend, has spent, and has promised. Safe across tasks and threads.

    A deep copy is the ledger itself, so that copies of a cascade spend the same money. A pickled ledger cannot be shared: what is
    read from it may spend what was left when it was pickled.

    Args:
        dollars: the cap; None for no cap.
    """

    live: ClassVar[Live] = (("_lock", threading.Lock), ("_reserved", int), ("_standing", int), ("_waiting", list))

    def __init__(self, dollars: float | None = None) -> None:
        self.cap = None if dollars is None else round(dollars * NANODOLLARS)
        self._lock = threading.Lock()
        self._spent = 0
        self._reserved = 0
        self._standing = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @property
    def cap_dollars(self) -> float | None:
        return None if self.cap is None else self.cap / NANODOLLARS

    @property
    def spent_dollars(self) -> float:
        return self._spent / NANODOLLARS

    @property
    def reserved_dollars(self) -> float:
        """Promised: to requests in flight, and standing."""
        return self._reserved / NANODOLLARS

    async def reserve(self, nanodollars: int) -> None:
        """Promise an amount, waiting while only promises to requests in flight stand in its way.

        Raises:
            BudgetExhausted: if it would not fit even if all those came back unspent.
        """
        while (waiter := self._try_to_reserve(nanodollars, asyncio.get_running_loop())) is not None:
            await waiter

    def reserve_now(self, nanodollars: int) -> None:
        """Promise an amount that stands until somebody else is done, so that nobody waits for it: to be settled as ``standing``.

        Raises:
            BudgetExhausted: if it does not fit beside what is promised already.
        """
        self._try_to_reserve(nanodollars, None)

    def _try_to_reserve(self, nanodollars: int, loop: asyncio.AbstractEventLoop | None) -> "asyncio.Future[None] | None":
        """Promise an amount, or give a future of the loop that is done when money has come back."""
        with self._lock:
            if nanodollars == 0 or self.cap is None or self._spent + self._reserved + nanodollars <= self.cap:
                self._change(reserved=nanodollars)
                self._standing += nanodollars if loop is None else 0
                return None
            if loop is None or self._spent + self._standing + nanodollars > self.cap:
                left = self.cap - self._spent - (self._reserved if loop is None else self._standing)
                raise BudgetExhausted(
                    f"The budget has ${left / NANODOLLARS:.4f} left and this question may cost ${nanodollars / NANODOLLARS:.4f}."
                )
            self._waiting.append((loop, loop.create_future()))
            return self._waiting[-1][1]

    def settle(self, reserved: int, spent: int, *, standing: bool = False) -> None:
        """Turn a promise into what it really cost, and let those who waited for it try again."""
        with self._lock:
            self._change(reserved=-reserved, spent=spent)
            self._standing -= reserved if standing else 0
            waiting, self._waiting = self._waiting, []
        for loop, waiter in waiting:
            with suppress(RuntimeError):  # who waited gave up, and its loop is closed
                loop.call_soon_threadsafe(_wake, waiter)

    def _change(self, *, reserved: int, spent: int = 0) -> None:
        """All that ever changes a ledger, in nanodollars; called with the lock held."""
        self._reserved += reserved
        self._spent += spent


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Change(BaseModel, strict=True):
    """A line of a `DurableLedger`, in nanodollars."""

    reserved: int
    spent: NonNegativeInt


class DurableLedger(Ledger):
    """A ledger that writes down every promise and payment, and goes on from what is written.

    A promise that a killed process did not settle counts as spent: the question may have been answered and billed.

    Args:
        dollars: the cap over all sessions; None for no cap.
        path: of its file.

    Raises:
        DataError: if a line of the file is damaged.
        RunError: if it cannot be written, now or later.
    """

    def __init__(self, dollars: float | None, path: Path) -> None:
        super().__init__(dollars)
        self.path = path
        self._spent = _sum(path) if path.exists() else 0
        with writing_to(path.parent):
            write_whole(path, line_of_ledger(spent=self._spent))
            self._file = path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Make sure that what was written outlasts the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _change(self, *, reserved: int, spent: int = 0) -> None:
        super()._change(reserved=reserved, spent=spent)
        if reserved or spent:
            with writing_to(self.path.parent):
                self._file.write(line_of_ledger(reserved=reserved, spent=spent))
                self._file.flush()


def line_of_ledger(*, reserved: int = 0, spent: int) -> str:
    """A line of the file of a `DurableLedger`, in nanodollars, with its end."""
    return json.dumps({"reserved": reserved, "spent": spent}) + "\n"


def _sum(path: Path) -> int:
    """What a ledger's file says is spent or promised."""
    spent = reserved = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):  # what is not ended did not happen
                break
            try:
                change = _Change.model_validate_json(line)
                spent, reserved = spent + change.spent, reserved + change.reserved
                if reserved < 0:
                    raise ValueError("more is settled than was promised")
            except ValueError as exc:
                hint = "Write into it what the provider billed, in nanodollars, as the other lines do, or take it out."
                raise DataError(f"{str(path)!r}, line {number}, is damaged: what was spent is not known.", hint=hint) from exc
    return spent + reserved


class Metered(WrapperJudge):
    """Reserves the worst case before every request and settles with the bill after it.

    A request that broke off may have been served and billed all the same; it is counted as the worst case. A question that is
    given up before its request was sent costs nothing.
    """

    def __init__(self, wrapped: Judge, ledger: Ledger) -> None:
        super().__init__(wrapped)
        self.ledger = ledger

    async def judge(self, question: Question) -> Verdict:
        worst = self.wrapped.quote(question).worst_case
        await self.ledger.reserve(worst)
        asking = asyncio.create_task(self.wrapped.judge(question))
        sent = True
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            sent = is_sent(asking)
            if sent:
                await asyncio.wait({asking}, timeout=LAST_WORD)
            asking.cancel()
            await asyncio.wait({asking})
            raise
        finally:
            asking.cancel()  # where the wait for its end was cancelled too
            self.ledger.settle(worst, _bill(asking, worst) if sent else 0)


def _bill(asking: "asyncio.Task[Verdict]", worst: int) -> int:
    """What a request cost, in nanodollars: the worst case where nobody knows."""
    if not asking.done() or asking.cancelled():
        return worst
    exc = asking.exception()
    if exc is not None:
        return 0 if isinstance(exc, JudgeError) and not exc.may_be_billed else worst
    dollars = asking.result().usage.dollars
    return round(dollars * NANODOLLARS) if 0 <= dollars < math.inf else worst
