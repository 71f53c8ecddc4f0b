"""Providers' batch APIs: escalated questions go out in bulk, at a discount, and come back within a day.

Stage by stage, the cascade is run until no question is left that has not been answered: every run collects what is new, which is
then submitted and waited for (`cascadevlm.runs.batches.batch_judge`). One run at a time may use a folder.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from cascadevlm.base.errors import BackendError, InputError, JudgeError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import Prediction, Verdict
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.stage import Stage
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, Payload, VerdictStore, default_cache_folder, key_of
from cascadevlm.judges.hosted.base import HostedJudge
from cascadevlm.runs.batches.batch_judge import BatchJudge

POLL_SECONDS = 30.0


class _Collecting(VerdictStore):
    """Keeps nothing that came from a batch: what that cost is told by the run that ends with it."""

    def __init__(self, store: VerdictStore) -> None:
        self.store = store

    def get(self, key: str) -> Verdict | None:
        return self.store.get(key)

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        if verdict.usage.requests:
            self.store.put(key, payload, verdict)


def _in_batches(stages: Sequence[Stage], folder: Path, ledger: Ledger) -> list[Stage]:
    """The stages, with hosted judges in batches; each has a folder, by what it is and how many like it went before."""
    replaced: list[Stage] = []
    names: list[str] = []
    for stage in stages:
        if isinstance(stage.judge, HostedJudge):
            name = key_of(dict(stage.judge.identity()))[:16]
            names.append(name)
            judge = BatchJudge(stage.judge, folder / f"{name}-{names.count(name)}", ledger)
            stage = replace(stage, judge=judge)
        replaced.append(stage)
    return replaced


async def stream_in_batches(
    cascade: Cascade,
    images: Sequence[ImageSource],
    *,
    folder: Path | None = None,
    poll_seconds: float = POLL_SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Prediction]:
    """As `Cascade.astream`, with the questions to hosted judges in their providers' batches: half the price, up to a day.

    Other judges are asked once; by the time predictions are made, their answers come from the store.

    Args:
        folder: where the state of batches is kept; beside the user's cache, unless given. The same again resumes.
        poll_seconds: how often to ask whether a batch is done.
        progress: told what goes on, a line at a time.

    Raises:
        InputError: if what is asked depends on answers about other images, which come a day later.
        BackendError: if no judge of the cascade has a batch API.
        FatalError: if a provider refuses a batch.
    """
    for name, wanted in (("routing", cascade.routing), ("follow_shares", cascade.follow_shares)):
        if wanted:
            raise InputError(
                f"In batches, there is no {name}: judges are asked one after another, about all images.", hint="Leave it out."
            )
    stages = _in_batches(cascade.stages, folder or default_cache_folder() / "batches", cascade.ledger)
    judges = [stage.judge for stage in stages if isinstance(stage.judge, BatchJudge)]
    if not judges:
        raise BackendError("No judge of this cascade has a batch API.", hint="openai: and anthropic: have.")
    store = MemoryStore() if cascade.store is None else cascade.store

    async def collect(stages: Sequence[Stage], judge: BatchJudge) -> None:
        """Until all questions to the judge, the last stage's, have come back and no more fit into the budget."""
        while True:
            escalated = skipped = 0
            judge.freed = False
            collecting = cascade.altered(
                stages=stages, store=_Collecting(store), on_failure="scorer", calibration=None, follow_shares=False
            )
            async for prediction in collecting.astream(images):
                escalated += prediction.escalated
                skipped += any(verdict.outcome == "skipped" for verdict in prediction.verdicts)
            judge.release_unasked()
            await judge.submit()
            if judge.in_flight:
                progress(f"{escalated} of {len(images)} images escalated; {judge.in_flight} questions wait for their batches.")
                await judge.wait(poll_seconds)
            elif not (skipped and judge.freed):
                return

    async with AsyncExitStack() as stack:
        for judge in judges:  # connected from beginning to end, not only while a run lasts
            stack.push_async_callback(judge.aclose)
            stack.callback(judge.release)
            await judge.prepare()
            await judge.take_up()
        for depth, stage in enumerate(stages, start=1):
            if isinstance(stage.judge, BatchJudge):
                await collect(stages[:depth], stage.judge)
                stage.judge.closed = True
        for judge in judges:
            judge.conclude()
        try:
            async for prediction in cascade.altered(stages=stages, store=store).astream(images):
                yield prediction
        except JudgeError:  # the run has ended in a failure, which the next is not to find again
            for judge in judges:
                judge.finish(store)
            raise
        for judge in judges:
            judge.finish(store)
