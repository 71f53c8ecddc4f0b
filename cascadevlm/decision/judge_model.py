"""A model of a judge: the probability of each answer, given the truth and the scorer's log-probabilities.

The model gives the reliability of an answer, and the accuracy that a question is expected to gain.

The model of the choice is a conditional logit over the options that the judge sees (McFadden, "Conditional logit analysis of
qualitative choice behavior", 1974). The utility of a candidate is the sum of

- ``following`` times the scorer's calibrated log-probability of the candidate,
- a bias of the class,
- a bias of the position in the list, and
- only if the candidate is the truth: the judge's ability, with a deviation for the class.

The utility of "none of these", if it is offered, is a constant. If the truth is not among the candidates, a second constant is
added.

By this model, a judge's errors are mostly labels that the scorer finds likely, and are more frequent on images that are
difficult for both. A table of confusions cannot express that. The model has 2 C + K + 6 numbers instead of C x C, all of them
shrunk by normal priors. The same numbers are used for longer and shorter lists.

A question can end without an answer: a refusal, or text that cannot be read. The log-odds of a missing answer are a constant.
If the truth is not among the candidates, a second constant is added. If the second constant is 0, a missing answer changes no
belief.

Some judges give their own probabilities of the candidates, which contain more information than the answer, the candidate with
the highest probability. Suppose that the logarithms of these probabilities are the utilities plus normal noise. Then the
log-likelihood ratio of two candidates is one weight times the difference of their (logarithm minus utility as a wrong
candidate). The weight is the ability divided by the variance of the noise (the discriminant of normal distributions; Fisher,
"The use of multiple measurements in taxonomic problems", 1936). If these probabilities predict held-out images better than the
answer, they replace the answer for the candidates. Labels that the judge did not see keep the probability that the answer gives
them.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, log_softmax, logsumexp

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.scorer_calibration import FLOOR, Floats, StoredFloats

NONE_CHOSEN = -2
"""In an array of answers: the judge chose "none of these"."""

ABILITY = 3.0
"""Ability of an unknown judge: right in 8 to 9 of 10 cases with two or three plausible candidates."""

FOLLOWING = 0.5
"""How much an unknown judge follows the scorer. 0: it does not follow the scorer. 1: it draws its answers from the scorer's
probabilities.
"""

NONE_BIAS, NONE_ABILITY, SILENCE = -1.0, 2.0, -4.0
"""Utility of "none of these", its second constant, and log-odds of no answer, for an unknown judge, in nats."""

LEAST_PROBABILITY = 1e-3
"""Smaller probabilities of a judge are raised to this value. Candidates that an endpoint does not list have none."""

LEAST_TOTAL = 1e-200
"""Divisor for images without candidates: smaller than every sum of exponentials, and large enough not to overflow."""

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The candidates that a judge saw for N images, and its answers.

    Attributes:
        candidates: ``(N, K)`` columns of the score matrix, in the order in which the judge saw the candidates; `NOBODY` after
            the last candidate of an image.
        answers: ``(N,)`` columns, each one of the candidates; `NONE_CHOSEN` for "none of these", `NOBODY` for no answer.
        none_offered: whether "none of these" was an option.
        probabilities: ``(N, K)`` probabilities of the candidates from the judge; NaN if the judge did not give a probability.
            None if the judge never gave probabilities.
    """

    candidates: Columns
    answers: Columns
    none_offered: bool
    probabilities: Floats | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, index: Bools | NDArray[np.intp]) -> "Answers":
        """The candidates and answers of some of the images."""
        return Answers(
            candidates=self.candidates[index],
            answers=self.answers[index],
            none_offered=self.none_offered,
            probabilities=None if self.probabilities is None else self.probabilities[index],
        )

    @property
    def shown(self) -> Bools:
        """``(N, K)`` booleans: this position of the list has a candidate."""
        shown: Bools = self.candidates != NOBODY
        return shown

    @property
    def opinions(self) -> Floats:
        """``(N, K)`` logarithms of the judge's own probabilities; NaN where the judge gave none."""
        if self.probabilities is None:
            return np.full(self.candidates.shape, np.nan)
        opinions: Floats = np.log(np.maximum(self.probabilities, LEAST_PROBABILITY))
        return opinions

    @property
    def slots(self) -> Columns:
        """``(N,)`` positions of the answers in the lists; K for "none of these" if it was offered; K + 1 for no answer."""
        width = self.candidates.shape[1]
        special = np.where((self.answers == NONE_CHOSEN) & self.none_offered, width, width + 1)
        matches = self.candidates == self.answers[:, None]
        position = (matches * np.arange(width)).sum(axis=1)  # also works for K = 0, if no image was escalated
        slots: Columns = np.where((self.answers >= 0) & matches.any(axis=1), position, special)
        return slots

    def spread(self, responsibilities: Floats) -> Floats:
        """``(N, K + 1)``: the responsibilities ``(N, C)`` of the candidates, and the sum of all others in the last column."""
        inside = np.where(self.shown, at(responsibilities, self.candidates), 0.0)
        rest = np.maximum(1 - inside.sum(axis=1, keepdims=True), 0)
        return np.concatenate([inside, rest], axis=1)


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """How a judge chooses. All utilities are in nats.

    Attributes:
        ability: utility that a candidate has because it is the truth.
        abilities: ``(C,)`` deviations from the ability per class.
        following: factor of the scorer's log-probability in the utility.
        class_bias: ``(C,)`` utilities per class.
        position_bias: utilities of the first, second, … position of a list. Positions that were not seen have 0.
        none_bias: utility of "none of these".
        none_ability: utility that is added to "none of these" if the truth is not among the candidates.
        silence: log-odds of no answer.
        silence_ability: number that is added to these log-odds if the truth is not among the candidates.
        probability_weight: weight of the judge's own probabilities, which replace its answer; 0 if the answer is better.
    """

    ability: float
    abilities: StoredFloats
    following: float
    class_bias: StoredFloats
    position_bias: StoredFloats
    none_bias: float = NONE_BIAS
    none_ability: float = NONE_ABILITY
    silence: float = SILENCE
    silence_ability: float = 0.0
    probability_weight: float = 0.0

    @classmethod
    def prior(cls, classes: int, positions: int = 0) -> "JudgeModel":
        """The model of an unknown judge."""
        return cls(
            ability=ABILITY,
            abilities=np.zeros(classes),
            following=FOLLOWING,
            class_bias=np.zeros(classes),
            position_bias=np.zeros(positions),
        )

    def log_likelihoods(self, log_probs: Floats, answers: Answers) -> Floats:
        """``(N, C)`` log-likelihoods of the answers if the column's label is the truth, up to a constant per image.

        Args:
            log_probs: ``(N, C)`` calibrated log-probabilities of the scorer.
            answers: the N candidate lists and answers.
        """
        weights = self._weights(log_probs, answers)
        width, slots, rows = answers.candidates.shape[1], answers.slots, np.arange(len(answers))
        chosen, silent = slots < width, slots > width
        likelihoods = -np.log(weights.totals)
        likelihoods[rows[chosen], slots[chosen]] += weights.abilities[rows[chosen], slots[chosen]]
        likelihoods[slots == width, width] += self.none_ability
        likelihoods = np.where(silent[:, np.newaxis], log_expit(weights.silence), likelihoods + log_expit(-weights.silence))
        found = np.repeat(likelihoods[:, width:], log_probs.shape[1], axis=1)
        where = np.nonzero(answers.shown)
        found[where[0], answers.candidates[where]] = likelihoods[:, :width][where]
        return found

    def posterior(self, log_probs: Floats, answers: Answers) -> Floats:
        """``(N, C)`` log-probabilities after the answers, by Bayes' rule.

        If ``probability_weight`` is not 0, the judge's own probabilities are used for the candidates in place of the answers.

        Args:
            log_probs: ``(N, C)`` log-probabilities before the answers, for example the calibrated ones of the scorer.
            answers: the N candidate lists and answers.
        """
        after: Floats = log_softmax(log_probs + self.log_likelihoods(log_probs, answers), axis=1)
        if not self.probability_weight:
            return after
        evidence = self.evidence(log_probs, answers)
        rows, places = np.nonzero(~np.isnan(evidence))
        columns = answers.candidates
        inside = among(at(log_probs, columns) + self.probability_weight * evidence)
        shown = logsumexp(np.where(answers.shown, at(after, columns), -np.inf), axis=1, keepdims=True)
        after[rows, columns[rows, places]] = (shown + inside)[rows, places]
        return after

    def evidence(self, log_probs: Floats, answers: Answers) -> Floats:
        """``(N, K)`` logarithms of the judge's own probabilities, minus the utility of the candidate if it is not the truth.

        The value is NaN where the judge gave no probability.

        Args:
            log_probs: ``(N, C)`` log-probabilities before the answers, for example the calibrated ones of the scorer.
            answers: the N candidate lists and answers.
        """
        utilities = _utilities(self, at(log_probs, answers.candidates), answers)
        evidence: Floats = np.where(answers.shown, answers.opinions - utilities, np.nan)
        return evidence

    def gain(self, log_probs: Floats, candidates: Columns, *, none_offered: bool = False, word_final: bool = False) -> Floats:
        """``(N,)`` expected gains in accuracy from a question, each at most 1.

        The gain is the expected probability that the final label is right, over all possible answers, minus the probability of
        the best label without a question. In decision theory this is the value of information (Howard, "Information value
        theory", 1966) if a right label is worth 1.

        Args:
            log_probs: ``(N, C)`` calibrated log-probabilities of the scorer.
            candidates: ``(N, K)`` columns, in the order in which they would be shown.
            none_offered: whether "none of these" is an option.
            word_final: whether the judge's answer is the final label. If the judge gives no answer, the scorer's best label is
                final. A gain can then be negative. If False, the most probable label after the answer is final.
        """
        nobody = np.full(len(log_probs), NOBODY)
        answers = Answers(candidates=candidates, answers=nobody, none_offered=none_offered)
        weights, where = self._weights(log_probs, answers), np.nonzero(answers.shown)
        others = np.exp(log_probs)
        others[where[0], candidates[where]] = 0.0
        shown_now = np.where(answers.shown, np.exp(at(log_probs, candidates)), 0.0)
        now = np.column_stack([shown_now, others.max(axis=1)])  # among the labels that are not shown, only the best label can win
        silent, spoke = now * weights.silent, now * (1 - weights.silent) / weights.totals
        inside, outside, none_ability = spoke[:, :-1], spoke[:, -1:], np.exp(self.none_ability)
        if_named = inside * np.exp(weights.abilities)
        if word_final:
            rows, best = np.arange(len(now)), now.argmax(axis=1)
            if_none = spoke[rows, best] * np.where(best < candidates.shape[1], 1.0, none_ability)
            right = (weights.shown * if_named).sum(axis=1) + weights.none * if_none + silent[rows, best]
            lost_or_gained: Floats = right - now[rows, best]
            return lost_or_gained
        two_best = np.partition(np.column_stack([np.zeros((len(now), 2)), inside]), -2, axis=1)[:, -2:]
        other, best_inside = two_best[:, :1], two_best[:, 1:]
        best_other = np.maximum(np.where(inside == best_inside, other, best_inside), outside)
        if_none = np.maximum(best_inside, outside * none_ability)[:, 0]
        after = (weights.shown * np.maximum(if_named, best_other)).sum(axis=1) + weights.none * if_none + silent.max(axis=1)
        gained: Floats = np.maximum(after - now.max(axis=1), 0.0)
        return gained

    def agreement(self, log_probs: Floats, answers: Answers) -> tuple[Bools, Floats]:
        """``(N,)`` booleans: the answer is the most probable candidate. ``(N,)`` probabilities of that, by the model.

        Args:
            log_probs: ``(N, C)`` log-probabilities before the answers. Only the log-probabilities of the candidates are used.
            answers: the N candidate lists and answers.
        """
        weights, truths = self._weights(log_probs, answers), answers.spread(np.exp(log_probs))
        shares = truths * (1 - weights.silent) / weights.totals
        named = weights.shown * (shares.sum(axis=1, keepdims=True) + np.expm1(weights.abilities) * shares[:, :-1])
        best = np.where(answers.shown, truths[:, :-1], -1.0).argmax(axis=1)
        return answers.slots == best, np.minimum(named[np.arange(len(answers)), best], 1.0)

    def _weights(self, log_probs: Floats, answers: Answers) -> "Weights":
        return weights_of(self, at(log_probs, answers.candidates), answers)

    def positions(self, width: int) -> Floats:
        """``(width,)`` biases of the first positions of a list."""
        known = self.position_bias[:width]
        return np.concatenate([known, np.zeros(width - len(known))])


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Exponentials of utilities for N images with K candidates.

    A last dimension of K + 1 stands for the truth: column k if candidate k is the truth, column K if no candidate is the truth.

    Attributes:
        shown: ``(N, K)`` exponentials of the candidates' utilities if they are not the truth; 0 without a candidate.
        abilities: ``(N, K)`` utilities in nats that are added if the candidate is the truth.
        none: exponential of the utility of "none of these" if the truth is among the candidates; 0 if it is not offered.
        totals: ``(N, K + 1)`` sums over all options.
        silence: ``(K + 1,)`` log-odds of no answer.
    """

    shown: Floats
    abilities: Floats
    none: float
    totals: Floats
    silence: Floats

    @property
    def silent(self) -> Floats:
        """``(K + 1,)`` probabilities of no answer."""
        silent: Floats = expit(self.silence)
        return silent


def weights_of(model: JudgeModel, log_probs: Floats, answers: Answers) -> Weights:
    """The weights for ``(N, K)`` log-probabilities of the candidates."""
    columns = np.maximum(answers.candidates, 0)
    shown = np.where(answers.shown, np.exp(_utilities(model, log_probs, answers)), 0.0)
    abilities = np.where(answers.shown, model.ability + model.abilities[columns], 0.0)
    none = float(np.exp(model.none_bias)) if answers.none_offered else 0.0
    base = np.maximum(shown.sum(axis=1, keepdims=True) + none, LEAST_TOTAL)
    totals = np.concatenate([base + np.expm1(abilities) * shown, base + np.expm1(model.none_ability) * none], axis=1)
    silence = np.append(np.full(columns.shape[1], model.silence), model.silence + model.silence_ability)
    return Weights(shown=shown, abilities=abilities, none=none, totals=totals, silence=silence)


def _utilities(model: JudgeModel, log_probs: Floats, answers: Answers) -> Floats:
    """``(N, K)`` utilities of the candidates if they are not the truth, from their ``(N, K)`` log-probabilities."""
    columns = np.maximum(answers.candidates, 0)
    return model.following * np.maximum(log_probs, FLOOR) + model.class_bias[columns] + model.positions(columns.shape[1])


def among(logits: Floats) -> Floats:
    """``(N, K)`` log-probabilities, normalised over the candidates of an image whose logit is not NaN."""
    normalised: Floats = logits - logsumexp(np.where(np.isnan(logits), -np.inf, logits), axis=1, keepdims=True)
    return normalised


def at(values: Floats, candidates: Columns) -> Floats:
    """``(N, K)`` values of an ``(N, C)`` array at the candidates. Positions without a candidate have an arbitrary value."""
    return np.take_along_axis(values, np.maximum(candidates, 0), axis=1)
