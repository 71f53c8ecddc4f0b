"""Runs: a cascade over any number of images, into a folder from which the run goes on after whatever stopped it."""

import asyncio
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import aclosing
from pathlib import Path

from pydantic import JsonValue

from cascadevlm.base import loop
from cascadevlm.base.errors import RunError
from cascadevlm.base.images import ImageSource
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Run
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs.inputs import Inputs, Labelled, Named, after
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import RunFolder, Tally

LEAST_FREE = 16 << 20
"""Free bytes on a disk below which no further image is begun. The answers to questions under way still fit."""

FLUSH_SECONDS = 1.0
"""The longest time before predictions are made safe. Answers of judges are kept at once."""


def run(
    cascade: Cascade,
    inputs: Iterable[Named] | Labelled,
    folder: Path,
    *,
    config: Mapping[str, JsonValue],
    retry_failed: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Tally:
    """Classify images into a folder. What an earlier session wrote into the folder stays, and no question is asked again.

    If the images have true labels, the folder is a record, and two things differ. No drift is looked for, and the shares of the
    classes are not followed: labelled images mostly come class by class, and their labels say more than a run can find out.

    Args:
        cascade: the cascade. Its cap is for all sessions together. If the cap is higher than in the session before, judges are
            asked about the images that were skipped because the budget was spent.
        inputs: the images by name, in an order that does not change (see `Inputs`), or labelled images.
        folder: the folder of the run (see `cascadevlm.runs.run_folder`).
        config: the configuration, which tells this run from another.
        retry_failed: whether images that could not be read or whose question failed are tried again. All images after the first
            of them are then worked out again, with the answers that are kept: decisions depend on what came before.
        stopping: called before each batch; the run ends in order if it returns true.
        progress: called after every prediction.
        outlook: called with a sentence about what is left to do, if the folder holds predictions.

    Raises:
        DataError: if the folder is in use or is of another run, or its predictions are of other images or labels.
        RunError: if the disk is full or fails; what was written is kept.
        JudgeError: if a judge cannot work at all.
    """
    manifest = Manifest.of(cascade, inputs, config)
    dollars = cascade.ledger.cap_dollars
    with RunFolder.opened(folder, manifest, inputs, dollars=dollars, retry_failed=retry_failed) as opened:
        if sentence := opened.outlook(len(inputs) if isinstance(inputs, Sized) else None):
            outlook(sentence)
        store = DiskStore(folder / "verdicts") if cascade.store is None else cascade.store
        disks = [folder, store.folder] if isinstance(store, DiskStore) else [folder]
        lasting = cascade.altered(store=store, ledger=opened.ledger, observers=[*cascade.observers, opened])
        if manifest.labelled:
            lasting = lasting.altered(calibration=None, follow_shares=False)
        if loop.run(_classify(lasting, inputs, opened, lambda: stopping() or bool(_full(disks)), progress)):
            opened.finish(inputs.order if isinstance(inputs, Inputs) else None)
        elif full := _full(disks):
            hint = "What was done is kept: once there is room, the same command goes on."
            raise RunError(f"The disk of {str(full[0])!r} has less than {LEAST_FREE >> 20} MB left.", hint=hint)
        return opened.tally


def _full(folders: Sequence[Path]) -> list[Path]:
    """The folders on a disk that is nearly full."""
    return [folder for folder in folders if folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE]


async def _classify(
    cascade: Cascade,
    inputs: Iterable[Named] | Labelled,
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[Tally], None],
) -> bool:
    """Run the cascade; whether all images have a prediction."""
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


async def _append(run: Run, inputs: Iterable[Named] | Labelled, folder: RunFolder, progress: Callable[[Tally], None]) -> None:
    """Write down every prediction that is not in the folder yet."""
    number = first = folder.checkpoint.images
    known = folder.tally.images
    begun: deque[str] = deque()

    def sources() -> Iterator[ImageSource]:
        for name, source in after(inputs, first):
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


async def _flush(run: Run, folder: RunFolder) -> None:
    """Make what was written safe, every `FLUSH_SECONDS`: the first image in line may wait for minutes."""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.to_thread(folder.flush, run.checkpoint)
