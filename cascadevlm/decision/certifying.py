"""The rule of a certificate: which images the judge is asked about, in which order, and which answers are kept without asking.

1. Ask about `FIRST` random images. Learn an opinion from the answers (`opinions`).
2. Estimate P(disagrees | log-odds) by a logistic regression on held-out log-odds. Order the images that are
   not asked, surest first. The cumulated probabilities are the expected number of disagreements of each prefix.
3. For each share of images that a test might draw, compute the expected number of questions. Take the cheapest share.
4. Ask about as many random images again and learn anew, while the planned questions are many compared with the price of that.
5. Images far beyond the planned prefix will be asked anyway. Ask about half of them, least sure first; learn anew; repeat.
6. Draw the share of all images that are not asked yet, ask about them, and keep the longest prefix that the law allows
   (`agreement`).

The steps before the draw are free to use all answers: the law holds for every order that does not depend on the other answers.
Everything is determined by the arrays, the seed and the answers. A run that was killed goes through the same steps again, with
the answers that it has stored.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, gammaincinv

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.agreement import Counts, Promise, Rows, draw, longest_prefix, most_found, most_found_of, shuffled
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.opinions import MOST_TAUGHT, Images, Opinion, Rule, against, taught_by
from cascadevlm.decision.scorer_calibration import Floats

FIRST = 100
"""Number of random images that are asked first."""

MOST_FIRST = 800
"""Largest number of random images that teach, and never more than a quarter of all: the images of step 5 teach as well."""

WORTH = 0.15
"""Asking as many random images again may save so large a share of the planned questions."""

BEYOND = 0.75
"""Images are asked to learn from them beyond the prefix whose expected disagreements are this share of the allowed ones."""

LEAST_STEP = 0.01
"""Step 5 ends when its next step is below this share of all images."""

SHARES = np.geomspace(0.002, 0.7, 36)
"""Shares of the images that a test may draw."""

QUANTILES = np.array([0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975])
"""Quantiles of the position of the last image that is kept."""

POSSIBLE = 40
"""Number of values of P(disagrees | log-odds) that an estimate of the cost averages over."""

SLOPE, INTERCEPT_PRECISION = -1.0, 0.25
"""Prior of the logistic regression: a slope of -1 give or take 1 (calibrated log-odds), and an intercept of 0 give or take 2."""

Asking: TypeAlias = Generator[Rows, Columns, "Certificate"]
"""Yields numbers of images to ask about. Is sent one column per image, or a negative number where the judge names no class."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """The facts of a certificate. Numbers of images are positions in `Images.rows`.

    Attributes:
        promise: what is promised.
        seed: seed of the draws.
        first: number of random images that were asked first.
        taught: `(t,)` all images that were asked before the test, in the order in which they were asked.
        order: `(R,)` the other images, surest first.
        drawn: `(R,)`, whether an image of the order was drawn for the test.
        disagrees: `(R,)`, whether a drawn image disagrees; False for images that are not drawn.
        most: c, number of drawn images that may disagree in the prefix that is kept; -1 if no prefix could pass the test.
        prefix: e, number of images of the order in the prefix that is kept.
        planned: expected number of questions before the test, all questions included.
        rule: gives the log-probabilities of the answers without asking.
        labels: `(N,)` columns, the answers without asking; never negative.
        log_odds: `(N,) float32`, the confidences by which the images are in order; ties are in the order of the images.
    """

    promise: Promise
    seed: int
    first: int
    taught: Rows
    order: Rows
    drawn: Bools
    disagrees: Bools
    most: int
    prefix: int
    planned: float
    rule: Rule
    labels: Columns
    log_odds: NDArray[np.float32]

    @property
    def images(self) -> int:
        """N, number of images."""
        return len(self.labels)

    @property
    def allowed(self) -> int:
        """W, number of final answers that may not be the judge's."""
        return self.promise.allowed(self.images)

    @property
    def kept(self) -> Rows:
        """The images whose answer stands without asking."""
        return self.order[: self.prefix][~self.drawn[: self.prefix]]

    @property
    def rest(self) -> Rows:
        """The images that are still to be asked about, surest first."""
        return self.order[self.prefix :][~self.drawn[self.prefix :]]

    @property
    def questions(self) -> int:
        """Number of images that the judge is asked about, all parts included."""
        return self.images - len(self.kept)

    @property
    def found(self) -> int:
        """Number of drawn images of the prefix that disagree."""
        return int(self.disagrees[: self.prefix].sum())


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a promise is expected to cost, computed before the test.

    Attributes:
        promise: what is promised.
        questions: expected number of images that the judge is asked about, all parts included.
        low: lower end of an interval that has the number of questions with about 95 % probability.
        high: upper end of this interval.
        kept: whether a test is expected to allow more kept answers than need no test.
    """

    promise: Promise
    questions: float
    low: float
    high: float
    kept: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A test of one opinion.

    Attributes:
        fitted: `(2,)`, intercept and slope of P(disagrees | log-odds).
        covariance: `(2, 2)`, of these.
        expected: `(R,)`, expected number of disagreements in each prefix.
        number: n, number of images to draw.
        costs: number of images of the order that are asked, for each of `QUANTILES`.
    """

    opinion: Opinion
    labels: Columns
    log_odds: NDArray[np.float32]
    order: Rows
    fitted: Floats
    covariance: Floats
    expected: Floats
    number: int
    costs: Floats

    @property
    def cost(self) -> float:
        return float(self.costs.mean())


def certify(images: Images, promise: Promise, *, seed: int = 0) -> Asking:
    """Find out which answers can be kept, by questions to the judge.

    Args:
        images: of the scorer.
        promise: what is to be certified.
        seed: seed of all draws.

    Yields:
        `(n,)` numbers of images to ask about. No image is asked about twice.

    Receives:
        `(n,)` answers of the judge: columns, or negative numbers for "none of these", refused, unparsed and failed.

    Returns:
        The certificate. The caller then asks about `Certificate.rest`.
    """
    total, allowed = len(images), promise.allowed(len(images))
    answers, asked = np.full(total, NOBODY, dtype=np.int64), np.zeros(0, dtype=np.intp)
    random = first_rows(images.numbers, total, seed)
    more, first = random[: opening(total)], 0
    while len(more):
        answers[more] = yield more
        asked, first = np.concatenate([asked, more]), first + len(more)
        plan = plan_test(images, asked, answers[asked], partial(_always, allowed), promise.level)
        kept = len(plan.order) - plan.cost
        worth = first * kept / total < WORTH * plan.cost and 2 * first <= min(MOST_FIRST, total // 4)
        more = random[first : 2 * first] if worth else random[:0]
    while True:
        beyond = len(plan.order) - int(np.searchsorted(plan.expected, BEYOND * allowed))
        if beyond // 2 < max(LEAST_STEP * total, 1):
            break
        more = plan.order[-(beyond // 2) :]
        answers[more] = yield more
        asked = np.concatenate([asked, more])
        plan = plan_test(images, asked, answers[asked], partial(_always, allowed), promise.level)
    drawn = draw(images.numbers[plan.order], plan.number, seed)
    if plan.number:
        answers[plan.order[drawn]] = yield plan.order[drawn]
    disagrees = drawn & (plan.labels[plan.order] != answers[plan.order])
    return Certificate(
        promise=promise,
        seed=seed,
        first=first,
        taught=asked,
        order=plan.order,
        drawn=drawn,
        disagrees=disagrees,
        most=most_found_of(len(drawn), plan.number, allowed=allowed, level=promise.level),
        prefix=longest_prefix(drawn, disagrees, allowed=allowed, level=promise.level),
        planned=len(asked) + float(_uncertain_costs(plan, allowed, promise.level).mean()),
        rule=plan.opinion.rule,
        labels=plan.labels,
        log_odds=plan.log_odds,
    )


def opening(images: int) -> int:
    """Number of random images that are asked about first, out of N images."""
    return max(1, min(FIRST, images // 4))


def testable(images: int, promise: Promise) -> bool:
    """False if N images are too few for a test: then at most W answers can be kept.

    Args:
        images: N, number of images.
        promise: what is to be certified.
    """
    rest, allowed = images - opening(images), promise.allowed(images)
    numbers = np.unique(np.ceil(SHARES * rest).astype(np.int64))
    return rest > allowed and bool((most_found(rest, numbers, allowed=allowed, level=promise.level) >= 0).any())


def first_rows(numbers: Rows, count: int, seed: int) -> Rows:
    """`(n,)` positions of random images, those that a run asks about first.

    Args:
        numbers: `(N,)`, numbers of the images that can be read, among all images of the run.
        count: n, number of images to return.
        seed: seed of the run.
    """
    return shuffled(numbers, seed, stream=0)[:count]


def planned(images: Images, rows: Rows, answers: Columns, promises: Sequence[Promise]) -> list[Planned]:
    """What each of several promises is expected to cost.

    What further answers will teach is not known yet. Where the classes are learned easily, the real cost is lower.

    Args:
        images: of the scorer.
        rows: `(n,)` images that were asked about. `first_rows` gives images that a run with the same seed asks about, too.
        answers: `(n,)` answers of the judge, negative where it named no class.
        promises: what may be promised.
    """
    found = []
    for promise in promises:
        allowed = promise.allowed(len(images))
        plan = plan_test(images, rows, answers, partial(_always, allowed), promise.level)
        costs = len(rows) + _uncertain_costs(plan, allowed, promise.level)
        found.append(
            Planned(
                promise=promise,
                questions=float(costs.mean()),
                low=float(np.quantile(costs, 0.025)),
                high=float(np.quantile(costs, 0.975)),
                kept=plan.number > 0,
            )
        )
    return found


def plan_test(
    images: Images, rows: Rows, answers: Columns, allowed: Callable[[float], int], level: float, column: int | None = None
) -> Plan:
    """The best test after some answers. Of more than `MOST_TAUGHT` answers, a random part teaches.

    Args:
        images: of the scorer.
        rows: `(n,)` images that were asked about.
        answers: `(n,)` columns; below 0 where the judge named no class.
        allowed: gives W from the expected number of disagreements in the whole order.
        level: largest probability that a promise is broken.
        column: a class. Then the answer without asking is "not this class", and disagreement is that the judge names it.
            Default: the answer without asking is the most probable class.
    """
    most = max(MOST_TAUGHT // images.classes, FIRST)
    part = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    opinion = taught_by(images, rows[part], answers[part])
    labels, log_odds = opinion.of(images, column)
    own, odds = images.surest(opinion.held_out, rows[part]) if column is None else against(opinion.held_out, column)
    fitted, covariance = fit_disagreement(odds, (own != answers[part]) if column is None else answers[part] == column)
    rest = np.ones(len(images), dtype=bool)
    rest[rows] = False
    others = np.flatnonzero(rest)
    order = others[np.argsort(-log_odds[others], kind="stable")]
    expected = disagreements(log_odds[order], fitted)
    most = allowed(float(expected.max(initial=0.0)))
    number, costs = _cheapest(expected, most, level)
    return Plan(
        opinion=opinion,
        labels=labels,
        log_odds=log_odds,
        order=order,
        fitted=fitted,
        covariance=covariance,
        expected=expected,
        number=number,
        costs=costs,
    )


def _always(allowed: int, _: float) -> int:
    """W of a certificate, which does not depend on what is expected."""
    return allowed


def disagreements(log_odds: NDArray[np.floating], fitted: Floats) -> Floats:
    """`(R,)`, expected number of disagreements in each prefix of images with `(R,)` log-odds."""
    return np.cumsum(expit(fitted[0] + fitted[1] * log_odds.astype(np.float64)))


def fit_disagreement(log_odds: Floats, disagrees: Bools) -> tuple[Floats, Floats]:
    """`(2,)` intercept and slope of P(disagrees | log-odds), of the highest posterior probability; and their `(2, 2)` covariance.

    The covariance is that of Laplace's approximation.

    Args:
        log_odds: `(n,)`, held out.
        disagrees: `(n,)`.
    """
    features = np.stack([np.ones(len(log_odds)), log_odds], axis=1)
    precisions, mean = np.array([INTERCEPT_PRECISION, 1.0]), np.array([0.0, SLOPE])
    values, curvature = mean, np.diag(precisions)
    for _ in range(50):
        fitted = expit(features @ values)
        gradient = features.T @ (fitted - disagrees) + precisions * (values - mean)
        curvature = (features * (fitted * (1 - fitted))[:, None]).T @ features + np.diag(precisions)
        step = np.linalg.solve(curvature, gradient)
        values = values - step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    return values, np.linalg.inv(curvature)


def _cheapest(expected: Floats, allowed: int, level: float) -> tuple[int, Floats]:
    """How many images are best drawn, and how many of the order are then asked, for each of `QUANTILES`.

    The prefix ends before drawn image c + 1 that disagrees. The number of images that disagree up to this image has a negative
    binomial distribution. Its quantiles are those of a gamma distribution of the same mean, narrowed to the same variance.
    """
    images = len(expected)
    number, costs = 0, np.full(len(QUANTILES), float(images - min(allowed, images)))
    numbers = np.unique(np.ceil(SHARES * images).astype(np.int64))
    found = most_found(images, numbers, allowed=allowed, level=level)
    numbers, found = numbers[found >= 0], found[found >= 0]
    if images <= allowed or not len(numbers):
        return number, costs
    tested = _costs(expected, numbers, found)
    best = int(tested.mean(axis=1).argmin())
    return (int(numbers[best]), tested[best]) if tested[best].mean() < costs.mean() else (number, costs)


def _costs(expected: Floats, numbers: Counts, found: Counts) -> Floats:
    """`(K, Q)` numbers of images of the order that are asked, for `(K,)` numbers of draws with `(K,)` c, and `QUANTILES`."""
    shares, ends = (numbers / len(expected))[:, None], found[:, None] + 1
    positions = (ends + (gammaincinv(ends, QUANTILES) - ends) * np.sqrt(1 - shares)) / shares
    costs: Floats = len(expected) - (1 - shares) * np.searchsorted(expected, positions - 0.5, side="right")
    return costs


def _uncertain_costs(plan: Plan, allowed: int, level: float) -> Floats:
    """`(n,)` numbers of images of the order that are asked, for `QUANTILES` and for values of P(disagrees) that may be true."""
    if not plan.number:
        return plan.costs
    number, odds = np.array([plan.number]), plan.log_odds[plan.order]
    found = most_found(len(odds), number, allowed=allowed, level=level)
    values = np.random.default_rng(0).multivariate_normal(plan.fitted, plan.covariance, POSSIBLE)
    return np.concatenate([_costs(disagreements(odds, fitted), number, found).ravel() for fitted in values])
