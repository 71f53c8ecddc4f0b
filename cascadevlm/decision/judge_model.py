"""A model of what a judge says, given the truth and what the scorer thinks: what its answer is worth, and what asking is worth.

Among the options shown, the judge is taken to choose by a conditional logit (McFadden, "Conditional logit analysis of
qualitative choice behavior", 1974). An option's utility is

- for a candidate: how much the judge follows the scorer, times the scorer's calibrated log-probability of it; a bias of the
  class; a bias of the position it is shown at; and, if it is the truth, the judge's ability, with a deviation for the class;
- for "none of these", where it is offered: a constant, and more where the truth is not among the candidates.

So a judge errs towards what the scorer finds likely too, and more often on images that are hard for both, which a table of
confusions cannot say; there are 2 C + K + 6 numbers rather than C x C, every one shrunk by a normal prior; and what the model
says of longer or shorter lists follows from the same numbers.

That nothing comes of asking (a refusal, an unreadable answer) is decided before: its log-odds are a constant, and more or less
where the truth is not among the candidates. Where that makes no difference, silence changes no belief.

A judge that tells its own probabilities of the candidates says more than its answer, which is the greatest of them. Were their
logarithms the utilities with normal noise, the log-likelihood ratio of two candidates would be the difference of (logarithm less
utility if not the truth), times one weight: ability by the variance of the noise (the discriminant of normal distributions;
Fisher, "The use of multiple measurements in taxonomic problems", 1936). This takes the place of the answer among the candidates,
if it is better on held-out images; labels that were not shown keep what the answer left them.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, log_softmax, logsumexp

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.scorer_calibration import FLOOR, Floats, StoredFloats

NONE_CHOSEN = -2
"""In an array of answers: "none of these"."""

ABILITY = 3.0
"""Of a judge that nothing is known of: right in 8 to 9 of 10 cases where two or three candidates are plausible."""

FOLLOWING = 0.5
"""Of a judge that nothing is known of: between not at all and as the scorer itself would choose."""

NONE_BIAS, NONE_ABILITY, SILENCE = -1.0, 2.0, -4.0
"""Constants of a judge that nothing is known of."""

LEAST_PROBABILITY = 1e-3
"""A candidate that a judge gives less is taken to have so much: those that an endpoint does not list have none."""

LEAST_TOTAL = 1e-200
"""Where nothing is shown: less than every sum of exponentials, and divided by without an overflow."""

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a judge was shown and said of N images.

    Attributes:
        candidates: N x K columns of the score matrix in the order shown, `NOBODY` beyond the last.
        answers: N columns, each one of the candidates; `NONE_CHOSEN` or, for no answer, `NOBODY`.
        none_offered: whether "none of these" was an option.
        probabilities: N x K, the judge's own of the candidates, NaN where it gave none; None if it never did.
    """

    candidates: Columns
    answers: Columns
    none_offered: bool
    probabilities: Floats | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, index: Bools | NDArray[np.intp]) -> "Answers":
        """Those of some of the images."""
        return Answers(
            candidates=self.candidates[index],
            answers=self.answers[index],
            none_offered=self.none_offered,
            probabilities=None if self.probabilities is None else self.probabilities[index],
        )

    @property
    def shown(self) -> Bools:
        """N x K: whether there is a candidate."""
        shown: Bools = self.candidates != NOBODY
        return shown

    @property
    def opinions(self) -> Floats:
        """N x K: logarithms of the judge's own probabilities, NaN where it gave none."""
        if self.probabilities is None:
            return np.full(self.candidates.shape, np.nan)
        opinions: Floats = np.log(np.maximum(self.probabilities, LEAST_PROBABILITY))
        return opinions

    @property
    def slots(self) -> Columns:
        """N: the position of the answer among the candidates; K for "none of these", where it is offered; K + 1 for no answer."""
        width = self.candidates.shape[1]
        special = np.where((self.answers == NONE_CHOSEN) & self.none_offered, width, width + 1)
        matches = self.candidates == self.answers[:, None]
        position = (matches * np.arange(width)).sum(axis=1)  # of lists without a place, too, where nobody was asked
        slots: Columns = np.where((self.answers >= 0) & matches.any(axis=1), position, special)
        return slots

    def spread(self, responsibilities: Floats) -> Floats:
        """N x (K + 1): of N x C responsibilities, those of the candidates, and the rest."""
        inside = np.where(self.shown, at(responsibilities, self.candidates), 0.0)
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
        silence: log-odds of no answer.
        silence_ability: what these gain where the truth is not among the candidates.
        probability_weight: of the judge's own probabilities, which count instead of its answer where it gives any; 0 if the
            answer says more.
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
        """N x C log-probabilities after the answers, or the judge's own probabilities, by Bayes' rule.

        Args:
            log_probs: N x C, before: the scorer's, calibrated.
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
        """N x K: the logarithms of the judge's own probabilities, less what the candidates get where they are not the truth; NaN
        where there are none.

        Args:
            log_probs: N x C, before: the scorer's, calibrated.
        """
        utilities = _utilities(self, at(log_probs, answers.candidates), answers)
        evidence: Floats = np.where(answers.shown, answers.opinions - utilities, np.nan)
        return evidence

    def gain(self, log_probs: Floats, candidates: Columns, *, none_offered: bool = False, word_final: bool = False) -> Floats:
        """The expected gain in accuracy from asking: N numbers up to 1.

        The expected probability that the final label is right, over all answers by how likely they are, less that of the best
        label now: the value of information of decision theory (Howard, "Information value theory", 1966) where being right is
        worth 1.

        Args:
            log_probs: N x C, the scorer's, calibrated.
            candidates: N x K columns, as they would be shown.
            word_final: whether the judge's answer is final, and the scorer's best label stands where it gives none: asking can
                then lose, and the gain be less than 0. Else the best label after the answer is taken.
        """
        nobody = np.full(len(log_probs), NOBODY)
        answers = Answers(candidates=candidates, answers=nobody, none_offered=none_offered)
        weights, where = self._weights(log_probs, answers), np.nonzero(answers.shown)
        others = np.exp(log_probs)
        others[where[0], candidates[where]] = 0.0
        shown_now = np.where(answers.shown, np.exp(at(log_probs, candidates)), 0.0)
        now = np.column_stack([shown_now, others.max(axis=1)])  # of labels that are not shown, only the best can win
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
        """N and N: whether each answer is the likeliest of the candidates, and how likely that was before it was known.

        Args:
            log_probs: N x C, before: the scorer's, calibrated. Those of labels that are not shown do not matter.
        """
        weights, truths = self._weights(log_probs, answers), answers.spread(np.exp(log_probs))
        shares = truths * (1 - weights.silent) / weights.totals
        named = weights.shown * (shares.sum(axis=1, keepdims=True) + np.expm1(weights.abilities) * shares[:, :-1])
        best = np.where(answers.shown, truths[:, :-1], -1.0).argmax(axis=1)
        return answers.slots == best, np.minimum(named[np.arange(len(answers)), best], 1.0)

    def _weights(self, log_probs: Floats, answers: Answers) -> "Weights":
        return weights_of(self, at(log_probs, answers.candidates), answers)

    def positions(self, width: int) -> Floats:
        """The biases of so many positions."""
        known = self.position_bias[:width]
        return np.concatenate([known, np.zeros(width - len(known))])


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Exponentials of utilities.

    Attributes:
        shown: N x K, of the candidates where they are not the truth; 0 where there is none.
        abilities: N x K nats that each would have more if it were.
        none: of "none of these" where the truth is among the candidates; 0 if it is not offered.
        totals: N x (K + 1), over all options, if the truth is each candidate or, last, none of them.
        silence: K + 1, the log-odds of no answer, likewise.
    """

    shown: Floats
    abilities: Floats
    none: float
    totals: Floats
    silence: Floats

    @property
    def silent(self) -> Floats:
        """K + 1: how likely no answer is, if the truth is each candidate or, last, none of them."""
        silent: Floats = expit(self.silence)
        return silent


def weights_of(model: JudgeModel, log_probs: Floats, answers: Answers) -> Weights:
    """Of N x K log-probabilities of the candidates."""
    columns = np.maximum(answers.candidates, 0)
    shown = np.where(answers.shown, np.exp(_utilities(model, log_probs, answers)), 0.0)
    abilities = np.where(answers.shown, model.ability + model.abilities[columns], 0.0)
    none = float(np.exp(model.none_bias)) if answers.none_offered else 0.0
    base = np.maximum(shown.sum(axis=1, keepdims=True) + none, LEAST_TOTAL)
    totals = np.concatenate([base + np.expm1(abilities) * shown, base + np.expm1(model.none_ability) * none], axis=1)
    silence = np.append(np.full(columns.shape[1], model.silence), model.silence + model.silence_ability)
    return Weights(shown=shown, abilities=abilities, none=none, totals=totals, silence=silence)


def _utilities(model: JudgeModel, log_probs: Floats, answers: Answers) -> Floats:
    """N x K: of the candidates where they are not the truth, from their log-probabilities."""
    columns = np.maximum(answers.candidates, 0)
    return model.following * np.maximum(log_probs, FLOOR) + model.class_bias[columns] + model.positions(columns.shape[1])


def among(logits: Floats) -> Floats:
    """N x K log-probabilities among the candidates that have a number."""
    normalised: Floats = logits - logsumexp(np.where(np.isnan(logits), -np.inf, logits), axis=1, keepdims=True)
    return normalised


def at(values: Floats, candidates: Columns) -> Floats:
    """N x K: the values of N x C at the candidates; anything where there is none."""
    return np.take_along_axis(values, np.maximum(candidates, 0), axis=1)
