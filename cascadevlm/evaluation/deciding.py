"""Applies a calibration to a record: calibrated scores, and labels decided by scorer and judges together."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import TopK
from cascadevlm.decision.calibration import SETTINGS, Calibration, read_calibration
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers
from cascadevlm.evaluation.record import Fused, Judged, Record

BESIDE = "calibration.json"
"""Name of the calibration's file in the folder of a record."""


def calibration_beside(folder: Path) -> Calibration | None:
    """The calibration in the folder of a record; None if there is none.

    Raises:
        ConfigError: if the file is not a calibration.
    """
    path = folder / BESIDE
    return read_calibration(path) if path.exists() else None


def answers_of(judged: Judged) -> Answers:
    """The candidates and answers of a stage of a record, in the form that the model of a judge needs."""
    answers = np.where(np.array(judged.outcomes, dtype=str) == "none", NONE_CHOSEN, judged.answers)
    return Answers(
        candidates=judged.candidates,
        answers=answers,
        none_offered=judged.none_offered,
        probabilities=judged.probabilities,
    )


def heard(judged: Judged) -> NDArray[np.bool_]:
    """``(N,)`` booleans: the judge was asked, and the outcome is not an error and not a used-up budget."""
    return judged.asked & np.isin(judged.outcomes, ["answered", "none", "refused", "unparsed"])


def decided(record: Record, calibration: Calibration) -> Record:
    """The record with calibrated scores, and with labels decided by scorer and judges together.

    Measures of this record use calibrated probabilities, and gain policies can be applied to it. The candidates are the
    recorded candidates, although a calibrated scorer might have chosen others. An image without a question gets the most
    probable labels as candidates, as many as in the longest list.

    Raises:
        ConfigError: if the calibration was made for another scorer, label set, number of stages, judge or prompt.
    """
    if len(record.stages) != len(calibration.judges):
        raise ConfigError(
            f"The calibration has {len(calibration.judges)} judges, and the record has {len(record.stages)}.",
            hint="Use the calibration of this cascade.",
        )
    scores = calibration.calibrated(record.scores)
    before = belief = scores.log_probs.astype(np.float64)
    for number, (judge, judged) in enumerate(zip(calibration.judges, record.stages, strict=True)):
        if settings := settings_of(record, number, SETTINGS):
            calibration.judge_of(number, settings)
        before, known = belief, heard(judged)
        belief = np.where(known[:, None], judge.model.posterior(before, answers_of(judged)), before)
    last, answers = calibration.judges[-1], answers_of(record.judged)
    labels, probabilities = belief.argmax(axis=1), np.exp(belief.max(axis=1))
    word_final = calibration.fusion == "judge"
    if word_final:
        answered = record.judged.answers != NOBODY
        labels = np.where(answered, record.judged.answers, scores.log_probs.argmax(axis=1))
        own = np.full(answers.candidates.shape, np.nan) if answers.probabilities is None else answers.probabilities
        of_answer = np.where(answers.candidates == answers.answers[:, None], own, 0.0).sum(axis=1)
        probabilities = np.where(answered, of_answer, scores.probabilities.max(axis=1))
    candidates = _shown_if_asked(answers.candidates, replace(scores, log_probs=before.astype(np.float32)))
    fused = Fused(
        labels=np.where(record.readable, labels, NOBODY),
        probabilities=probabilities,
        gain=last.model.gain(before, candidates, none_offered=answers.none_offered, word_final=word_final),
        word_final=word_final,
    )
    return replace(record, scores=scores, fused=fused)


def held_out(record: Record, calibration: Calibration) -> Record:
    """The part of the record with the images that the calibration was not fitted on.

    Raises:
        DataError: if the calibration was fitted on all images of the record.
    """
    rows = np.flatnonzero(~np.isin(images_of(record), calibration.fitted_on))
    if not len(rows):
        raise DataError("The calibration was fitted on every image of the record.", hint="Use a record of other images.")
    return record.take(rows)


def images_of(record: Record) -> tuple[str, ...]:
    """Identifiers of the images of a record: their digests, or their names in a record made of arrays."""
    return record.digests or record.names


def settings_of(record: Record, stage: int, names: Collection[str]) -> dict[str, JsonValue]:
    """The named settings of a stage from the record's configuration; empty for a record made of arrays."""
    stages = record.info.config.get("stage") if record.info else None
    settings = stages[stage] if isinstance(stages, list) else None
    return {name: settings[name] for name in names if name in settings} if isinstance(settings, dict) else {}


def _shown_if_asked(shown: Columns, scores: Scores) -> Columns:
    """``(N, K)`` columns of the candidates that the judge saw. Images without candidates get the most probable labels."""
    if not shown.shape[1]:
        return TopK().columns(scores)
    likeliest = TopK(k=shown.shape[1]).columns(scores)
    return np.where((shown == NOBODY).all(axis=1, keepdims=True), likeliest, shown)
