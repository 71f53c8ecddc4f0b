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

A judge that tells its own probabilities of the candidates says more than its answer, which is the greatest of them. Were their
logarithms the utilities with normal noise, the log-likelihood ratio of two candidates would be the difference of (logarithm less
utility if not the truth), times one weight: ability by the variance of the noise (the discriminant of normal distributions;
Fisher, "The use of multiple measurements in taxonomic problems", 1936). This takes the place of the answer among the candidates,
if it is better on held-out images; labels that were not shown keep what the answer left them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp

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

WORD_PRECISION = 1.0
"""Of the normal prior, around 0, of the logarithm of the weight of a judge's own probabilities: 1 takes them at their word, as
if all candidates had been alike before."""

LOG_WEIGHTS = (-4.0, 4.0)
"""Between which it is looked for."""

LEAST_PROBABILITY = 1e-3
"""A candidate that a judge gives less is taken to have so much: those that an endpoint does not list have none."""

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
        probability_weight: of the judge's own probabilities, which count instead of its answer where it gives any; 0 if the
            answer says more.
        blank: whether the biases begin at those found on a blank image, which was better than at none; None if that was not
            tried.
    """

    ability: float
    abilities: StoredFloats
    following: float
    class_bias: StoredFloats
    position_bias: StoredFloats
    none_bias: float = NONE_BIAS
    none_ability: float = NONE_ABILITY
    silence: float = SILENCE
    probability_weight: float = 0.0
    blank: bool | None = None

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
        among = _among(_at(log_probs, columns) + self.probability_weight * evidence)
        shown = logsumexp(np.where(answers.shown, _at(after, columns), -np.inf), axis=1, keepdims=True)
        after[rows, columns[rows, places]] = (shown + among)[rows, places]
        return after

    def evidence(self, log_probs: Floats, answers: Answers) -> Floats:
        """N x K: the logarithms of the judge's own probabilities, less what the candidates get where they are not the truth; NaN
        where there are none.

        Args:
            log_probs: N x C, before: the scorer's, calibrated.
        """
        utilities = _utilities(self, _at(log_probs, answers.candidates), answers)
        evidence: Floats = np.where(answers.shown, answers.opinions - utilities, np.nan)
        return evidence

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

    def agreement(self, log_probs: Floats, answers: Answers) -> tuple[Bools, Floats]:
        """N and N: whether each answer is the likeliest of the candidates, and how likely that was before it was known.

        Args:
            log_probs: N x C, before: the scorer's, calibrated. Those of labels that are not shown do not matter.
        """
        weights, truths = self._weights(log_probs, answers), answers.spread(np.exp(log_probs))
        shares = truths / weights.totals
        named = weights.shown * (shares.sum(axis=1, keepdims=True) + np.expm1(weights.abilities) * shares[:, :-1])
        best = np.where(answers.shown, truths[:, :-1], -1.0).argmax(axis=1)
        return answers.slots == best, np.minimum(named[np.arange(len(answers)), best], 1.0)

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
    shown = np.where(answers.shown, np.exp(_utilities(model, log_probs, answers)), 0.0)
    abilities = np.where(answers.shown, model.ability + model.abilities[columns], 0.0)
    none = float(np.exp(model.none_bias)) if answers.none_offered else 0.0
    base = shown.sum(axis=1, keepdims=True) + none + np.exp(model.silence)
    totals = np.concatenate([base + np.expm1(abilities) * shown, base + np.expm1(model.none_ability) * none], axis=1)
    return _Weights(shown=shown, abilities=abilities, none=none, totals=totals)


def _utilities(model: JudgeModel, log_probs: Floats, answers: Answers) -> Floats:
    """N x K: of the candidates where they are not the truth, from their log-probabilities."""
    columns = np.maximum(answers.candidates, 0)
    return model.following * log_probs + model.class_bias[columns] + model._positions(columns.shape[1])


def _among(logits: Floats) -> Floats:
    """N x K log-probabilities among the candidates that have a number."""
    among: Floats = logits - logsumexp(np.where(np.isnan(logits), -np.inf, logits), axis=1, keepdims=True)
    return among


def blank_prior(blank: Answers, classes: int) -> JudgeModel:
    """What is believed of a judge that only is known to have answered so about an image without content."""
    nothing = np.zeros((len(blank), classes))
    fitting = JudgeFitting(nothing, nothing, blank)
    found = fitting.model(fitting.fit(fitting.start(), PRECISIONS[-1]))
    prior = JudgeModel.prior(classes)
    return replace(prior, class_bias=found.class_bias, position_bias=found.position_bias)


def fit_judge(
    log_probs: Floats, responsibilities: Floats, answers: Answers, *, blank: Answers | None = None
) -> tuple[JudgeModel, Floats]:
    """The model of the highest posterior probability, the strength of its prior by cross-validated log-likelihood.

    The judge's own probabilities get a weight if they are better than its answers by more than a standard error of the
    cross-validated log-likelihood of the truth.

    Args:
        log_probs: N x C, the scorer's, calibrated without looking at these images' labels (the second of what `fit_scorer`
            returns): otherwise the judge seems to follow a scorer that is always right.
        responsibilities: N x C, rows sum to 1: one-hot where the truth is known.
        blank: about an image without content; the biases begin at those found there, if that gives a better cross-validated
            log-likelihood.

    Returns:
        the model, and the N x C log-probabilities after the answers as models fitted on the other folds give them.
    """
    fold_of, classes = folds(len(answers)), log_probs.shape[1]
    priors = [JudgeModel.prior(classes), *([] if blank is None else [blank_prior(blank, classes)])]
    tried = [(prior, precision) for prior in priors for precision in PRECISIONS]
    scores = np.zeros(len(tried))
    models: list[list[JudgeModel]] = []
    for fold in range(FOLDS):
        inside = fold_of == fold
        fitting = JudgeFitting(log_probs[~inside], responsibilities[~inside], answers.rows(~inside))
        held_out = JudgeFitting(log_probs[inside], responsibilities[inside], answers.rows(inside))
        values, found = fitting.start(), []
        for number, (prior, precision) in enumerate(tried):
            values = fitting.fit(values, precision, prior)
            scores[number] += held_out.log_likelihood(values)
            found.append(fitting.model(values))
        models.append(found)
    best = int(scores.argmax())
    prior, precision = tried[best]
    whole = JudgeFitting(log_probs, responsibilities, answers)
    model = whole.model(whole.fit(whole.start(), precision, prior))
    if blank is not None:
        model = replace(model, blank=prior is not priors[0])
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
    """N: the fold of cross-validation that each image is in."""
    return np.random.default_rng(1).permutation(images) % FOLDS


def _probability_weight(
    log_probs: Floats, responsibilities: Floats, answers: Answers, parts: Sequence[tuple[NDArray[np.intp], JudgeModel]]
) -> float:
    """The weight of a judge's own probabilities among the candidates, by models that do not know the rows beside them."""
    evidence, answered = np.full(answers.candidates.shape, np.nan), np.zeros(answers.candidates.shape)
    for rows, part in parts:
        some = answers.rows(rows)
        evidence[rows] = part.evidence(log_probs[rows], some)
        answered[rows] = _at(part.posterior(log_probs[rows], some), some.candidates)
    known = ~np.isnan(evidence)
    before, truth = _at(log_probs, answers.candidates), np.where(known, _at(responsibilities, answers.candidates), 0.0)
    by_answer = np.where(known, _among(np.where(known, answered, np.nan)), 0.0)

    def gained(weight: float) -> Floats:
        """N: nats that the truth has more than by the answer."""
        among = np.where(known, _among(before + weight * evidence), 0.0)
        gains: Floats = (truth * (among - by_answer)).sum(axis=1)
        return gains

    def objective(log_weight: float) -> float:
        return float(WORD_PRECISION * log_weight**2 / 2 - gained(np.exp(log_weight)).sum())

    weight = float(np.exp(minimize_scalar(objective, bounds=LOG_WEIGHTS, method="bounded").x))
    gains = gained(weight)
    return weight if gains.sum() > gains.std() * np.sqrt(len(gains)) else 0.0


class JudgeFitting:
    """The likelihood of some answers, as a function of one vector: ability, following, the constants, then C abilities, C
    biases and K positions."""

    def __init__(self, log_probs: Floats, responsibilities: Floats, answers: Answers) -> None:
        self.answers = answers
        self.classes, self.width = log_probs.shape[1], answers.candidates.shape[1]
        self.log_probs = _at(log_probs, answers.candidates)
        self.truth = answers.spread(responsibilities)
        self.slots, self.rows = answers.slots, np.arange(len(answers))

    def start(self, prior: JudgeModel | None = None) -> Floats:
        """The values of a prior; of that of a judge that nothing is known of, unless given."""
        prior = prior or JudgeModel.prior(self.classes)
        constants = [prior.ability, prior.following, prior.none_bias, prior.none_ability, prior.silence]
        return np.concatenate([constants, prior.abilities, prior.class_bias, prior._positions(self.width)])

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

    def fit(self, values: Floats, precision: float, prior: JudgeModel | None = None) -> Floats:
        """The values of the highest posterior probability, from these on."""
        constants = [ABILITY_PRECISION, FOLLOWING_PRECISION, *[CONSTANT_PRECISION] * 3]
        precisions = np.concatenate([constants, np.full(2 * self.classes + self.width, precision)])
        start = self.start(prior)

        def objective(values: Floats) -> tuple[float, Floats]:
            likelihood, gradient = self._likelihood(values)
            away = values - start
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
