"""Making an adapter from the folder of a run: what its judge said teaches the scorer."""

from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.config.config import Config
from cascadevlm.decision.adapting import AT_ONCE, NEAR_DUPLICATE, embeddings_of, linear_adapter
from cascadevlm.decision.calibration import Calibration, read_calibration
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers, Bools
from cascadevlm.decision.means import Sums
from cascadevlm.decision.scorer_calibration import ScorerCalibration
from cascadevlm.decision.teaching import UNJUDGED, Labelled, Taught
from cascadevlm.evaluation.adapting import Adapted, measured
from cascadevlm.runs.corrections import read_corrections
from cascadevlm.runs.lines import JudgedLine, read_lines
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.predictions import predictions_of, table_of
from cascadevlm.runs.run_folder import PREDICTIONS
from cascadevlm.runs.scored_first import SCORED, ScoredImages
from cascadevlm.scorers.adapters import Made

ROUNDS = 2
"""Of expectation and maximisation. Further rounds only confirm what is believed already."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the judge of a run said about N images that could be read. Each image file counts once.

    Attributes:
        images: the N images; only their names if there are ``scores``.
        answers: of N images; `NOBODY` without an answer, or where the judge was not asked.
        heard: ``(N,)``, whether the judge said something.
        truths: ``(N,)`` columns of the labels that people gave; `NOBODY` for other images. Images that show none of the labels,
            as people say, are left out.
        labels: the label set of the run.
        config: the configuration of the run.
        calibration: the calibration of the run; None if there was none.
        scores: the scores of the N images in the folder of the run; None if there are none of one scorer without calibration and
            adapter.
    """

    images: list[ImageSource]
    answers: Answers
    heard: Bools
    truths: Columns
    labels: LabelSet
    config: Config
    calibration: Calibration | None
    scores: Scores | None = None

    def rows(self, index: Bools) -> "Said":
        """The same for some of the images."""
        images = [self.images[row] for row in np.flatnonzero(index)]
        return replace(
            self,
            images=images,
            answers=self.answers.rows(index),
            heard=self.heard[index],
            truths=self.truths[index],
            scores=self.scores and self.scores.rows(index),
        )


def read_said(folder: Path) -> Said:
    """What the judge of the run in a folder said.

    Raises:
        DataError: if the folder holds no predictions, a line is damaged, or the run had several stages.
        ConfigError: if the calibration of the run cannot be read, or was made with another judge.
    """
    manifest = Manifest.read(folder)
    config, labels = Config.parse(manifest.config, name=str(folder)), LabelSet(tuple(manifest.labels))
    if len(config.stage) > 1:
        raise DataError(
            f"The run in {str(folder)!r} has {len(config.stage)} stages; an adapter can be made from a run with one stage.",
            hint="Give labelled images, or images without labels: --unlabelled.",
        )
    calibration = read_calibration(config.calibration) if config.calibration else None
    if calibration is not None and config.stage:
        calibration.judge_of(0, config.stage[0].model_dump(mode="json"))
    kept = _kept_scores(folder, labels) if (folder / SCORED).exists() and isinstance(config.scorer.use, str) else None
    predictions = predictions_of(folder, table_of(manifest.inputs, manifest.columns) if kept is None else None)
    lines: list[JudgedLine] = []
    images: list[ImageSource] = []
    numbers: list[int] = []
    truths: list[int] = []
    seen, corrections = set(), read_corrections(folder).counting
    judged = read_lines(folder / PREDICTIONS, JudgedLine, predictions.end)
    for (number, line), (_, _, image) in zip(judged, predictions.with_images(), strict=True):
        corrected, digest = corrections.get(line.key), line.digest or line.content
        outside = corrected is not None and corrected.label is None
        if line.candidates and not outside and (not digest or digest not in seen):
            seen.add(digest)
            truths.append(labels.columns[corrected.label] if corrected and corrected.label is not None else NOBODY)
            lines.append(line)
            images.append(image)
            numbers.append(number - 1)
    heard = np.array([line.answered for line in lines], dtype=bool)
    return Said(
        images=images,
        answers=_answers(lines, labels, none_offered=bool(config.stage) and config.stage[0].offer_none),
        heard=heard,
        truths=np.array(truths, dtype=np.int64),
        labels=labels,
        config=config,
        calibration=calibration,
        scores=None if kept is None else kept.some(np.array(numbers, dtype=np.intp)),
    )


def _kept_scores(folder: Path, labels: LabelSet) -> ScoredImages | None:
    """The scores of a run that scored its images before it decided; None if they contain a calibration or an adapter."""
    kept = ScoredImages.read(folder, labels)
    usable = kept.embeddings is not None and not any(part in kept.fingerprint for part in ("|adapter=", "|calibrated="))
    return kept if usable else None


def _answers(lines: list[JudgedLine], labels: LabelSet, *, none_offered: bool) -> Answers:
    longest = max((len(line.candidates) for line in lines), default=0)
    candidates = np.full((len(lines), longest), NOBODY, dtype=np.int64)
    answers = np.full(len(lines), NOBODY, dtype=np.int64)
    probabilities = np.full((len(lines), longest), np.nan)
    for row, line in enumerate(lines):
        names, said = [each.label for each in line.candidates], line.verdict
        candidates[row, : len(names)] = [labels.columns[name] for name in names]
        if said is None or not line.answered:
            continue
        answers[row] = NONE_CHOSEN if said.label is None else labels.columns[said.label]
        if said.probabilities is not None:
            probabilities[row, : len(names)] = [said.probabilities.get(name, 0.0) for name in names]
    return Answers(candidates=candidates, answers=answers, none_offered=none_offered, probabilities=probabilities)


def adapt_to_run(scores: Scores, said: Said) -> Adapted:
    """Make an adapter from what is believed of the images after the judge's answers, and measure it.

    A label that a person gave is certain.

    With a calibration that holds labelled images, these images teach, too. They measure the gain: what is learned for a labelled
    image is learned without its label. Images of the run that are near-duplicates of labelled images are left out. Without such a
    calibration, the judge's answers are taken as truths, and nothing is measured.

    Args:
        scores: of the N images, with embeddings, from the scorer without an adapter and without a calibration.
        said: what the judge said about the same images in the same order.

    Raises:
        InputError: if the scores have no embeddings, or were made with an adapter.
        DataError: if there are too many labels times dimensions.
        ConfigError: if the calibration was made for another scorer, or has no labelled images.
    """
    x, calibration = embeddings_of(scores), said.calibration
    labelled = _start(scores, calibration)
    apart = np.ones(len(x), dtype=bool)
    if len(labelled.truths):
        calibrated = labelled.embeddings.astype(np.float32)
        for begin in range(0, len(x), AT_ONCE):
            apart[begin : begin + AT_ONCE] = (x[begin : begin + AT_ONCE] @ calibrated.T).max(axis=1) < NEAR_DUPLICATE
    scores, said, x = scores.rows(apart), said.rows(apart), x[apart]
    start = taught = labelled.taught(labelled.nothing())
    for _ in range(ROUNDS):
        chunks = (slice(begin, begin + AT_ONCE) for begin in range(0, len(x), AT_ONCE))
        sums = (_sums(taught, scores.log_probs[rows], x[rows], said, rows) for rows in chunks)
        taught = labelled.taught(reduce(Sums.__add__, sums, labelled.nothing()))
    known = len(labelled.truths) + int((said.truths != NOBODY).sum())
    made = Made(method="means", images=len(x) + len(labelled.truths), labelled=known)
    adapter = linear_adapter(taught.linear(), scores.labels, scores.fingerprint, made)
    best = adapter.logits(x, scores.log_probs).argmax(axis=1)
    changed = float((best != scores.log_probs.argmax(axis=1)).mean())
    if not len(labelled.truths):
        return Adapted(adapter=adapter, measured=0, changed=changed)
    earlier = start.held_out if calibration is not None and calibration.teaches else labelled.fit.held_out
    before, after = ((each.argmax(axis=1) == labelled.truths).astype(np.float64) for each in (earlier, taught.held_out))
    return measured(adapter, before, after, changed)


def _start(scores: Scores, calibration: Calibration | None) -> Labelled:
    """The labelled images that learning starts from.

    Raises:
        ConfigError: if the calibration was made for another scorer, or has no labelled images.
    """
    assert scores.embeddings is not None
    if calibration is None:
        return Labelled.none(ScorerCalibration.identity(len(scores.labels)), scores.embeddings.shape[1])
    if calibration.support is None:
        raise ConfigError(
            "The calibration of the run holds no labelled images with embeddings.",
            hint="Calibrate again, on a labelled record of a scorer that gives embeddings.",
        )
    calibration.calibrated(scores.rows(slice(0, 1)))
    return calibration.support


def _sums(taught: Taught, log_probs: NDArray[np.float32], x: NDArray[np.float32], said: Said, rows: slice) -> Sums:
    """P sums of some images, with what is believed of them after the answers."""
    heard, answers = said.heard[rows], said.answers.rows(np.arange(rows.start, min(rows.stop, len(said.heard))))
    opinions = taught.opinions(log_probs, x)
    if said.calibration is None:
        beliefs = np.exp(opinions)
        answered = answers.answers >= 0
        beliefs[:, answered] = np.eye(opinions.shape[2])[answers.answers[answered]]
        heard = answered
    else:
        model = said.calibration.judges[0].model
        posteriors = np.stack([model.posterior(each, answers) for each in opinions])
        beliefs = np.exp(np.where(heard[:, None], posteriors, opinions))
    truths = said.truths[rows]
    corrected = truths != NOBODY
    beliefs[:, corrected] = np.eye(opinions.shape[2])[truths[corrected]]
    return Sums.of(x, beliefs, np.where(heard | corrected, 1.0, UNJUDGED))
