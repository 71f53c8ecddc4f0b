"""Batch APIs of providers: escalated questions are submitted together, at a discount, and are answered within a day.

The cascade is run repeatedly, stage by stage, until all questions have answers. Each run collects the new questions. They are
then submitted, and the command waits for the results (`cascadevlm.runs.batches.batch_judge`). Only one run at a time may use a
folder.
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
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.runs.batches.batch_judge import BatchJudge

POLL_SECONDS = 30.0


class _Collecting(VerdictStore):
    """A store that does not keep answers of batches, because the last run must report their cost."""

    def __init__(self, store: VerdictStore) -> None:
        self.store = store

    def get(self, key: str) -> Verdict | None:
        return self.store.get(key)

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        if verdict.usage.requests:
            self.store.put(key, payload, verdict)


def _in_batches(stages: Sequence[Stage], folder: Path, ledger: Ledger) -> list[Stage]:
    """The stages. Their hosted judges ask in batches. Each of these judges has a folder, named by its identity and a number."""
    replaced: list[Stage] = []
    names: list[str] = []
    for stage in stages:
        if isinstance(stage.judge, SdkJudge):
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
    """The same as `Cascade.astream`, but hosted judges are asked through the batch APIs of their providers. This costs half the
    price, and can take a day.

    Other judges are asked once. When predictions are made, the answers of these judges come from the store.

    Args:
        cascade: the cascade.
        images: the images.
        folder: folder for the state of the batches. With the same folder, an interrupted call continues. Default: a folder next
            to the user's cache.
        poll_seconds: seconds between two checks whether a batch is done.
        progress: function that is called with a line of text for each step.

    Raises:
        InputError: if questions depend on answers about other images, because these answers may take a day.
        BackendError: if no judge of the cascade has a batch API.
        FatalError: if a provider refuses a batch.
    """
    _require_independent_images(cascade)
    stages = _in_batches(cascade.stages, folder or default_cache_folder() / "batches", cascade.ledger)
    judges = [stage.judge for stage in stages if isinstance(stage.judge, BatchJudge)]
    if not judges:
        raise BackendError("No judge of this cascade has a batch API.", hint="Use a judge of openai: or anthropic:.")
    store = MemoryStore() if cascade.store is None else cascade.store
    collecting = cascade.altered(store=_Collecting(store), on_failure="scorer", calibration=None, follow_shares=False)
    async with AsyncExitStack() as stack:
        for judge in judges:  # stay connected during all runs
            stack.push_async_callback(judge.aclose)
            stack.callback(judge.release)
            await judge.prepare()
            await judge.take_up()
        for depth, stage in enumerate(stages, start=1):
            if isinstance(stage.judge, BatchJudge):
                await _collect(collecting.altered(stages=stages[:depth]), stage.judge, images, poll_seconds, progress)
                stage.judge.closed = True
        for judge in judges:
            judge.conclude()
        try:
            async for prediction in cascade.altered(stages=stages, store=store).astream(images):
                yield prediction
        except JudgeError:  # the run has ended in a failure, which the next run must not find again
            for judge in judges:
                judge.finish(store)
            raise
        for judge in judges:
            judge.finish(store)


def _require_independent_images(cascade: Cascade) -> None:
    """Raise InputError if questions depend on answers about other images."""
    dependent = {"routing": cascade.routing, "follow_shares": cascade.follow_shares, "learn": cascade.learns_from is not None}
    for name, wanted in dependent.items():
        if wanted:
            raise InputError(
                f"Batch APIs do not support {name}: judges are asked one after another, each about all images.",
                hint=f"Remove {name}.",
            )


async def _collect(
    cascade: Cascade, judge: BatchJudge, images: Sequence[ImageSource], poll_seconds: float, progress: Callable[[str], None]
) -> None:
    """Run the cascade until all questions to the judge that the budget allows are answered.

    Args:
        cascade: the cascade. The stage of the judge is its last stage.
        judge: the judge, which collects the questions.
        images: images of the run.
        poll_seconds: seconds between two checks whether a batch is done.
        progress: function that is called with a line of text for each batch.
    """
    while True:
        escalated = skipped = 0
        judge.freed = False
        async for prediction in cascade.astream(images):
            escalated += prediction.escalated
            skipped += any(verdict.outcome == "skipped" for verdict in prediction.verdicts)
        judge.release_unasked()
        await judge.submit()
        if judge.in_flight:
            progress(f"{escalated} of {len(images)} images escalated; {judge.in_flight} questions wait for their batches.")
            await judge.wait(poll_seconds)
        elif not (skipped and judge.freed):
            return
