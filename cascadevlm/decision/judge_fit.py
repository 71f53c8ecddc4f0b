"""Fits the model of a judge to its answers. The result has the highest posterior probability.

Every number has a normal prior. Cross-validated log-likelihood chooses the strength of the prior of classes and positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_expit

from cascadevlm.decision.judge_model import Answers, JudgeModel, among, at, weights_of
from cascadevlm.decision.scorer_calibration import FOLDS, Floats

PRECISIONS = (100.0, 10.0, 3.0, 1.0)
"""Precisions of the normal priors, with mean 0, of the numbers per class and per position, in nats."""

CONSTANTS = {
    "ability": 0.1,
    "following": 4.0,
    "none_bias": 0.1,
    "none_ability": 0.1,
    "silence": 0.1,
    "silence_ability": 1.0,
}
"""Precisions of the normal priors of the other numbers. The means of these priors come from `JudgeModel.prior`.

0.1 is a standard deviation of about 3 nats. 4 is a standard deviation of 0.5, so that ``following`` stays near 0 to 1. 1 is a
standard deviation of 1 nat: a missing answer changes beliefs only if many answers show that it should.
"""

WORD_PRECISION = 1.0
"""Precision of the normal prior, with mean 0, of the logarithm of the weight of a judge's own probabilities.

With a weight of 1, their ratios are used as likelihood ratios."""

LOG_WEIGHTS = (-4.0, 4.0)
"""Lowest and highest logarithm of the weight that are tried."""

ITERATIONS = 40
"""Largest number of iterations of each fit."""

FARTHEST, FOLLOWING_RANGE = 20.0, (-1.0, 2.0)
"""Limits of the values that are tried, in nats. Without them, wide steps of the optimiser would overflow."""


def fit_judge(log_probs: Floats, responsibilities: Floats, answers: Answers) -> tuple[JudgeModel, Floats]:
    """The model with the highest posterior probability. Cross-validated log-likelihood chooses the strength of the prior.

    The judge's own probabilities get a weight only if they are better than its answers: the mean cross-validated log-likelihood
    of the truth must be higher by more than one standard error.

    Args:
        log_probs: ``(N, C)`` held-out log-probabilities of the scorer, the second result of `fit_scorer`. With log-probabilities
            fitted to these labels, the judge would seem to follow a scorer that is nearly always right.
        responsibilities: ``(N, C)`` probabilities that each label is the truth; rows sum to 1, one-hot for known truths.
        answers: the N candidate lists and answers.

    Returns:
        The model, and ``(N, C)`` held-out log-probabilities after the answers: each image uses a model fitted to the other folds.
    """
    fold_of, scores = folds(len(answers)), np.zeros(len(PRECISIONS))
    models: list[list[JudgeModel]] = []
    for fold in range(FOLDS):
        inside = fold_of == fold
        fitting = JudgeFitting(log_probs[~inside], responsibilities[~inside], answers.rows(~inside))
        held_out = JudgeFitting(log_probs[inside], responsibilities[inside], answers.rows(inside))
        values, found = fitting.start(), []
        for number, precision in enumerate(PRECISIONS):
            values = fitting.fit(values, precision)
            scores[number] += held_out.log_likelihood(values)
            found.append(fitting.model(values))
        models.append(found)
    best = int(scores.argmax())
    whole = JudgeFitting(log_probs, responsibilities, answers)
    model = whole.model(whole.fit(whole.start(), PRECISIONS[best]))
    parts = [(np.flatnonzero(fold_of == fold), found[best]) for fold, found in enumerate(models)]
    if answers.probabilities is not None:
        weight = _probability_weight(log_probs, responsibilities, answers, parts)
        model = replace(model, probability_weight=weight)
        parts = [(rows, replace(part, probability_weight=weight)) for rows, part in parts]
    after = np.empty_like(log_probs)
    for rows, part in parts:
        after[rows] = part.posterior(log_probs[rows], answers.rows(rows))
    return model, after


def folds(images: int) -> NDArray[np.int64]:
    """``(N,)`` numbers of the cross-validation folds of the images."""
    return np.random.default_rng(1).permutation(images) % FOLDS


def _probability_weight(
    log_probs: Floats, responsibilities: Floats, answers: Answers, parts: Sequence[tuple[NDArray[np.intp], JudgeModel]]
) -> float:
    """The weight of a judge's own probabilities among the candidates.

    Args:
        parts: for each fold, its rows and a model that was fitted without these rows.
    """
    evidence, answered = np.full(answers.candidates.shape, np.nan), np.zeros(answers.candidates.shape)
    for rows, part in parts:
        some = answers.rows(rows)
        evidence[rows] = part.evidence(log_probs[rows], some)
        answered[rows] = at(part.posterior(log_probs[rows], some), some.candidates)
    known = ~np.isnan(evidence)
    before, truth = at(log_probs, answers.candidates), np.where(known, at(responsibilities, answers.candidates), 0.0)
    by_answer = np.where(known, among(np.where(known, answered, np.nan)), 0.0)

    def gained(weight: float) -> Floats:
        """``(N,)`` log-probabilities of the truth with this weight, minus the log-probabilities by the answer, in nats."""
        inside = np.where(known, among(before + weight * evidence), 0.0)
        gains: Floats = (truth * (inside - by_answer)).sum(axis=1)
        return gains

    def objective(log_weight: float) -> float:
        return float(WORD_PRECISION * log_weight**2 / 2 - gained(np.exp(log_weight)).sum())

    weight = float(np.exp(minimize_scalar(objective, bounds=LOG_WEIGHTS, method="bounded").x))
    gains = gained(weight)
    return weight if gains.sum() > gains.std() * np.sqrt(len(gains)) else 0.0


class JudgeFitting:
    """The likelihood of answers as a function of one vector.

    The vector contains the numbers of `CONSTANTS`, C abilities, C class biases and K position biases, in this order.
    """

    def __init__(self, log_probs: Floats, responsibilities: Floats, answers: Answers) -> None:
        self.answers = answers
        self.classes, self.width = log_probs.shape[1], answers.candidates.shape[1]
        self.log_probs = at(log_probs, answers.candidates)
        self.truth = answers.spread(responsibilities)
        self.slots, self.rows = answers.slots, np.arange(len(answers))

    def start(self) -> Floats:
        """The vector of an unknown judge, the mean of the prior."""
        prior = JudgeModel.prior(self.classes)
        constants = [getattr(prior, name) for name in CONSTANTS]
        return np.concatenate([constants, prior.abilities, prior.class_bias, prior.positions(self.width)])

    def model(self, values: Floats) -> JudgeModel:
        constants, abilities, bias, positions = np.split(values, np.cumsum([len(CONSTANTS), self.classes, self.classes]))
        ability, following, none_bias, none_ability, silence, silence_ability = constants.tolist()
        return JudgeModel(
            ability=ability,
            following=following,
            none_bias=none_bias,
            none_ability=none_ability,
            silence=silence,
            silence_ability=silence_ability,
            abilities=abilities,
            class_bias=bias,
            position_bias=positions,
        )

    def fit(self, values: Floats, precision: float, *, held: Mapping[str, float] | None = None) -> Floats:
        """The vector with the highest posterior probability.

        Args:
            values: the vector at which the search starts.
            precision: precision of the prior of the numbers per class and per position.
            held: precisions that replace some of `CONSTANTS`.
        """
        constants = [*(CONSTANTS | dict(held or {})).values()]
        precisions = np.concatenate([constants, np.full(2 * self.classes + self.width, precision)])
        start = self.start()

        def objective(values: Floats) -> tuple[float, Floats]:
            likelihood, gradient = self._likelihood(values)
            away = values - start
            return float((precisions * away) @ away / 2 - likelihood), precisions * away - gradient

        bounds = [FOLLOWING_RANGE if name == "following" else (-FARTHEST, FARTHEST) for name in CONSTANTS]
        bounds += [(-FARTHEST, FARTHEST)] * (len(values) - len(bounds))
        found: Floats = minimize(objective, values, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": ITERATIONS}).x
        return found

    def log_likelihood(self, values: Floats) -> float:
        return self._likelihood(values)[0]

    def _likelihood(self, values: Floats) -> tuple[float, Floats]:
        """The expected log-likelihood of the answers over the responsibilities of the truth, and its gradient."""
        model, answers, width = self.model(values), self.answers, self.width
        weights = weights_of(model, self.log_probs, answers)
        columns, chosen = np.maximum(answers.candidates, 0), self.slots < width
        none, silent = self.slots == width, self.slots > width
        truth = np.where(silent[:, np.newaxis], 0.0, self.truth)  # only images with an answer
        right = np.zeros_like(truth)  # responsibilities of the chosen options
        right[self.rows[~silent], self.slots[~silent]] = truth[self.rows[~silent], self.slots[~silent]]
        with np.errstate(divide="ignore"):
            utilities = np.log(weights.shown)
        likelihood = (
            utilities[self.rows[chosen], self.slots[chosen]].sum()
            + none.sum() * model.none_bias
            + (right[:, :width] * weights.abilities).sum()
            + right[:, width].sum() * model.none_ability
            - (truth * np.log(weights.totals)).sum()
            + (self.truth * np.where(silent[:, np.newaxis], log_expit(weights.silence), log_expit(-weights.silence))).sum()
        )
        per_weight = (truth / weights.totals).sum(axis=1, keepdims=True)
        if_true = truth[:, :width] * weights.shown * np.exp(weights.abilities) / weights.totals[:, :width]
        if_none = truth[:, width:] * weights.none * np.exp(model.none_ability) / weights.totals[:, width:]
        of_ability = np.where(answers.shown, right[:, :width] - if_true, 0.0)
        of_utility = -weights.shown * per_weight + if_true * np.expm1(-weights.abilities)
        of_utility[self.rows[chosen], self.slots[chosen]] += 1.0
        of_utility = np.where(answers.shown, of_utility, 0.0)
        of_silence = (self.truth * (silent[:, np.newaxis] - weights.silent)).sum(axis=0)
        gradient = [
            [of_ability.sum(), (of_utility * self.log_probs).sum()],
            [none.sum() - weights.none * per_weight.sum() + (if_none * np.expm1(-model.none_ability)).sum()],
            [right[:, width].sum() - if_none.sum(), of_silence.sum(), of_silence[-1]],
            np.bincount(columns.ravel(), of_ability.ravel(), self.classes),
            np.bincount(columns.ravel(), of_utility.ravel(), self.classes),
            of_utility.sum(axis=0),
        ]
        return float(likelihood), np.concatenate(gradient)
