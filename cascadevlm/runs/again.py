"""Deciding a finished run again: with all that it learned, and without a further question.

A run that learns decides each image with what it had learned until then. `decide_again` goes through the same images with what
the whole run taught, and with the labels that people gave. A judge's answers are kept, and are fused with the new scores. No
image is read: the folder of the run contains the scores and embeddings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base import loop
from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.threads import one_blas_thread
from cascadevlm.base.types import Candidate, Prediction, Scores
from cascadevlm.cascade.candidates import TopK, as_scored
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import BEGINNING, Checkpoint
from cascadevlm.cascade.item import Item, rank
from cascadevlm.cascade.learner import Learner, require_support
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.distinct import Keys, keys_of
from cascadevlm.decision.learning import Learned
from cascadevlm.decision.teaching import transduced
from cascadevlm.runs.corrections import Corrections, add_corrections, read_corrections
from cascadevlm.runs.learned_file import read_learned
from cascadevlm.runs.lines import JudgedLine, read_lines
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import LEARNED, PREDICTIONS, SUMMARY, TABLE, RunFolder
from cascadevlm.runs.scored_first import SCORED, ScoredImages
from cascadevlm.scorers.base import Prepared


@dataclass(frozen=True, kw_only=True)
class Again:
    """The result of deciding a run again.

    Attributes:
        images: number of images.
        changed: number of images whose label is another one now.
        measured: number of labelled images of the calibration.
        before: share of these that the scorer gets right before the run, each without its own label.
        after: the same after the run.
    """

    images: int
    changed: int
    measured: int
    before: float
    after: float


def decide_again(run: Path, output: Path, cascade: Cascade) -> Again:
    """Decide a finished run again, and write the predictions into another folder, which has the form of a run's folder.

    Args:
        run: folder of a finished run that learned, and that scored all its images first.
        output: a new or empty folder. The corrections of the run are copied into this folder.
        cascade: the cascade of the run. Its judges are not asked.

    Raises:
        DataError: if the run did not learn, did not score all its images first, is not finished, had several stages or followed
            the shares of the classes; if the output is not a new or empty folder.
    """
    calibration = _require_learned(run, cascade)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{str(output)!r} is not an empty folder.", hint="Give a new or empty folder.")
    corrections = read_corrections(run)
    manifest = Manifest.read(run)
    images = ScoredImages.read(run, cascade.labels)
    with one_blas_thread:
        unlabelled = transduced(require_support(calibration), images.blocks)
        noted = read_learned(run / LEARNED) if (run / LEARNED).exists() and not corrections.counting else BEGINNING
        learner = Learner(calibration, cascade.batch_size, cascade.stages, _with_keys(noted.learned, run), unlabelled)
        loop.run(_learn(learner, cascade, run, images, noted, corrections))
        taught = learner.learning.again()
        truths, changed = learner.labelled.truths, 0
        start = learner.labelled.taught(learner.labelled.nothing())
        new = manifest.model_copy(update={"began": datetime.now(UTC), "decided_again": True})
        with RunFolder.opened(output, new, ()) as folder:
            for begin, lines in _batches(run, images, 0, cascade.batch_size):
                scores = images.rows(begin, begin + len(lines))
                items: list[Item] = []
                if len(scores) and scores.embeddings is not None:
                    decided = learner.scores_by(taught, scores)
                    items = _heard(cascade, decided, lines, begin)
                    folder.scored([item.number for item in items], [item.prepared for item in items], decided)
                predictions = {item.number: item.concluded(cascade.on_failure, cascade.accept) for item in items}
                for number, line in enumerate(lines, start=begin):
                    prediction = predictions.get(number) or Prediction(path=line.path, error=line.error)
                    told = line.model_dump(include={"id", "kept"}, exclude_unset=True)
                    folder.append(line.path, told, prediction)
                    changed += prediction.label != line.label
            folder.checkpoint = Checkpoint(images=folder.tally.images)
            if corrections.all:
                add_corrections(output, corrections.all)
            folder.finish(_order(run))
    return Again(
        images=len(images.log_probs),
        changed=changed,
        measured=len(truths),
        before=float((start.held_out.argmax(axis=1) == truths).mean()),
        after=float((taught.held_out.argmax(axis=1) == truths).mean()),
    )


def _require_learned(run: Path, cascade: Cascade) -> Calibration:
    hint = "Start a run with learn = true over a folder, a list or a table."
    if cascade.learns_from is None or not (run / SCORED).exists():
        what = "did not learn" if cascade.learns_from is None else "did not score all its images before it decided"
        raise DataError(f"The run in {str(run)!r} {what}, so it cannot be decided again.", hint=hint)
    if not (run / SUMMARY).exists():
        raise DataError(f"The run in {str(run)!r} is not finished.", hint="Repeat the command that started it.")
    if len(cascade.stages) > 1 or cascade.follow_shares:
        what = "several stages" if len(cascade.stages) > 1 else "follow_shares = true"
        raise DataError(f"A run with {what} cannot be decided again.", hint="Use one stage and follow_shares = false.")
    return cascade.learns_from


async def _learn(
    learner: Learner, cascade: Cascade, run: Path, images: ScoredImages, noted: Checkpoint, corrections: Corrections
) -> None:
    """Learn from the images after a checkpoint, as the run did. But a label that a person gave is certain, and nothing that a
    judge said is learned about an image that shows none of the labels.
    """
    certain = np.eye(len(cascade.labels), dtype=np.float32)
    for begin, lines in _batches(run, images, noted.images, cascade.batch_size):
        scores = images.rows(begin, begin + len(lines))
        adapted = await learner.adapted(scores, begin, _keys(lines)) if len(scores) else None
        items = [] if adapted is None else _heard(cascade, adapted, lines, begin)
        answered = [any(verdict.valid for verdict in item.verdicts) for item in items]
        beliefs = [item.probabilities() for item in items]
        for row, item in enumerate(items):
            if (corrected := corrections.counting.get(lines[item.number - begin].key)) is not None:
                answered[row] = corrected.label is not None
                if corrected.label is not None:
                    beliefs[row] = certain[cascade.labels.columns[corrected.label]]
        await learner.take(adapted, beliefs, answered, begin)


def _with_keys(learned: Learned | None, run: Path) -> Learned | None:
    """What a run had learned, with the keys of the images before, which its file does not contain."""
    if learned is None:
        return None
    lines = (line for _, line in islice(read_lines(run / PREDICTIONS, JudgedLine), learned.images))
    return replace(learned, keys=_keys(lines))


def _keys(lines: Iterable[JudgedLine]) -> Keys:
    """``(n,)`` keys of the n readable images."""
    return keys_of(line.digest or line.content for line in lines if line.candidates)


def _batches(run: Path, images: ScoredImages, first: int, size: int) -> Iterator[tuple[int, list[JudgedLine]]]:
    """The lines of the predictions from number ``first``, in batches, each with the number of its first image."""
    lines = (line for _, line in islice(read_lines(run / PREDICTIONS, JudgedLine), first, None))
    for begin in range(first, len(images.log_probs), size):
        yield begin, list(islice(lines, size))


def _heard(cascade: Cascade, scores: Scores, lines: Sequence[JudgedLine], begin: int) -> list[Item]:
    """The n readable images of a batch with `(n, C)` scores, as after the stages: with candidates and the run's answers."""
    numbered = [(number, line) for number, line in enumerate(lines, start=begin) if line.candidates]
    items = [
        Item(
            number=number,
            path=line.path,
            prepared=Prepared(source=line.path if line.digest else b"", digest=line.digest or line.content),
            chunk=scores,
            row=row,
            reasons=[*line.reasons],
        )
        for row, (number, line) in enumerate(numbered)
    ]
    rank(cascade.stages[0].candidates if cascade.stages else TopK(), items)
    by_name = {label.name: label for label in scores.labels}
    for item, (_, line) in zip(items, numbered, strict=True):
        if line.verdict is None:
            continue
        shown = (Candidate(label=by_name[each.label], probability=0.0, rank=1) for each in line.candidates)
        item.candidates = tuple(as_scored(item.scores, candidate) for candidate in shown)
        item.verdicts.append(line.verdict.to_verdict())
        item.hear(cascade.stages[0], item.verdicts[-1])
    return items


def _order(run: Path) -> NDArray[np.int64]:
    """`(N,)` the place in the table of each prediction. Files that are listed twice have the same prediction."""
    import pyarrow.parquet

    names = pyarrow.parquet.read_table(run / TABLE, columns=["path"])["path"].to_pylist()
    places: dict[str, list[int]] = {}
    for place, name in reversed([*enumerate(names)]):
        places.setdefault(name, []).append(place)
    lines = (line for _, line in read_lines(run / PREDICTIONS, JudgedLine))
    return np.array([places[valid_text(line.path)].pop() for line in lines], dtype=np.int64)
