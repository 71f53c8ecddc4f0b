"""Few labelled images, and images that a judge answered beside them."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.decision import made_up
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.config.config import Config
from cascadevlm.decision.few_labels import fit_few_labels, held_out_gain
from cascadevlm.evaluation.adapting_to_runs import Said
from cascadevlm.evaluation.calibrating.calibrate import calibrate
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.calibrating.unlabelled import Unlabelled
from cascadevlm.evaluation.deciding import answers_of, decided, heard
from cascadevlm.evaluation.record import Record
from tests.evaluation.calibrating.test_support import embedded

LABELS_KNOWN = np.arange(25)


def beside(run: Record) -> Unlabelled:
    """A run that shows fewer candidates than the record."""
    answers = answers_of(run.judged)
    shorter = replace(answers, candidates=answers.candidates[:, :3])
    return Unlabelled(scores=run.scores, answers=replace(shorter, answers=_among(shorter.candidates, answers.answers)))


def _among(candidates: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return np.where((candidates == answers[:, None]).any(axis=1), answers, candidates[:, 0])


def likelihood(some: Record, run: Unlabelled | None, rest: Record) -> float:
    """Mean log-likelihood of the truth before any question, on other images."""
    after = decided(rest, fit_calibration(some, Recipe(), run))
    return float(after.scores.log_probs[np.arange(len(rest)), rest.truths].mean())


def test_a_calibration_with_few_labels_is_better_with_images_beside_it() -> None:
    gained = []
    for seed in range(3):
        made = made_up(seed, 600, 6, 4)
        some, run, rest = made.take(LABELS_KNOWN), made.take(np.arange(25, 250)), made.take(np.arange(250, 600))
        gained.append(likelihood(some, beside(run), rest) - likelihood(some, None, rest))
    assert np.mean(gained) > 0.02
    assert np.median(gained) > 0


def test_what_is_fitted_beside_labels_is_told_of_the_labelled_images() -> None:
    made = made_up(1, 300, 6, 4)
    some, run = made.take(LABELS_KNOWN), beside(made.take(np.arange(25, 300)))
    calibration = fit_calibration(some, Recipe(), run)
    few = fit_few_labels(
        made.scores.log_probs,
        np.where(np.arange(300) < 25, made.truths, NOBODY),
        run._joined(some),
    )
    assert calibration.images == 25
    np.testing.assert_array_equal(calibration.scorer.bias, few.scorer.calibration.bias)
    (judge,) = calibration.judges
    assert judge.model.ability == few.model.ability
    assert judge.gain == held_out_gain(few.scorer.held_out[:25], few.after[:25], some.truths)


def test_images_stand_beside_a_support_set_too() -> None:
    made = embedded(made_up(1, 500, 6, 4))
    run = beside(made.take(np.arange(100, 300)))
    calibration, plain = (fit_calibration(made.take(np.arange(100)), Recipe(), each) for each in (run, None))
    assert calibration.teaches
    assert calibration.calibrated_fingerprint == plain.calibrated_fingerprint
    assert calibration.judges[0].model.ability != plain.judges[0].model.ability


def test_what_cannot_stand_beside_a_record_is_refused() -> None:
    made = made_up(1, 300, 6, 4)
    some, run = made.take(LABELS_KNOWN), made.take(np.arange(25, 300))
    config = Config.parse({"scorer": {"use": "fake:fake"}})
    said = Said(
        images=[],
        answers=answers_of(run.judged),
        heard=heard(run.judged),
        truths=np.full(len(run), NOBODY),
        labels=run.labels,
        config=config,
        calibration=None,
    )
    assert len(Unlabelled.of(some, run.scores, said).scores) == 275
    with pytest.raises(DataError, match="another scorer or other labels"):
        Unlabelled.of(some, replace(run.scores, fingerprint="another"), said)
    with pytest.raises(DataError, match="answered none of its images"):
        Unlabelled.of(some, run.scores, replace(said, heard=np.zeros(275, dtype=bool)))
    with pytest.raises(DataError, match="this record has 2"):
        Unlabelled.of(replace(some, stages=some.stages * 2), run.scores, said)
    with pytest.raises(InputError, match="uses the record alone"):
        calibrate(made, Recipe(size=50, labelled=False), beside(run))
