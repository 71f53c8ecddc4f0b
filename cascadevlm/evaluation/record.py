"""Records: the content of the folder of a run over labelled images, as arrays.

`cascadevlm.runs.run_folder` describes the files. Every policy, threshold and fusion rule is a function of a record. So all of
them can be tried without a question to a judge. ``recorded:`` replays a record.

For more than 1,000 labels, the folder contains only the 50 highest log-probabilities per image. `read_record` divides the
remaining probability evenly among the other labels. Candidates, recall, margin and top probability are then exact, but the
entropy is a little too high. The probabilities of the other labels are lost.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import CascadeError, DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.html import card
from cascadevlm.base.image_table import About
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores, Verdict
from cascadevlm.evaluation.content import Content
from cascadevlm.evaluation.own_arrays import OWN, OwnArrays, Values, checked_arrays
from cascadevlm.runs.corrections import read_corrections
from cascadevlm.runs.lines import Asked, LabelledLine, WholeVerdict, read_lines
from cascadevlm.runs.manifest import NAME, Manifest
from cascadevlm.runs.run_folder import PREDICTIONS
from cascadevlm.runs.scores_file import COLUMNS, EMBEDDINGS, SCORES, checksum, scores_kept

Number = TypeVar("Number", bound=np.generic)


class StatedStage(BaseModel):
    """The keys of a stage's configuration that replays need."""

    policy: str | None = None
    widen: int = 0


class Stated(BaseModel):
    """The keys of a configuration that replays need."""

    on_failure: str = "scorer"
    accept: float | None = None
    calibration: str | None = None
    fusion: str | None = None
    stage: list[StatedStage] = []


def _some(texts: tuple[str, ...], rows: NDArray[np.intp]) -> tuple[str, ...]:
    return tuple(texts[row] for row in rows.tolist())


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The answers of one stage's judge about N images.

    Attributes:
        judge: the spec of the judge.
        asked: ``(N,)`` booleans: the judge was asked. The value is false for an image that was skipped because the budget was
            used up.
        outcomes: N outcomes as in `Verdict`; "" for images that the stage did not escalate.
        answers: ``(N,)`` columns of the labels; `NOBODY` if there is no answer.
        candidates: ``(N, K)`` columns of the labels, in the order in which the judge saw them; `NOBODY` after the last
            candidate of an image.
        rationales: N texts that the judge wrote before its answer; its complete text if there is no such part.
        dollars: ``(N,)`` costs in US dollars. An answer from the cache has its original cost, so that a second run has the same
            costs as the first run.
        seconds: ``(N,)`` durations in seconds; 0 for answers from the cache.
        input_tokens: ``(N,)`` numbers of tokens; 0 for answers from the cache.
        output_tokens: ``(N,)`` numbers of tokens; 0 for answers from the cache.
        paid: ``(N,)`` US dollars that this run paid.
        none_offered: true if "none of these" was an option.
        probabilities: ``(N, K)`` probabilities of the candidates from the judge; NaN if the judge gave no probabilities. None
            if they are unknown.
    """

    judge: str
    asked: NDArray[np.bool_]
    outcomes: tuple[str, ...]
    answers: Columns
    candidates: Columns
    rationales: tuple[str, ...]
    dollars: NDArray[np.float64]
    seconds: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    paid: NDArray[np.float64]
    none_offered: bool = False
    probabilities: NDArray[np.float64] | None = None

    def take(self, rows: NDArray[np.intp]) -> "Judged":
        """The same data for the images of these rows."""
        return Judged(
            judge=self.judge,
            asked=self.asked[rows],
            outcomes=_some(self.outcomes, rows),
            answers=self.answers[rows],
            candidates=self.candidates[rows],
            rationales=_some(self.rationales, rows),
            dollars=self.dollars[rows],
            seconds=self.seconds[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            paid=self.paid[rows],
            none_offered=self.none_offered,
            probabilities=None if self.probabilities is None else self.probabilities[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Labels of N images from scorer and judges together, computed with a calibration.

    Attributes:
        labels: ``(N,)`` columns of the most probable labels after the last stage's judge was asked.
        probabilities: ``(N,)`` probabilities of these labels.
        gain: ``(N,)`` expected gains in accuracy from asking the last stage's judge.
        word_final: true if the answer of that judge, if it gave one, is the final label.
    """

    labels: Columns
    probabilities: NDArray[np.float64]
    gain: NDArray[np.float64]
    word_final: bool

    def take(self, rows: NDArray[np.intp]) -> "Fused":
        """The same data for the images of these rows."""
        return replace(self, labels=self.labels[rows], probabilities=self.probabilities[rows], gain=self.gain[rows])


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run over N labelled images.

    Attributes:
        scores: scores of the N images. An image that could not be read has equal probabilities and an embedding of 0.
        readable: ``(N,)`` booleans: the image could be read.
        names: N names of the images.
        truths: ``(N,)`` columns of the true labels.
        stages: the answers of the judge of each stage.
        predicted: ``(N,)`` columns of the predicted labels; `NOBODY` if the cascade gave no label.
        probabilities: ``(N,)`` probabilities of the predicted labels; NaN if the prediction has no probability.
        decided_by: N values as in `Prediction`; "" if there is no label.
        digests: N digests of the pixels; "" for images that could not be read. Empty for records made of arrays.
        info: the manifest; None for records made of arrays.
        about: the id and the kept columns of each image; empty if there are no such columns.
        fused: the fused labels, if a calibration was applied (`cascadevlm.evaluation.deciding.decided`).
    """

    scores: Scores
    readable: NDArray[np.bool_]
    names: tuple[str, ...]
    truths: Columns
    stages: tuple[Judged, ...]
    predicted: Columns
    probabilities: NDArray[np.float64]
    decided_by: tuple[str, ...]
    digests: tuple[str, ...] = ()
    info: Manifest | None = None
    fused: Fused | None = None
    about: tuple[About, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        scores: NDArray[np.generic],
        labels: LabelSet | Iterable[str],
        truths: Values,
        *,
        answers: Values | None = None,
        candidates: NDArray[np.generic] | int | None = None,
        dollars: NDArray[np.floating] | float = 0.0,
        names: Sequence[str] | None = None,
        judge: str = OWN,
    ) -> "Record":
        """A record of a scorer's scores and a judge's answers that were recorded elsewhere.

        Labels may be given as names or as columns: numbers from 0, in the order of ``labels``.

        Args:
            scores: ``(N, C)`` logits, log-probabilities, or probabilities, whose rows are not negative and sum to 1.
            labels: the C labels.
            truths: ``(N,)`` true labels.
            answers: ``(N,)`` answers of the judge. "" or -1: the judge was not asked. "none of these" or -2: the judge chose
                none of the candidates. Default: no judge.
            candidates: ``(N, K)`` labels that the judge chose from, in the order in which it saw them; "" or -1 after the last.
                Or a number K: the K best labels of the scorer. Default: all labels.
            dollars: cost of each question in US dollars, ``(N,)`` or one number. Default: 0.
            names: N names of the images. Default: ``#0``, ``#1``, ….
            judge: the name of the judge.

        Raises:
            DataError: if the arrays have different lengths, a label is unknown, a score is not finite, or an answer is not one
                of its candidates.
        """
        given = checked_arrays(scores, LabelSet.of(labels), truths, answers, candidates, dollars)
        size, best = len(given.truths), given.scores.log_probs.argmax(axis=1)
        answered = np.zeros(size, dtype=bool) if given.answers is None else given.answers >= 0
        texts = tuple(f"#{number}" for number in range(size)) if names is None else tuple(names)
        if len(texts) != size or len(set(texts)) != size:
            raise DataError(f"{len(set(texts))} different names were given for {size} images.", hint="Give one name per image.")
        return cls(
            scores=given.scores,
            readable=np.ones(size, dtype=bool),
            names=texts,
            truths=given.truths,
            stages=() if given.answers is None else (_own_stage(given, given.answers, judge),),
            predicted=best if given.answers is None else np.where(answered, given.answers, best),
            probabilities=np.where(answered, np.nan, given.scores.probabilities.max(axis=1).astype(np.float64)),
            decided_by=tuple("judge" if each else "scorer" for each in answered.tolist()),
        )

    def __len__(self) -> int:
        return len(self.truths)

    def __repr__(self) -> str:
        return f"Record(images={len(self)}, judges={[stage.judge for stage in self.stages]!r}, labels={self.labels!r})"

    def _repr_html_(self) -> str:
        right = int((self.predicted == self.truths)[self.readable].sum())
        rows = {
            "images": f"{len(self):,} ({int((~self.readable).sum()):,} unreadable)",
            "labels": f"{len(self.labels):,}",
            "scorer": self.scores.fingerprint,
            "judges": [f"{stage.judge}: asked about {int(stage.asked.sum()):,} images" for stage in self.stages],
            "right": f"{right:,}",
            "paid": f"${sum(stage.paid.sum() for stage in self.stages):,.4f}",
        }
        return card("Record", rows)

    def take(self, rows: NDArray[np.intp]) -> "Record":
        """The record of the images of these rows, in this order."""
        return Record(
            scores=self.scores.rows(rows),
            readable=self.readable[rows],
            names=_some(self.names, rows),
            truths=self.truths[rows],
            stages=tuple(stage.take(rows) for stage in self.stages),
            predicted=self.predicted[rows],
            probabilities=self.probabilities[rows],
            decided_by=_some(self.decided_by, rows),
            digests=_some(self.digests, rows) if self.digests else (),
            info=self.info,
            fused=self.fused and self.fused.take(rows),
            about=tuple(self.about[row] for row in rows.tolist()) if self.about else (),
        )

    @property
    def labels(self) -> LabelSet:
        return self.scores.labels

    @cached_property
    def scored(self) -> Columns:
        """``(N,)`` columns of the scorer's best labels; `NOBODY` for images that could not be read."""
        return np.where(self.readable, self.scores.log_probs.argmax(axis=1), NOBODY)

    @cached_property
    def stated(self) -> Stated:
        """The keys of the configuration that replays need. A record made of arrays has the defaults."""
        return Stated.model_validate(self.info.config if self.info else {})

    @property
    def asked_everything(self) -> bool:
        """True if the judge of the last stage was asked about every readable image."""
        return bool(self.judged.asked[self.readable].all())

    @property
    def judged(self) -> Judged:
        """The answers of the last stage. Raises: DataError: if the record has no stage."""
        if not self.stages:
            raise DataError("The record has no judge.", hint="Run a cascade with a stage.")
        return self.stages[-1]


def _own_stage(given: OwnArrays, answers: Columns, judge: str) -> Judged:
    """The stage of answers that were recorded elsewhere."""
    size, asked = len(answers), answers != NOBODY
    none = np.zeros(size, dtype=np.int64)
    return Judged(
        judge=judge,
        asked=asked,
        outcomes=tuple(np.select([answers >= 0, asked], ["answered", "none"], "").tolist()),
        answers=np.maximum(answers, NOBODY),
        candidates=np.where(asked[:, None], given.candidates, NOBODY),
        rationales=("",) * size,
        dollars=given.dollars * asked,
        seconds=np.zeros(size),
        input_tokens=none,
        output_tokens=none,
        paid=np.zeros(size),
        none_offered=bool((answers < NOBODY).any()),
    )


def read_record(folder: str | Path) -> Record:
    """Read the record in a folder. Labels of people replace the true labels. Images that show none of the labels, as people say,
    are left out.

    Raises:
        DataError: if there is no record, its run is not finished, a part is missing or damaged, or its parts contradict each
            other.
    """
    folder = Path(folder)
    with _reading(folder) as manifest:
        labels = LabelSet(tuple(manifest.labels))
        log_probs, columns = _read_scores(folder, labels)
        embeddings = _read_embeddings(folder, len(log_probs))
        content, corrections = Content(labels, manifest, len(log_probs)), read_corrections(folder)
        outside = np.zeros(len(log_probs), dtype=bool)
        for number, line in _lines(folder, len(log_probs)):
            rows = [log_probs[number]] if columns is None else [log_probs[number], columns[number]]
            if line.scores != checksum(*rows):
                raise ValueError(
                    f"{SCORES} has other scores of image {number} than the scores from which its prediction was made"
                )
            if embeddings is not None and line.embedding not in (None, checksum(embeddings[number])):
                raise ValueError(
                    f"{EMBEDDINGS} has another embedding of image {number} than the embedding from which its prediction was made"
                )
            corrected = corrections.counting.get(line.key)
            outside[number] = corrected is not None and corrected.label is None
            content.add(number, line, corrected.label if corrected and corrected.label else line.truth)
        readable = content.readable
        if columns is not None:
            log_probs = _spread(log_probs, columns, len(labels))
        log_probs[~readable] = -np.log(len(labels))
        scores = Scores(
            log_probs=log_probs,
            labels=labels,
            fingerprint=manifest.fingerprint or "",
            embeddings=embeddings if content.embedded[readable].all() else None,
        )
        record = record_of(content, scores)
        return record.take(np.flatnonzero(~outside)) if outside.any() else record


def read_verdicts(folder: str | Path) -> tuple[list[tuple[str, Asked, Verdict]], ...]:
    """The answers in a record. For every stage, each answer has the digest of the image's pixels, the question and the verdict.

    Raises:
        DataError: in the same cases as `read_record`.
    """
    folder = Path(folder)
    with _reading(folder) as manifest:
        stages: tuple[list[tuple[str, Asked, Verdict]], ...] = tuple([] for _ in manifest.stages)
        for _, line in _lines(folder, len(_read_array(folder / SCORES, np.float32))):
            for verdict, asked in zip(line.verdicts, line.questions, strict=True):
                if asked is not None:
                    stages[verdict.stage].append((line.pixels, asked, verdict.to_verdict()))
        return stages


class _Unfinished(ValueError):
    """The run of a record is not finished."""


@contextmanager
def _reading(folder: Path) -> Iterator[Manifest]:
    """The manifest of a record. Errors in the block become a DataError with one sentence about the record."""
    hint = "Make a record: cascadevlm evaluate DATA -o RUN. Or import labels of people: cascadevlm import FILE --into RUN."
    missing = [part for part in (NAME, PREDICTIONS) if not (folder / part).is_file()]
    if missing:
        raise DataError(f"{str(folder)!r} does not contain a complete record: it lacks {' and '.join(missing)}.", hint=hint)
    manifest = Manifest.read(folder)
    if not manifest.labelled:
        raise DataError(f"{str(folder)!r} is a run without labels, not a record.", hint=hint)
    try:
        yield manifest
    except _Unfinished as exc:
        hint = "Repeat the command that made the record: it continues the run."
        raise DataError(f"{str(folder)!r} does not contain a complete record: {exc}.", hint=hint) from exc
    except (OSError, EOFError, ValueError, KeyError, IndexError, CascadeError) as exc:
        why = str(exc).partition("\n")[0].rstrip(".")
        raise DataError(f"{str(folder)!r} does not contain a complete record: {why}.", hint=hint) from exc


def _lines(folder: Path, images: int) -> Iterator[tuple[int, LabelledLine]]:
    """The lines of a complete record, with the numbers of their images, from 0."""
    number = 0
    for number, line in read_lines(folder / PREDICTIONS, LabelledLine):
        if number > images:
            raise ValueError(f"it has more predictions than rows of {SCORES}")
        yield number - 1, line
    if number < images:
        raise _Unfinished(f"its run was interrupted after {number} of {images} images")


def _read_scores(folder: Path, labels: LabelSet) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
    """``(N, K) float32``, the stored log-probabilities, and ``(N, K) int32``, their columns (None if all are stored)."""
    width = scores_kept(labels)
    log_probs = _read_array(folder / SCORES, np.float32)
    columns = _read_array(folder / COLUMNS, np.int32) if width < len(labels) else None
    if log_probs.shape[1:] != (width,) or (columns is not None and columns.shape != log_probs.shape):
        raise ValueError("its files are not of the same images and labels")
    return log_probs, columns


def _read_embeddings(folder: Path, images: int) -> NDArray[np.float16] | None:
    """``(N, D) float16``; None if the record has no file of embeddings."""
    if not (folder / EMBEDDINGS).exists():
        return None
    embeddings = _read_array(folder / EMBEDDINGS, np.float16)
    if embeddings.ndim != 2 or len(embeddings) != images:
        raise ValueError(f"{EMBEDDINGS} is not of the same images")
    return embeddings


def _read_array(path: Path, kind: type[Number]) -> NDArray[Number]:
    """Read the array in a file. Arrays of objects are refused, because NumPy would unpickle them."""
    array: NDArray[Number] = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype != kind:
        raise ValueError(f"{path.name} does not contain an array of {kind.__name__}")
    return array


def _spread(best: NDArray[np.float32], columns: NDArray[np.int32], classes: int) -> NDArray[np.float32]:
    """``(N, C)`` log-probabilities from the best K. The other labels share the remaining probability evenly. Each of them gets
    less than the smallest of the K.
    """
    left = np.maximum(1 - np.exp(best, dtype=np.float64).sum(axis=1, keepdims=True), np.finfo(np.float32).eps)
    share = np.log(left / (classes - best.shape[1])).astype(np.float32)
    whole = np.repeat(np.minimum(share, np.nextafter(best[:, -1:], np.float32(-np.inf))), classes, axis=1)
    np.put_along_axis(whole, columns, best, axis=1)
    return whole


def record_of(content: Content, scores: Scores) -> Record:
    """The record of N lines.

    Args:
        content: the content of the N lines.
        scores: scores of the N images.
    """
    return Record(
        scores=scores,
        readable=content.readable,
        names=tuple(content.names),
        truths=content.truths,
        stages=tuple(
            _judged(said, judge, len(content.readable), content.column)
            for judge, said in zip(content.manifest.stages, content.said, strict=True)
        ),
        predicted=content.predicted,
        probabilities=content.probabilities,
        decided_by=tuple(content.decided_by),
        digests=tuple(content.digests),
        info=content.manifest,
        about=tuple(content.about) if content.manifest.columns.told else (),
    )


def _judged(said: Sequence[tuple[int, WholeVerdict, Asked | None]], judge: str, size: int, column: Mapping[str, int]) -> Judged:
    """The answers of one stage's judge about N images."""
    longest = max((len(asked.candidates) for _, _, asked in said if asked), default=0)
    judged = Judged(
        judge=judge,
        asked=np.zeros(size, dtype=bool),
        outcomes=("",) * size,
        answers=np.full(size, NOBODY, dtype=np.int64),
        candidates=np.full((size, longest), NOBODY, dtype=np.int64),
        rationales=("",) * size,
        dollars=np.zeros(size),
        seconds=np.zeros(size),
        input_tokens=np.zeros(size, dtype=np.int64),
        output_tokens=np.zeros(size, dtype=np.int64),
        paid=np.zeros(size),
        none_offered=any(asked.offer_none for _, _, asked in said if asked),
        probabilities=np.full((size, longest), np.nan),
    )
    outcomes, rationales, probabilities = [*judged.outcomes], [*judged.rationales], judged.probabilities
    for image, verdict, asked in said:
        outcomes[image] = verdict.outcome
        rationales[image] = valid_text(verdict.rationale or verdict.text)
        judged.asked[image] = verdict.outcome != "skipped"
        if verdict.label is not None:
            judged.answers[image] = column[verdict.label]
        names = asked.candidates if asked else []
        judged.candidates[image, : len(names)] = [column[name] for name in names]
        if verdict.probabilities is not None and probabilities is not None:
            probabilities[image, : len(names)] = [verdict.probabilities.get(name, 0.0) for name in names]
        usage = verdict.usage
        judged.dollars[image] = usage.dollars + usage.saved_dollars
        judged.paid[image] = usage.dollars
        judged.seconds[image] = usage.seconds
        judged.input_tokens[image], judged.output_tokens[image] = usage.input_tokens, usage.output_tokens
    return replace(judged, outcomes=tuple(outcomes), rationales=tuple(rationales))
