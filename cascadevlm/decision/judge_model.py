"""A model of what a judge says, given the truth and what the scorer thinks: what its answer is worth, and what asking is worth.

Among the options shown, the judge is taken to choose by a conditional logit (McFadden, "Conditional logit analysis of
qualitative choice behavior", 1974). An option's utility is

- for a candidate: how much the judge follows the scorer, times the scorer's calibrated log-probability of it; a bias of the
  class; a bias of the position it is shown at; and, if it is the truth, the judge's ability, with a deviation for the class;
- for "none of these", where it is offered: a constant, and more where the truth is not among the candidates;
- for saying nothing that counts (a refusal, an unreadable answer): a constant.

So a judge errs towards what the scorer finds likely too, and more often on images that are hard for both, which a table of
confusions cannot say; there are 2 C + K + 5 numbers rather than C x C, every one shrunk by a normal prior; and what the model
says of longer or shorter lists follows from the same numbers. Its strength for classes and positions is chosen by
cross-validated log-likelihood.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from cascadevlm.decision.scorer_calibration import FOLDS, Floats, StoredFloats
from cascadevlm.record import NOBODY, Columns

NONE_CHOSEN = -2
"""In an array of answers: "none of these"."""

PRECISIONS = (100.0, 10.0, 3.0, 1.0)
"""Of the normal prior of what is particular to a class or a position, in nats."""

ABILITY, ABILITY_PRECISION = 3.0, 0.1
"""Prior of the ability: right in 8 to 9 of 10 cases where two or three candidates are plausible, give or take 3 nats."""

FOLLOWING, FOLLOWING_PRECISION = 0.5, 4.0
"""Prior of following the scorer: between not at all and as the scorer itself would choose, give or take 0.5."""

NONE_BIAS, NONE_ABILITY, SILENCE, CONSTANT_PRECISION = -1.0, 2.0, -4.0, 0.1
"""Priors of the constants of "none of these" and of silence, give or take 3 nats."""

ITERATIONS = 40
"""The most of each fit."""

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a judge was shown and said of N images.

    Attributes:
        candidates: N x K columns of the score matrix in the order shown, `NOBODY` beyond the last.
        answers: N columns, each one of the candidates; `NONE_CHOSEN` or, for no answer, `NOBODY`.
        none_offered: whether "none of these" was an option.
    """

    candidates: Columns
    answers: Columns
    none_offered: bool

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, index: Bools | NDArray[np.intp]) -> "Answers":
        """Those of some of the images."""
        return Answers(candidates=self.candidates[index], answers=self.answers[index], none_offered=self.none_offered)

    @property
    def shown(self) -> Bools:
        """N x K: whether there is a candidate."""
        shown: Bools = self.candidates != NOBODY
        return shown

    @property
    def slots(self) -> Columns:
        """N: the position of the answer among the candidates; K for "none of these", K + 1 for no answer."""
        width = self.candidates.shape[1]
        special = np.where(self.answers == NONE_CHOSEN, width, width + 1)
        matches = self.candidates == self.answers[:, None]
        slots: Columns = np.where((self.answers >= 0) & matches.any(axis=1), matches.argmax(axis=1), special)
        return slots

    def spread(self, responsibilities: Floats) -> Floats:
        """N x (K + 1): of N x C responsibilities, those of the candidates, and the rest."""
        inside = np.where(self.shown, _at(responsibilities, self.candidates), 0.0)
        rest = np.maximum(1 - inside.sum(axis=1, keepdims=True), 0)
        return np.concatenate([inside, rest], axis=1)


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """How a judge chooses; utilities in nats.

    Attributes:
        ability: what the truth is chosen for.
        abilities: C deviations from it.
        following: how much of the scorer's log-probability counts.
        class_bias: C.
        position_bias: of the first, second, … position; 0 beyond those seen.
        none_bias: of "none of these".
        none_ability: what "none of these" gains where the truth is not among the candidates.
        silence: of no answer.
    """

    ability: float
    abilities: StoredFloats
    following: float
    class_bias: StoredFloats
    position_bias: StoredFloats
    none_bias: float = NONE_BIAS
    none_ability: float = NONE_ABILITY
    silence: float = SILENCE

    @classmethod
    def prior(cls, classes: int, positions: int = 0) -> "JudgeModel":
        """What is believed of a judge that nothing is known of."""
        return cls(
            ability=ABILITY,
            abilities=np.zeros(classes),
            following=FOLLOWING,
            class_bias=np.zeros(classes),
            position_bias=np.zeros(positions),
        )

    def log_likelihoods(self, log_probs: Floats, answers: Answers) -> Floats:
        """N x C: how likely each answer would be, were the column's label the truth, up to a constant of each image.

        Args:
            log_probs: N x C, the scorer's, calibrated.
        """
        weights = self._weights(log_probs, answers)
        width, slots, rows = answers.candidates.shape[1], answers.slots, np.arange(len(answers))
        inside = -np.log(weights.totals[:, :width])
        chosen = slots < width
        inside[rows[chosen], slots[chosen]] += weights.abilities[rows[chosen], slots[chosen]]
        found = -np.log(weights.totals[:, width:]) + np.where(slots == width, self.none_ability, 0.0)[:, None]
        found = np.repeat(found, log_probs.shape[1], axis=1)
        where = np.nonzero(answers.shown)
        found[where[0], answers.candidates[where]] = inside[where]
        return found

    def posterior(self, log_probs: Floats, answers: Answers) -> Floats:
        """N x C log-probabilities after the answers, by Bayes' rule.

        Args:
            log_probs: N x C, before: the scorer's, calibrated.
        """
        after: Floats = log_softmax(log_probs + self.log_likelihoods(log_probs, answers), axis=1)
        return after

    def gain(self, log_probs: Floats, candidates: Columns, *, none_offered: bool = False) -> Floats:
        """The expected gain in accuracy from asking: N numbers from 0 to 1.

        The expected probability of the best label after the answer, over all answers by how likely they are, less that of the
        best label now: the value of information of decision theory (Howard, "Information value theory", 1966) where being
        right is worth 1.

        Args:
            log_probs: N x C, the scorer's, calibrated.
            candidates: N x K columns, as they would be shown.
        """
        nobody = np.full(len(log_probs), NOBODY)
        answers = Answers(candidates=candidates, answers=nobody, none_offered=none_offered)
        weights, width = self._weights(log_probs, answers), candidates.shape[1]
        now = np.exp(log_probs)
        outside = now / weights.totals[:, width:]
        inside = np.where(answers.shown, _at(now, candidates) / weights.totals[:, :width], 0.0)
        where = np.nonzero(answers.shown)
        outside[where[0], candidates[where]] = 0.0
        best_outside = outside.max(axis=1, keepdims=True)
        ranked = np.sort(np.concatenate([np.zeros((len(now), 1)), inside], axis=1), axis=1)
        best_inside = ranked[:, -1:]
        best_other = np.where(inside == best_inside, ranked[:, -2:-1], best_inside)
        if_chosen = np.maximum(inside * np.exp(weights.abilities), np.maximum(best_other, best_outside))
        if_none = np.maximum(best_inside, best_outside * np.exp(self.none_ability))
        if_silent = np.maximum(best_inside, best_outside)
        after = (weights.shown * if_chosen).sum(axis=1) + (weights.none * if_none + np.exp(self.silence) * if_silent)[:, 0]
        gained: Floats = np.maximum(after - now.max(axis=1), 0.0)
        return gained

    def _weights(self, log_probs: Floats, answers: Answers) -> "_Weights":
        return _weights(self, _at(log_probs, answers.candidates), answers)

    def _positions(self, width: int) -> Floats:
        known = self.position_bias[:width]
        return np.concatenate([known, np.zeros(width - len(known))])


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Exponentials of utilities.

    Attributes:
        shown: N x K, of the candidates where they are not the truth; 0 where there is none.
        abilities: N x K nats that each would have more if it were.
        none: of "none of these" where the truth is among the candidates; 0 if it is not offered.
        totals: N x (K + 1), over all options, if the truth is each candidate or, last, none of them.
    """

    shown: Floats
    abilities: Floats
    none: float
    totals: Floats


def _weights(model: JudgeModel, log_probs: Floats, answers: Answers) -> _Weights:
    """Of N x K log-probabilities of the candidates."""
    columns = np.maximum(answers.candidates, 0)
    utilities = model.following * log_probs + model.class_bias[columns] + model._positions(columns.shape[1])
    shown = np.where(answers.shown, np.exp(utilities), 0.0)
    abilities = np.where(answers.shown, model.ability + model.abilities[columns], 0.0)
    none = float(np.exp(model.none_bias)) if answers.none_offered else 0.0
    base = shown.sum(axis=1, keepdims=True) + none + np.exp(model.silence)
    totals = np.concatenate([base + np.expm1(abilities) * shown, base + np.expm1(model.none_ability) * none], axis=1)
    return _Weights(shown=shown, abilities=abilities, none=none, totals=totals)


def fit_judge(log_probs: Floats, responsibilities: Floats, answers: Answers) -> JudgeModel:
    """The model of the highest posterior probability, the strength of its prior by cross-validated log-likelihood.

    Args:
        log_probs: N x C, the scorer's, calibrated without looking at these images' labels (the second of what `fit_scorer`
            returns): otherwise the judge seems to follow a scorer that is always right.
        responsibilities: N x C, rows sum to 1: one-hot where the truth is known.
    """
    fold_of = np.random.default_rng(1).permutation(len(answers)) % FOLDS
    scores = np.zeros(len(PRECISIONS))
    for fold in range(FOLDS):
        inside = fold_of == fold
        fitting = JudgeFitting(log_probs[~inside], responsibilities[~inside], answers.rows(~inside))
        held_out = JudgeFitting(log_probs[inside], responsibilities[inside], answers.rows(inside))
        values = fitting.start()
        for number, precision in enumerate(PRECISIONS):
            values = fitting.fit(values, precision)
            scores[number] += held_out.log_likelihood(values)
    whole = JudgeFitting(log_probs, responsibilities, answers)
    return whole.model(whole.fit(whole.start(), PRECISIONS[int(scores.argmax())]))


class JudgeFitting:
    """The likelihood of some answers, as a function of one vector: ability, following, the constants, then C abilities, C
    biases and K positions."""

    def __init__(self, log_probs: Floats, responsibilities: Floats, answers: Answers) -> None:
        self.answers = answers
        self.classes, self.width = log_probs.shape[1], answers.candidates.shape[1]
        self.log_probs = _at(log_probs, answers.candidates)
        self.truth = answers.spread(responsibilities)
        self.slots, self.rows = answers.slots, np.arange(len(answers))

    def start(self) -> Floats:
        particular = np.zeros(2 * self.classes + self.width)
        return np.concatenate([[ABILITY, FOLLOWING, NONE_BIAS, NONE_ABILITY, SILENCE], particular])

    def model(self, values: Floats) -> JudgeModel:
        constants, abilities, bias, positions = np.split(values, np.cumsum([5, self.classes, self.classes]))
        ability, following, none_bias, none_ability, silence = constants.tolist()
        return JudgeModel(
            ability=ability,
            following=following,
            none_bias=none_bias,
            none_ability=none_ability,
            silence=silence,
            abilities=abilities,
            class_bias=bias,
            position_bias=positions,
        )

    def fit(self, values: Floats, precision: float) -> Floats:
        """The values of the highest posterior probability, from these on."""
        constants = [ABILITY_PRECISION, FOLLOWING_PRECISION, *[CONSTANT_PRECISION] * 3]
        precisions = np.concatenate([constants, np.full(2 * self.classes + self.width, precision)])

        def objective(values: Floats) -> tuple[float, Floats]:
            likelihood, gradient = self._likelihood(values)
            away = values - self.start()
            return float((precisions * away) @ away / 2 - likelihood), precisions * away - gradient

        found: Floats = minimize(objective, values, method="L-BFGS-B", jac=True, options={"maxiter": ITERATIONS}).x
        return found

    def log_likelihood(self, values: Floats) -> float:
        return self._likelihood(values)[0]

    def _likelihood(self, values: Floats) -> tuple[float, Floats]:
        """Of the answers, in expectation over the truth; and its gradient."""
        model, answers, width, truth = self.model(values), self.answers, self.width, self.truth
        weights = _weights(model, self.log_probs, answers)
        columns, chosen, none = np.maximum(answers.candidates, 0), self.slots < width, self.slots == width
        right = np.zeros_like(truth)  # the truth, where it was chosen
        spoke = self.slots <= width
        right[self.rows[spoke], self.slots[spoke]] = truth[self.rows[spoke], self.slots[spoke]]
        with np.errstate(divide="ignore"):
            utilities = np.log(weights.shown)
        likelihood = (
            utilities[self.rows[chosen], self.slots[chosen]].sum()
            + none.sum() * model.none_bias
            + (~spoke).sum() * model.silence
            + (right[:, :width] * weights.abilities).sum()
            + right[:, width].sum() * model.none_ability
            - (truth * np.log(weights.totals)).sum()
        )
        per_weight = (truth / weights.totals).sum(axis=1, keepdims=True)
        if_true = truth[:, :width] * weights.shown * np.exp(weights.abilities) / weights.totals[:, :width]
        if_none = truth[:, width:] * weights.none * np.exp(model.none_ability) / weights.totals[:, width:]
        of_ability = np.where(answers.shown, right[:, :width] - if_true, 0.0)
        of_utility = -weights.shown * per_weight + if_true * np.expm1(-weights.abilities)
        of_utility[self.rows[chosen], self.slots[chosen]] += 1.0
        of_utility = np.where(answers.shown, of_utility, 0.0)
        silent = np.exp(model.silence)
        gradient = [
            [of_ability.sum(), (of_utility * self.log_probs).sum()],
            [none.sum() - weights.none * per_weight.sum() + (if_none * np.expm1(-model.none_ability)).sum()],
            [right[:, width].sum() - if_none.sum(), (~spoke).sum() - silent * per_weight.sum()],
            np.bincount(columns.ravel(), of_ability.ravel(), self.classes),
            np.bincount(columns.ravel(), of_utility.ravel(), self.classes),
            of_utility.sum(axis=0),
        ]
        return float(likelihood), np.concatenate(gradient)


def _at(values: Floats, candidates: Columns) -> Floats:
    """N x K: the values of N x C at the candidates; anything where there is none."""
    return np.take_along_axis(values, np.maximum(candidates, 0), axis=1)
