"""Runs: a cascade classifies any number of images into a folder. An interrupted run continues from its folder."""

import asyncio
import shutil
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import aclosing, nullcontext
from pathlib import Path

from pydantic import JsonValue

from cascadevlm.base import loop
from cascadevlm.base.errors import DataError, InputError, RunError
from cascadevlm.base.image_table import About
from cascadevlm.base.images import ImageSource
from cascadevlm.base.threads import one_blas_thread
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Run
from cascadevlm.cascade.learner import require_support, require_teachable
from cascadevlm.cascade.observer import Observer
from cascadevlm.config.audit import AuditConfig
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.teaching import transduced
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs.audit import AuditFigures
from cascadevlm.runs.batches.batch import answering, end_batches, require_batches, require_no_batches
from cascadevlm.runs.certified import Promised, run_certified
from cascadevlm.runs.inputs import Inputs, Labelled, Named, about, after
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.scored_first import score_first
from cascadevlm.runs.tally import Tally
from cascadevlm.scorers.base import Prepared

LEAST_FREE = 16 << 20
"""Minimum of free bytes on a disk. Below it, no further image is started, but answers to open questions still fit."""

FLUSH_SECONDS = 1.0
"""Maximum time between two flushes of the predictions, in seconds. Answers of judges are stored immediately."""


def run(
    cascade: Cascade,
    inputs: Iterable[Named] | Labelled,
    folder: Path,
    *,
    config: Mapping[str, JsonValue],
    promised: Promised | None = None,
    audit: AuditConfig | None = None,
    batch: bool = False,
    retry_failed: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
    scored: Callable[[int], None] = lambda images: None,
    asked: Callable[[int, float], None] = lambda images, dollars: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Tally:
    """Classify images into a folder. The results of an earlier session in the folder are kept, and no stored question is asked
    again.

    If the images have true labels, the folder is a record. Then drift is not watched, and the shares of the classes are not
    followed, because labelled images are often sorted by class.

    A run that learns scores all images before it decides on the first one, and learns from all of them (`transduced`), unless
    their number is not known beforehand, or they have true labels.

    Args:
        cascade: the cascade. Its spending limit covers all sessions together. If the limit is higher than in the session
            before, judges are asked about the images that were skipped because of the old limit.
        inputs: the images, in an order that does not change (see `Inputs`), or labelled images.
        folder: the folder of the run (see `cascadevlm.runs.run_folder`).
        config: the configuration. A folder of a run with another configuration is refused.
        promised: what the run promises (`cascadevlm.runs.certified`). Default: nothing.
        audit: the audit of the cascade's stage. Default: no audit.
        batch: true to ask hosted judges through the batch APIs of their providers (`answered_in_batches`). All images are then
            scored before the first question.
        retry_failed: true to classify the first failed image and all images after it again, with the stored answers. An image
            failed if it could not be read, or if its question failed. The images after it are included because decisions depend
            on earlier images.
        stopping: function that is called before each batch. If it returns true, the run finishes its open questions and ends.
        progress: function that is called after every prediction.
        scored: function that is called with the number of scored images, if all images are scored before the first decision.
        asked: function that is called with the number of images that the judge was asked about, and the US dollars spent,
            if the run has a certificate.
        outlook: function that is called with a sentence about the work that is left, if the folder contains predictions, and
            about each batch.

    Raises:
        DataError: if the folder is in use or belongs to another run, or if its predictions are of other images or labels; with
            ``batch``, if the images have true labels or their number is not known; without, if questions are in batches.
        InputError: with ``batch``, if questions depend on answers about other images.
        BackendError: with ``batch``, if no judge has a batch API.
        RunError: if the disk is full or fails. The results so far are kept.
        JudgeError: if a judge cannot work at all.
    """
    manifest = Manifest.of(cascade, inputs, config)
    dollars = cascade.ledger.cap_dollars
    if batch:
        _require_batches(cascade, inputs, promised)
    else:
        require_no_batches(folder)
    with (
        RunFolder.opened(folder, manifest, inputs, dollars=dollars, retry_failed=retry_failed) as opened,
        nullcontext() if cascade.learns_from is None else one_blas_thread,
    ):
        if sentence := opened.outlook(_number_of(inputs)):
            outlook(sentence)
        batches = outlook if batch else None
        store = DiskStore(folder / "verdicts") if cascade.store is None else cascade.store
        disks = [folder, store.folder] if isinstance(store, DiskStore) else [folder]
        lasting = cascade.altered(store=store, ledger=opened.ledger, observers=[*cascade.observers, opened])
        if manifest.labelled:
            lasting = lasting.altered(calibration=None, follow_shares=False)

        def ending() -> bool:
            return stopping() or bool(_full(disks))

        if promised is not None:
            done = run_certified(
                lasting,
                promised,
                inputs,
                opened,
                batches=batches,
                retry_failed=retry_failed,
                stopping=ending,
                scored=scored,
                asked=asked,
                outlook=outlook,
            )
        else:
            looks_first = batch or lasting.learns_from is not None
            if looks_first and isinstance(inputs, Sized) and not isinstance(inputs, Labelled):
                taught = _scored_first(lasting, inputs, opened, ending, scored, retry_failed=retry_failed)
            else:
                taught = lasting
            watch = AuditWatch(audit)

            def told(tally: Tally) -> None:
                watch.look_at(tally)
                progress(tally)

            done = taught is not None and loop.run(_classify(taught, inputs, opened, ending, told, batches))
        if done:
            end_batches(folder, opened.ledger)
            opened.tally.spent_dollars = opened.ledger.spent_dollars
            opened.tally.audit = None if audit is None else figures_of(audit, opened.tally)
            opened.finish(inputs.order if isinstance(inputs, Inputs) else None)
        elif full := _full(disks):
            hint = "Free some space, then repeat the same command. The results so far are kept."
            raise RunError(f"The disk of {str(full[0])!r} has less than {LEAST_FREE >> 20} MB left.", hint=hint)
        return opened.tally


def _require_batches(cascade: Cascade, inputs: Iterable[Named] | Labelled, promised: Promised | None) -> None:
    """Refuse a run that cannot ask through batch APIs.

    Raises: the errors of `require_batches`, and DataError or InputError if the images or the promise do not fit.
    """
    require_batches(cascade)
    if isinstance(inputs, Labelled) or not isinstance(inputs, Sized):
        raise DataError("Batches need a known number of images without true labels.", hint="Give a folder or a list.")
    if isinstance(promised, FindConfig):
        told = "[find] asks in many small steps, and the provider may take a day for each batch."
        raise InputError(told, hint="Leave out --batch.")


class AuditWatch:
    """Warns once if the audit of a run shows that too few labels are the judge's.

    Args:
        audit: the audit; None if there is none.
    """

    def __init__(self, audit: AuditConfig | None) -> None:
        self.audit = audit
        self._differing = 0

    def look_at(self, tally: Tally) -> None:
        """Look at the counts so far.

        Warns:
            RuntimeWarning: if the promise of the audit is broken.
        """
        if self.audit is None or tally.differing == self._differing:
            return
        self._differing = tally.differing
        found = figures_of(self.audit, tally)
        if found.crossed:
            warnings.warn(found.sentence, RuntimeWarning, stacklevel=2)
            self.audit = None


def figures_of(audit: AuditConfig, tally: Tally) -> AuditFigures:
    """What an audit found, from the counts of a run."""
    images = tally.images - tally.counts["unreadable"]
    return AuditFigures.of(
        audit, images=images, kept=tally.audited, disagreements=tally.differing, escalated=tally.escalated_by_audit
    )


def _scored_first(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[int], None],
    *,
    retry_failed: bool,
) -> Cascade | None:
    """The cascade with the scores of all images and, if it learns, with what they teach; None if the scoring was stopped."""
    images = score_first(
        cascade,
        inputs,
        folder.folder,
        began=folder.manifest.began,
        retry_failed=retry_failed,
        observers=[] if cascade.learns_from is None else [_Teachable(cascade.learns_from)],
        stopping=stopping,
        progress=progress,
    )
    if images is None:
        return None
    if not folder.finished:
        images.require_of(cascade.scorer)
    if cascade.learns_from is not None:
        cascade = cascade.altered(unlabelled=transduced(require_support(cascade.learns_from), images.blocks))
    return images.given_to(cascade)


class _Teachable(Observer):
    """Checks that a run can learn from the scores."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        require_teachable(scores, self.calibration)
        self.calibration.calibrated(scores.rows(slice(0, 0)))


def _full(folders: Sequence[Path]) -> list[Path]:
    """The folders on a disk that is nearly full."""
    return [folder for folder in folders if folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE]


async def _classify(
    cascade: Cascade,
    inputs: Iterable[Named] | Labelled,
    folder: RunFolder,
    stopping: Callable[[], bool],
    progress: Callable[[Tally], None],
    batches: Callable[[str], None] | None,
) -> bool:
    """Run the cascade. Returns True if all images have a prediction."""
    first = folder.checkpoint

    def classifying(each: Cascade) -> AsyncGenerator[Prediction, None]:
        return each.begin(first, stopping).predictions((source for _, source in after(inputs, first.images)), _number_of(inputs))

    async with answering(cascade, classifying, folder.folder, told=batches, stopping=stopping) as ready:
        if ready is None:
            return False
        run = ready.begin(first, stopping)
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
    """Write every prediction that is not in the folder yet."""
    number = first = folder.checkpoint.images
    known = folder.tally.images
    begun: deque[tuple[str, About]] = deque()

    def sources() -> Iterator[ImageSource]:
        for (name, source), told in zip(after(inputs, first), about(inputs, first), strict=False):
            begun.append((name, told))
            yield source

    async with aclosing(run.predictions(sources(), _number_of(inputs))) as predictions:
        async for prediction in predictions:
            name, told = begun.popleft()
            number += 1
            if number > known:
                folder.append(name, told, prediction)
                progress(folder.tally)


def _number_of(inputs: Iterable[Named] | Labelled) -> int | None:
    """The number of images; None if it is not known."""
    return len(inputs) if isinstance(inputs, Sized) else None


async def _flush(run: Run, folder: RunFolder) -> None:
    """Flush the folder every `FLUSH_SECONDS`, because the next prediction in order may take minutes."""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.to_thread(folder.flush, run.checkpoint)
