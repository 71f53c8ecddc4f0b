"""Calibrates without labels. The judge is treated as an annotator who makes errors.

The method is expectation maximisation (Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
algorithm", 1979; with a classifier, as here, Raykar et al., "Learning from crowds", JMLR 2010). The first step computes the
probability that each label is the truth, given the scorer and the judge. The second step fits the parameters of the scorer and
the judge to these probabilities. The two steps alternate.

Scorer and judge can agree on a wrong label. So the numbers per class have stronger priors than with labels. Two judges can give
the same answers: a less able judge that follows the scorer more, and a more able judge that follows the scorer less. So
``following`` is not fitted, and the ability stays near its prior. The rounds stop before they converge: more rounds only
increase the probabilities of labels that the model finds probable already.
"""

import numpy as np
from numpy.typing import NDArray

from cascadevlm.decision.judge_fit import JudgeFitting
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration, Shape, fit_shapes

ROUNDS = 10
"""Largest number of rounds."""

CONVERGED = 0.01
"""The rounds end when the responsibilities of an image change by less than this in total, averaged over the images."""

SHAPE = Shape(scale=1.0, bias=1.0)
"""The parts of the scorer's calibration that are fitted, with the precisions of their priors."""

JUDGE_PRECISION = 100.0
"""Precision of the prior of the numbers per class and per position in the judge's model."""

HELD = {"ability": 3.0, "following": 1e6}
"""Precisions of the priors of the ability and of ``following``, which in effect stays at its prior mean."""


def fit_without_labels(log_probs: NDArray[np.floating], answers: Answers) -> tuple[ScorerCalibration, JudgeModel]:
    """The scorer's calibration and the judge's model, from ``(N, C)`` log-probabilities of the scorer and N answers."""
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
    """The calibration to start with: the temperature that predicts the judge's answers best, if it raises the best probabilities.

    If it does not raise them, the start leaves the scores unchanged.
    """
    classes, answered = log_probs.shape[1], answers.answers >= 0
    (sharpened,) = fit_shapes(log_probs[answered], np.eye(classes)[answers.answers[answered]], [Shape()])
    return sharpened if sharpened.scale > 1 else ScorerCalibration.identity(classes)
