"""The plain way to weigh two opinions: one number by which the judge's counts beside the scorer's.

A logarithmic opinion pool (Genest and Zidek, "Combining probability distributions: a critique and an annotated bibliography",
Statistical Science, 1986): the calibrated scorer's probabilities, times the judge's to the power of the weight. It knows nothing
of classes and positions that the judge favours, and of what it has in common with the scorer only what one number can tell.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cascadevlm.decision.judge_fit import folds
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers
from cascadevlm.decision.scorer_calibration import FOLDS, Floats

MOST = 5.0
"""The greatest weight looked for."""

PRECISION = 1.0
"""Of the weight's normal prior around 1, which holds where the two err independently."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What a judge's opinion is and how much it counts.

    Its opinion is its own probabilities, where it gives any, else certainty of its answer; or, after "none of these", of every
    label that was not shown. As it is not always right, that counts ``accuracy``, and every label gets an even share of the rest:
    had it not been on the list, the judge would have chosen one of the candidates all the same.

    Attributes:
        accuracy: how often it was right where it gave an answer.
        weight: 0 leaves the scorer's probabilities as they are; at 1 both count alike.
        own: whether its own probabilities count at all: not, where its answers said more.
    """

    accuracy: float
    weight: float
    own: bool = True

    def posterior(self, log_probs: Floats, answers: Answers) -> Floats:
        """N x C log-probabilities after the answers.

        Args:
            log_probs: N x C, before: the scorer's, calibrated.
        """
        after: Floats = log_softmax(log_probs + self.weight * self.opinions(answers, log_probs.shape[1]), axis=1)
        return after

    def opinions(self, answers: Answers, classes: int) -> Floats:
        """N x C: logarithms of how far the judge speaks for each label; all alike where it says nothing."""
        rows = np.arange(len(answers))[:, None]
        said = np.zeros((len(answers), classes + 1))  # the last column takes what is beyond the last candidate
        chose_none = answers.answers == NONE_CHOSEN
        said[chose_none] = 1
        said[rows, answers.candidates] = answers.candidates == answers.answers[:, None]
        if self.own and answers.probabilities is not None:
            given = ~np.isnan(answers.probabilities).all(axis=1) & ~chose_none
            said[rows[given], answers.candidates[given]] = np.nan_to_num(answers.probabilities[given])
        share = 1 / np.maximum(answers.shown.sum(axis=1, keepdims=True), 1)
        opinions: Floats = np.log(self.accuracy * said[:, :-1] + (1 - self.accuracy) * share)
        return opinions


def fit_pool(log_probs: Floats, responsibilities: Floats, answers: Answers) -> tuple[Pool, Floats]:
    """The weight of the highest log-likelihood of the truth.

    Args:
        log_probs: N x C, the scorer's, as `fit_judge` takes them.
        responsibilities: N x C.

    Returns:
        the pool, and the N x C log-probabilities after the answers as those fitted on the other folds give them.
    """
    fold_of, after = folds(len(answers)), np.empty_like(log_probs)
    for fold in range(FOLDS):
        inside = fold_of == fold
        pool = _fit(log_probs[~inside], responsibilities[~inside], answers.rows(~inside))
        after[inside] = pool.posterior(log_probs[inside], answers.rows(inside))
    return _fit(log_probs, responsibilities, answers), after


def _fit(log_probs: Floats, responsibilities: Floats, answers: Answers) -> Pool:
    answered = answers.answers >= 0
    right = responsibilities[answered, answers.answers[answered]].sum()
    accuracy = float((right + 1) / (answered.sum() + 2))  # Laplace's rule of succession
    fits = []
    for own in (False, True) if answers.probabilities is not None else (False,):
        opinions = Pool(accuracy=accuracy, weight=1.0, own=own).opinions(answers, log_probs.shape[1])

        def objective(weight: float, opinions: Floats = opinions) -> float:
            after = log_softmax(log_probs + weight * opinions, axis=1)
            return float(PRECISION * (weight - 1) ** 2 / 2 - (responsibilities * after).sum())

        found = minimize_scalar(objective, bounds=(0.0, MOST), method="bounded")
        fits.append((float(found.fun), Pool(accuracy=accuracy, weight=float(found.x), own=own)))
    return min(fits, key=lambda fit: fit[0])[1]
