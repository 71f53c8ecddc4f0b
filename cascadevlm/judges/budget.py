"""Money: a ledger with a spending limit, and a wrapper that reserves money in the ledger before every request.

Amounts are whole numbers of nanodollars, so that sums are exact. One dollar per million tokens is 1,000 nanodollars per token.
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
"""Seconds that a sent request may still take after its question was cancelled. After a wrong key, for example, the other requests
in flight fail as well, and this time shows that they are not billed."""


class Ledger(Portable):
    """The spending limit of a run, the money spent, and the money reserved for requests in flight. Safe across tasks and
    threads.

    ``copy.deepcopy`` returns the ledger itself, so that copies of a cascade share one limit. A pickled ledger is a separate
    ledger. Its limit is the amount that was left at the time of pickling.

    Args:
        dollars: the spending limit in US dollars. None: no limit.
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
        """US dollars that are reserved for requests in flight and for batches."""
        return self._reserved / NANODOLLARS

    async def reserve(self, nanodollars: int) -> None:
        """Reserve an amount. If it does not fit because of amounts reserved for requests in flight, wait until these requests
        end.

        Raises:
            BudgetExhausted: if the amount would not fit even if all requests in flight cost nothing.
        """
        while (waiter := self._try_to_reserve(nanodollars, asyncio.get_running_loop())) is not None:
            await waiter

    def reserve_now(self, nanodollars: int) -> None:
        """Reserve an amount for a batch, without waiting. Settle it with ``standing=True``.

        Requests do not wait for the end of such a reservation, because a batch may take a day.

        Raises:
            BudgetExhausted: if the amount does not fit now.
        """
        self._try_to_reserve(nanodollars, None)

    def _try_to_reserve(self, nanodollars: int, loop: asyncio.AbstractEventLoop | None) -> "asyncio.Future[None] | None":
        """Try to reserve an amount. Returns None on success. If not, returns a future that is done when money is released.

        Args:
            loop: the event loop of a request. None: a standing reservation.
        """
        with self._lock:
            if nanodollars == 0 or self.cap is None or self._spent + self._reserved + nanodollars <= self.cap:
                self._change(reserved=nanodollars, standing=loop is None)
                return None
            if loop is None or self._spent + self._standing + nanodollars > self.cap:
                left = self.cap - self._spent - (self._reserved if loop is None else self._standing)
                raise BudgetExhausted(
                    f"The budget has ${left / NANODOLLARS:.4f} left and this question may cost ${nanodollars / NANODOLLARS:.4f}.",
                    hint="Raise budget.usd, or lower max_tokens.",
                )
            self._waiting.append((loop, loop.create_future()))
            return self._waiting[-1][1]

    def settle(self, reserved: int, spent: int, *, standing: bool = False) -> None:
        """Replace a reservation by the real cost, and wake all tasks that wait for money."""
        with self._lock:
            self._change(reserved=-reserved, spent=spent, standing=standing)
            waiting, self._waiting = self._waiting, []
        for loop, waiter in waiting:
            with suppress(RuntimeError):  # the loop of a cancelled question may be closed
                loop.call_soon_threadsafe(_wake, waiter)

    def _change(self, *, reserved: int, spent: int = 0, standing: bool = False) -> None:
        """Change the amounts of the ledger, in nanodollars. All changes are made here. The caller must hold the lock."""
        self._reserved += reserved
        self._standing += reserved if standing else 0
        self._spent += spent


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Change(BaseModel, strict=True):
    """One line of the file of a `DurableLedger`, in nanodollars."""

    reserved: int
    spent: NonNegativeInt


class DurableLedger(Ledger):
    """A ledger that writes every reservation and payment to a file, and continues from an existing file.

    If a process is killed, its open reservations count as spent, because the requests may have been answered and billed. The
    reservations of a batch are not in the file, because the files of the batch contain them.

    Args:
        dollars: the spending limit of all sessions together, in US dollars. None: no limit.
        path: path of the file.

    Raises:
        DataError: if a line of the file is damaged.
        RunError: if the file cannot be written. Later calls raise this error, too.
    """

    def __init__(self, dollars: float | None, path: Path) -> None:
        super().__init__(dollars)
        self.path = path
        self._spent = total_in(path)
        with writing_to(path.parent):
            write_whole(path, line_of_ledger(spent=self._spent))
            self._file = path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Flush the file to the disk, so that a crash of the machine loses nothing."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _change(self, *, reserved: int, spent: int = 0, standing: bool = False) -> None:
        super()._change(reserved=reserved, spent=spent, standing=standing)
        written = 0 if standing else reserved
        if written or spent:
            with writing_to(self.path.parent):
                self._file.write(line_of_ledger(reserved=written, spent=spent))
                self._file.flush()


def line_of_ledger(*, reserved: int = 0, spent: int) -> str:
    """One line of the file of a `DurableLedger`, in nanodollars, with its line break."""
    return json.dumps({"reserved": reserved, "spent": spent}) + "\n"


def total_in(path: Path) -> int:
    """Sum of the spent and the reserved amounts in the file of a `DurableLedger`, in nanodollars; 0 if there is no file.

    Raises:
        DataError: if a line is damaged.
    """
    if not path.exists():
        return 0
    spent = reserved = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):  # a line without a line break was not written completely
                break
            try:
                change = _Change.model_validate_json(line)
                spent, reserved = spent + change.spent, reserved + change.reserved
                if reserved < 0:
                    raise ValueError("the settled amount is larger than the reserved amount")
            except ValueError as exc:
                hint = "Remove the line, or write the billed amount into it (in nanodollars, in the form of the other lines)."
                raise DataError(f"{str(path)!r}, line {number}, is damaged: the spent amount is not known.", hint=hint) from exc
    return spent + reserved


class Metered(WrapperJudge):
    """Reserves the worst case before every request, and replaces it by the bill after the request.

    An interrupted request costs the worst case, because it may have been answered and billed. A question that is cancelled
    before its request is sent costs nothing.
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
            asking.cancel()  # the wait for the end of the request may also have been cancelled
            self.ledger.settle(worst, _bill(asking, worst) if sent else 0)


def _bill(asking: "asyncio.Task[Verdict]", worst: int) -> int:
    """Cost of a request in nanodollars. The worst case, if the cost is not known."""
    if not asking.done() or asking.cancelled():
        return worst
    exc = asking.exception()
    if exc is not None:
        return 0 if isinstance(exc, JudgeError) and not exc.may_be_billed else worst
    dollars = asking.result().usage.dollars
    return round(dollars * NANODOLLARS) if 0 <= dollars < math.inf else worst
