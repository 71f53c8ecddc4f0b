"""Calibration without labels: the judge's own answers on a sample, the judge taken for an annotator who errs.

Expectation and maximisation in turns (Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
algorithm", 1979; with a classifier as here, Raykar et al., "Learning from crowds", JMLR 2010): how likely each label is to be
the truth of each image, given scorer and judge; then the scorer's and the judge's parameters that fit best to that. What is
particular to classes is held back by stronger priors than where truths are known: both opinions can agree on an error. A judge
who is less able and follows the scorer more gives the same answers, so how much it follows is not fitted at all, and its ability
does not go far. The turns end before they have converged: further ones only move responsibilities towards whom the model believes
already.
"""

import numpy as np
from numpy.typing import NDArray

from cascadevlm.decision.judge_fit import JudgeFitting
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration, Shape, fit_shapes

ROUNDS = 10
CONVERGED = 0.01
"""Mean change of a responsibility in a round below which it is over."""

SHAPE = Shape(scale=1.0, bias=1.0)
"""Of the scorer's calibration."""

JUDGE_PRECISION = 100.0
"""Of what is particular to a class or a position in the judge's model."""

HELD = {"ability": 3.0, "following": 1e6}
"""Precisions of the judge's ability, and of how much it follows the scorer, which stays what it is taken to be beforehand."""


def fit_without_labels(log_probs: NDArray[np.floating], answers: Answers) -> tuple[ScorerCalibration, JudgeModel]:
    """Calibration of the scorer and model of the judge, from N x C log-probabilities and N answers."""
    calibration = _at_least_as_sure(log_probs, answers)
    model = JudgeModel.prior(log_probs.shape[1], answers.candidates.shape[1])
    before: Floats = np.zeros(log_probs.shape)
    for _ in range(ROUNDS):
        responsibilities = np.exp(model.posterior(calibration(log_probs), answers))
        if np.abs(responsibilities - before).sum(axis=1).mean() < CONVERGED:
            break
        before = responsibilities
        (calibration,) = fit_shapes(log_probs, responsibilities, [SHAPE])
        fitting = JudgeFitting(calibration(log_probs), responsibilities, answers)
        model = fitting.model(fitting.fit(fitting.start(), JUDGE_PRECISION, held=HELD))
    return calibration, model


def _at_least_as_sure(log_probs: NDArray[np.floating], answers: Answers) -> ScorerCalibration:
    """Where to begin: the temperature by which the scorer foretells the judge best, if that makes it surer."""
    classes, answered = log_probs.shape[1], answers.answers >= 0
    (sharpened,) = fit_shapes(log_probs[answered], np.eye(classes)[answers.answers[answered]], [Shape()])
    return sharpened if sharpened.scale > 1 else ScorerCalibration.identity(classes)
