"""Bulk runs: a cascade over any number of images, into a folder from which it goes on after whatever stopped it."""

import asyncio
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from cascadevlm.base import loop
from cascadevlm.base.errors import RunError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Run
from cascadevlm.judges.base import Judge, WrapperJudge
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs.inputs import Named, after
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import RunFolder, Tally
from cascadevlm.scorers.base import Prepared, Scorer
from cascadevlm.scorers.kept import Digesting

LEAST_FREE = 16 << 20
"""Bytes free on a disk below which no further image is begun: there is room for the answers to what was asked already."""

FLUSH_SECONDS = 1.0
"""How long predictions wait at most to be made safe; answers of judges are kept at once."""


class _NotedScorer(Digesting):
    """Scores as another scorer does; the folder is told its fingerprint and what it scored."""

    def __init__(self, wrapped: Scorer, folder: RunFolder) -> None:
        super().__init__(wrapped)
        self.folder = folder

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        self.folder.scored(prepared)
        return super().score_prepared(prepared, labels)

    def altered(self, scores: Scores) -> Scores:
        self.folder.scored_with(scores.fingerprint)
        return scores


class _NotedJudge(WrapperJudge):
    """Judges as another judge does; the folder is told its identity once it is ready, which it may load a model for."""

    def __init__(self, wrapped: Judge, folder: RunFolder, stage: int) -> None:
        super().__init__(wrapped)
        self.replays = wrapped.replays
        self.folder = folder
        self.stage = stage

    async def prepare(self) -> None:
        await super().prepare()
        self.folder.judged_by(self.stage, self.identity())


def run(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: Path,
    *,
    config: Mapping[str, JsonValue],
    retry_failed: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Tally:
    """Classify images into a folder; what is in it from an earlier session stays and is not asked again.

    Args:
        cascade: what classifies; its cap is that of all sessions together. A cap that is higher than in the session before has
            judges asked about the images that were skipped for want of money.
        inputs: the images by name, in an order that does not change: see `Inputs`.
        folder: see `cascadevlm.runs.run_folder`.
        config: what tells this run from another.
        retry_failed: whether images that could not be read or of which a judge could not be asked are done anew, and all after
            the first of them worked out again, with the answers that are kept: decisions depend on what came before.
        stopping: asked before each batch; the run ends in order, where it says so.
        progress: told of every prediction.
        outlook: told what is left to do, as a sentence, if the folder holds predictions.

    Raises:
        DataError: if the folder is in use or of another run, or its predictions are of other images.
        RunError: if the disk is full or fails; what was written is kept.
        JudgeError: if a judge cannot work at all.
    """
    manifest = Manifest.of(cascade, inputs, config)
    dollars = cascade.ledger.cap_dollars
    with RunFolder.opened(folder, manifest, dollars=dollars, retry_failed=retry_failed) as opened:
        if sentence := opened.outlook(len(inputs) if isinstance(inputs, Sized) else None):
            outlook(sentence)
        store = DiskStore(folder / "verdicts") if cascade.store is None else cascade.store
        disks = [folder, store.folder] if isinstance(store, DiskStore) else [folder]
        noted = [replace(stage, judge=_NotedJudge(stage.judge, opened, number)) for number, stage in enumerate(cascade.stages)]
        lasting = cascade.altered(
            scorer=_NotedScorer(cascade.scorer, opened),
            stages=noted,
            store=store,
            ledger=opened.ledger,
        )
        if loop.run(_classify(lasting, inputs, opened, lambda: stopping() or bool(_full(disks)), progress)):
            opened.finish()
        elif full := _full(disks):
            hint = "What was done is kept: once there is room, the same command goes on."
            raise RunError(f"The disk of {str(full[0])!r} has less than {LEAST_FREE >> 20} MB left.", hint=hint)
        return opened.tally


def _full(folders: Sequence[Path]) -> list[Path]:
    """Those on a disk that is nearly full."""
    return [folder for folder in folders if folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE]


async def _classify(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[Tally], None],
) -> bool:
    """Whether all images have a prediction."""
    run = cascade.begin(folder.checkpoint, stopping)
    tasks = [asyncio.create_task(work) for work in (_append(run, inputs, folder, progress), _flush(run, folder))]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    folder.checkpoint = run.checkpoint
    return not run.stopped


async def _append(run: Run, inputs: Iterable[Named], folder: RunFolder, progress: Callable[[Tally], None]) -> None:
    """Write down every prediction that is not known yet."""
    number = first = folder.checkpoint.images
    known = folder.tally.images
    begun: deque[str] = deque()

    def sources() -> Iterator[ImageSource]:
        for name, source in after(inputs, first, folder.paths()):
            begun.append(name)
            yield source

    total = len(inputs) if isinstance(inputs, Sized) else None
    async with aclosing(run.predictions(sources(), total)) as predictions:
        async for prediction in predictions:
            name = begun.popleft()
            number += 1
            if number > known:
                folder.append(name, prediction)
                progress(folder.tally)
            else:
                folder.forget(name)


async def _flush(run: Run, folder: RunFolder) -> None:
    """Make what was written safe again and again, whether or not anything comes: the first in line may wait for minutes."""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.to_thread(folder.flush, run.checkpoint)
