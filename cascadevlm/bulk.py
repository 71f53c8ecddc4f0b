"""Bulk runs: a cascade over any number of images, into a folder from which it goes on after whatever stopped it."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import aclosing, closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from pydantic import JsonValue

from cascadevlm import loop
from cascadevlm.cache import DiskStore
from cascadevlm.cascade import Cascade
from cascadevlm.errors import DataError, RunError
from cascadevlm.images import ImageSource
from cascadevlm.inputs import Inputs, Named
from cascadevlm.recording import machine, versions
from cascadevlm.run_folder import DurableLedger, Manifest, RunFolder, Tally
from cascadevlm.scorer import Scorer, WrapperScorer
from cascadevlm.types import Scores


class _Noting(WrapperScorer):
    """Scores as another scorer does; the folder is told its fingerprint."""

    def __init__(self, wrapped: Scorer, folder: RunFolder) -> None:
        super().__init__(wrapped)
        self.folder = folder

    def altered(self, scores: Scores) -> Scores:
        self.folder.fingerprinted(scores.fingerprint)
        return scores


def run(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: Path,
    *,
    config: Mapping[str, JsonValue],
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Classify images into a folder; what is in it from an earlier session stays and is not asked again.

    Args:
        cascade: what classifies; its cap is that of all sessions together.
        inputs: the images by name, in an order that does not change: see `Inputs`.
        folder: see `cascadevlm.run_folder`.
        config: what tells this run from another.
        stopping: asked before each batch; the run ends in order, where it says so.
        progress: told of every prediction.

    Raises:
        DataError: if the folder is in use or of another run, or its predictions are of other images.
        RunError: if the disk is full or fails; what was written is kept.
        JudgeError: if a judge cannot work at all.
    """
    manifest = Manifest(
        config=dict(config),
        labels=list(cascade.labels),
        inputs=str(inputs.path.absolute()) if isinstance(inputs, Inputs) else type(inputs).__name__,
        began=datetime.now(UTC),
        versions=versions(),
        machine=machine(),
    )
    try:
        with RunFolder.opened(folder, manifest) as opened:
            return _run(cascade, inputs, opened, stopping, progress)
    except OSError as exc:
        raise RunError(
            f"{str(folder)!r} cannot be written to: {exc.strerror or exc}.",
            hint="What is in it is kept: once that is mended, the same command goes on.",
        ) from exc


def _run(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[Tally], None],
) -> Tally:
    _require_same_images(inputs, folder)
    cap = cascade.ledger.cap_dollars
    with closing(DurableLedger(cap, folder.folder / "ledger.jsonl")) as ledger:
        folder.tally.spent_dollars = ledger.spent_dollars
        lasting = cascade.altered(
            scorer=_Noting(cascade.scorer, folder),
            store=DiskStore(folder.folder / "verdicts") if cascade.store is None else cascade.store,
            ledger=ledger,
        )

        def told(tally: Tally) -> None:
            tally.spent_dollars = ledger.spent_dollars
            progress(tally)

        if loop.run(_classify(lasting, inputs, folder, stopping, told)):
            folder.finish()
    return folder.tally


def _require_same_images(inputs: Iterable[Named], folder: RunFolder) -> None:
    """Raises DataError, if the first images are not those that the folder has predictions of."""
    for number, ((name, _), path) in enumerate(_side_by_side(inputs, folder.paths())):
        if name != path:
            raise DataError(
                f"Image {number} of {str(folder.folder)!r} was {path!r} and is now {name or 'gone'!r}.",
                hint="Images may be added after the last one only; for others, give another folder.",
            )


def _side_by_side(inputs: Iterable[Named], paths: Iterator[str]) -> Iterator[tuple[Named, str]]:
    known = iter(inputs)
    return ((next(known, ("", b"")), path) for path in paths)


async def _classify(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[Tally], None],
) -> bool:
    """Whether all images have a prediction."""
    run = cascade.begin(folder.checkpoint, stopping)
    number = first = folder.checkpoint.images
    known = folder.tally.images
    names: deque[str] = deque()

    def sources() -> Iterator[ImageSource]:
        for name, source in islice(inputs, first, None):
            names.append(name)
            yield source

    total = len(inputs) if isinstance(inputs, Sized) else None
    async with aclosing(run.predictions(sources(), total)) as predictions:
        async for prediction in predictions:
            name = names.popleft()
            number += 1
            if number > known:
                folder.append(name, prediction)
                progress(folder.tally)
            if folder.flush_due:
                await asyncio.to_thread(folder.flush, run.checkpoint)
    folder.checkpoint = run.checkpoint
    return not run.stopped
