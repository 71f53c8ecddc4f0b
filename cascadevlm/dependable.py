"""Judges made dependable, for as long as a cascade lives: what runs at the same time or one after another ask of the same judge
keeps to one rate, and is asked once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cascadevlm.budget import Ledger, Metered
from cascadevlm.cache import Cached, SingleFlight, VerdictStore
from cascadevlm.judge import Judge, Repairing
from cascadevlm.outage import Reachable
from cascadevlm.pacing import Paced
from cascadevlm.retry import Retrying


def dependable(judge: Judge, store: VerdictStore | None, ledger: Ledger) -> Judge:
    """A judge that keeps to the budget and its rates, retries, stops in an outage, repairs, asks identical concurrent questions
    once and, with a store, no question twice."""
    patient = Repairing(Reachable(Retrying(Paced(Metered(judge, ledger)))))
    return Cached(patient, store) if store is not None else SingleFlight(patient)


class DependableJudges:
    """Every judge, made dependable once for all runs in an event loop.

    Event loops share none: what waits in one could not be woken from another. A rate then holds in each.
    """

    def __init__(self, store: VerdictStore | None, ledger: Ledger) -> None:
        self.store = store
        self.ledger = ledger
        self._shared: dict[asyncio.AbstractEventLoop, dict[int, _Shared]] = {}

    @asynccontextmanager
    async def ready(self, judge: Judge) -> AsyncIterator[Judge]:
        """The judge, dependable and prepared; let go of when the last that uses it has ended."""
        for loop in list(self._shared):
            if loop.is_closed():
                self._shared.pop(loop, None)
        of_loop = self._shared.setdefault(asyncio.get_running_loop(), {})
        shared = of_loop.setdefault(id(judge), _Shared(dependable(judge, self.store, self.ledger)))
        async with shared.changing:
            if shared.users == 0:
                try:
                    await shared.judge.prepare()
                except BaseException:
                    await shared.judge.aclose()
                    raise
            shared.users += 1
        try:
            yield shared.judge
        finally:
            async with shared.changing:
                shared.users -= 1
                if shared.users == 0:
                    await shared.judge.aclose()


class _Shared:
    """A dependable judge, and how many use it."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.users = 0
        self.changing = asyncio.Lock()
