"""Judges made dependable, for as long as a cascade lives: what runs at the same time or one after another ask of the same judge
keeps to one rate, and is asked once."""

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
    """A judge that keeps to the budget and its rates, retries, stops in an outage, repairs, asks identical concurrent questions
    once and, with a store, no question twice. One that replays is left as it is."""
    if judge.replays:
        return judge
    patient = Repairing(Reachable(Retrying(Paced(Metered(judge, ledger)))))
    return Cached(patient, store) if store is not None else SingleFlight(patient)


class DependableJudges:
    """Every judge, made dependable once for all runs in an event loop. Event loops share none: a rate then holds in each."""

    def __init__(self, store: VerdictStore | None, ledger: Ledger) -> None:
        self.store = store
        self.ledger = ledger
        self._shared: PerLoop[dict[int, SharedJudge]] = PerLoop(dict)

    def of(self, judge: Judge) -> "SharedJudge":
        """The judge, to be entered: dependable, and shared by all runs of the event loop that is running."""
        of_loop = self._shared.get()
        if id(judge) not in of_loop:
            of_loop[id(judge)] = SharedJudge(dependable(judge, self.store, self.ledger))
        return of_loop[id(judge)]


class SharedJudge(AbstractAsyncContextManager[Judge]):
    """A dependable judge, made ready by the first that enters it and let go of by the last that leaves."""

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
