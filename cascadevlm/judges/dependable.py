"""Dependable judges: a judge inside all wrappers. The runs of one cascade share their judges. So all runs together keep one
rate limit, and ask identical questions once.
"""

import asyncio
from contextlib import AbstractAsyncContextManager

from cascadevlm.base.loop import PerLoop
from cascadevlm.judges.base import Judge
from cascadevlm.judges.budget import Ledger, Metered
from cascadevlm.judges.cache import Cached, SingleFlight, VerdictStore
from cascadevlm.judges.outage import Reachable
from cascadevlm.judges.pacing import Paced
from cascadevlm.judges.retry import Retrying
from cascadevlm.judges.voting import Repairing


def dependable(judge: Judge, store: VerdictStore | None, ledger: Ledger) -> Judge:
    """A judge inside all wrappers: budget, rates, retries, outage, repair questions and single flight.

    A judge that replays is returned unchanged.

    Args:
        judge: the judge of a backend.
        store: the store of answers, so that no question is asked twice. None: answers are not kept.
        ledger: the budget.
    """
    if judge.replays:
        return judge
    metered = judge if judge.keeps_ledger else Metered(judge, ledger)
    patient = Repairing(Reachable(Retrying(Paced(metered))))
    return Cached(patient, store) if store is not None else SingleFlight(patient)


class DependableJudges:
    """The dependable judges of a cascade: one per judge and event loop. Each event loop has its own rate limits."""

    def __init__(self, store: VerdictStore | None, ledger: Ledger) -> None:
        self.store = store
        self.ledger = ledger
        self._shared: PerLoop[dict[int, SharedJudge]] = PerLoop(dict)

    def of(self, judge: Judge) -> "SharedJudge":
        """The dependable judge that all runs in the current event loop share. Enter it before use."""
        of_loop = self._shared.get()
        if id(judge) not in of_loop:
            of_loop[id(judge)] = SharedJudge(dependable(judge, self.store, self.ledger))
        return of_loop[id(judge)]


class SharedJudge(AbstractAsyncContextManager[Judge]):
    """A dependable judge. The first run that enters prepares it, and the last run that leaves closes it."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._users = 0
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Judge:
        async with self._changing:
            if self._users == 0:
                try:
                    await self.judge.prepare()
                except BaseException:
                    await self.judge.aclose()
                    raise
            self._users += 1
        return self.judge

    async def __aexit__(self, *_: object) -> None:
        async with self._changing:
            self._users -= 1
            if self._users == 0:
                await self.judge.aclose()
