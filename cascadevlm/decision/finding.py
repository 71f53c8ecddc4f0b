"""Promises about one class: recall and precision, by the law of `agreement`. And promises about accuracy, with labels of people.

Recall. An image is positive if the judge names the class. Order the images by the class's probability, least likely first. The
answer without asking is "not this class", so a positive image disagrees. Let F be the number of positive images that are known.
If U positive images are never asked about, the recall is F / (F + U). It is at least r if U is at most
W(F) = floor(F (1 - r) / r). The prefix that is not asked about may have c(W(F)) drawn positive images, with c as in
`most_found`. Questions go on from the most likely image downwards, until the prefix is so short. A question that failed may have
hidden a positive image. So its image counts as positive in the prefix, and not in F.

Proof. Let there be P positive images, and V the largest number of missed ones with a recall of at least r. Suppose that the
questions stop with U > V. Then F = P - U is so small that W(F) <= V. So the prefix has at most c(V) drawn positive images and
more than V that are not drawn, and the law bounds this probability for the fixed number V, for all prefixes at once. More drawn
images that count as positive only make the prefix shorter.

Precision. The most likely images are accepted without asking. The hypothesis "more than (1 - q) e of the first e are not
positive" is tested for lengths e that are fixed before the draw, shortest first, up to the first that is not rejected: each
test can use the full level (fixed-sequence testing). Accuracy is the same promise in other words: an image is wrong if the
label of a person is another one, and the labelled images were drawn at random.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.agreement import Rows, chance_of_at_most, draw, longest_prefix
from cascadevlm.decision.certifying import BEYOND, LEAST_STEP, first_rows, opening, plan_test
from cascadevlm.decision.guarantee import complement, require_probability
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.opinions import Images, Rule

LENGTHS = 60
"""Number of prefixes whose precision is tested."""

BEGINNINGS = (1, 3)
"""The tests of prefixes begin anew at these multiples of the first length that is worth a test."""

STEPS = 200
"""The questions below the border are asked in about so many steps."""

Seeking: TypeAlias = Generator[Rows, Columns, "Found"]
"""Yields numbers of images to ask about. Is sent one column per image, `NONE_CHOSEN` for "none of these", or
`NOBODY` if the judge gave no answer.
"""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is promised about a class.

    Attributes:
        recall: r, the least share of the positive images that is found, above 0 and below 1.
        precision: q, the least share of positive images among the found ones; None if each found image is asked about.
        confidence: the least probability that both promises are kept.

    Raises:
        InputError: if a number is out of its range.
    """

    recall: float
    precision: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require_probability("recall", self.recall)
        require_probability("confidence", self.confidence)
        if self.precision is not None:
            require_probability("precision", self.precision)

    @property
    def level(self) -> float:
        """The largest probability that one of the promises is broken. Two promises have half of it each."""
        return complement(self.confidence) / (1 if self.precision is None else 2)

    def missable(self, known: float) -> int:
        """W(F), the number of positive images that may be missed if F are known."""
        recall = Fraction(str(self.recall))
        return math.floor(Fraction(known) * (1 - recall) / recall)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The images of a class. Numbers of images are positions in `Images.rows`.

    Attributes:
        wanted: what is promised.
        column: the class.
        answers: `(N,)` answers of the judge; `NOBODY` also for images that the judge was not asked about.
        taught: `(t,)` all images that were asked before the test.
        order: `(R,)` the other images, least likely first.
        drawn: `(R,)`, whether an image of the order was drawn for the test.
        begin: the judge was asked about the images of the order from this position on.
        end: the images of the order from this position on are accepted: they are taken for the class without asking.
        rule: gives the log-probabilities that the images were ordered by.
        labels: `(N,)` columns, the answers without asking: the class for accepted images, the most probable other class for all
            other images.
        log_odds: `(N,) float32`, log-odds that an image is not of the class. Ties are in the order of the images.
    """

    wanted: Wanted
    column: int
    answers: Columns
    taught: Rows
    order: Rows
    drawn: Bools
    begin: int
    end: int
    rule: Rule
    labels: Columns
    log_odds: NDArray[np.float32]

    @property
    def named(self) -> Rows:
        """Images that the judge was asked about and named the class for."""
        return np.flatnonzero(self.answers == self.column)

    @property
    def kept(self) -> Rows:
        """Images that are not taken for the class, without asking."""
        return self.order[: self.begin][~self.drawn[: self.begin]]

    @property
    def rest(self) -> Rows:
        """Images that the judge was asked about after the test."""
        return self.order[self.begin : self.end][~self.drawn[self.begin : self.end]]

    @property
    def accepted(self) -> Rows:
        """Images that are taken for the class without asking. Empty without a promise of precision."""
        return self.order[self.end :][~self.drawn[self.end :]]


def precise_prefix(drawn: Bools, wrong: Bools, *, share: float, level: float) -> int:
    """The length of the longest prefix that has at most a share of wrong images, with a probability of at least 1 - level.

    The tests begin with the shortest prefix that could pass with half of the allowed share of wrong images among the drawn ones,
    and go on to longer prefixes until one fails. They begin once more at three times this length, because a short prefix fails by
    chance more often. Each of the two series may be wrong with half of the level. The number of drawn images in a prefix is taken
    to be its expected value for the choice of the lengths. So the choice depends on the number of drawn images, and neither on
    the draw nor on what is wrong.

    Args:
        drawn: `(N,)`, surest first: a uniform random sample without replacement.
        wrong: `(N,)`; only the values of drawn images are used.
        share: largest share of wrong images in the prefix.
        level: largest probability that the prefix has more.
    """
    most = Fraction(str(share))
    lengths = np.unique(np.linspace(0, len(drawn), LENGTHS + 1).astype(np.int64)[1:])
    lengths = lengths[lengths > 0]
    counted = np.cumsum(drawn)[lengths - 1]
    allowed = np.array([math.floor(most * int(length)) for length in lengths], dtype=np.int64)
    expected = lengths * int(drawn.sum()) // max(len(drawn), 1)
    level /= len(BEGINNINGS)
    powerful = chance_of_at_most(np.floor(expected * share / 2), lengths, allowed + 1, expected) <= level
    if not powerful.any():
        return 0
    passed = chance_of_at_most(np.cumsum(drawn & wrong)[lengths - 1], lengths, allowed + 1, counted) <= level
    longest = 0
    for multiple in BEGINNINGS:
        begin = int(np.searchsorted(lengths, multiple * lengths[powerful.argmax()]))
        unbroken = np.logical_and.accumulate(passed[begin:])
        longest = max(longest, int(lengths[begin:][unbroken].max(initial=0)))
    return longest


def find(images: Images, column: int, wanted: Wanted, *, seed: int = 0) -> Seeking:
    """Find the images of a class, by questions to the judge.

    Args:
        images: of the scorer.
        column: the class.
        wanted: what is promised.
        seed: seed of all draws.

    Yields:
        `(n,)` numbers of images to ask about. No image is asked about twice.

    Receives:
        `(n,)` answers of the judge: columns, `NONE_CHOSEN` for "none of these", or `NOBODY` for refused, unparsed and failed.

    Returns:
        What was found. No further question is needed.
    """
    total = len(images)
    answers, asked = np.full(total, NOBODY, dtype=np.int64), np.zeros(0, dtype=np.intp)
    more = first_rows(images.numbers, opening(total), seed)
    while len(more):
        answers[more] = yield more
        asked = np.concatenate([asked, more])
        known = int((answers == column).sum())

        def allowed(expected: float, known: int = known) -> int:
            return wanted.missable(known + max(0.0, expected - math.sqrt(expected)))

        plan = plan_test(images, asked, answers[asked], allowed, wanted.level, column)
        beyond = len(plan.order) - int(np.searchsorted(plan.expected, BEYOND * allowed(float(plan.expected.max(initial=0.0)))))
        early = wanted.precision is None and beyond // 2 >= max(LEAST_STEP * total, 1)
        more = plan.order[-(beyond // 2) :] if early else more[:0]
    order = plan.order
    drawn = draw(images.numbers[order], plan.number, seed)
    if plan.number:
        answers[order[drawn]] = yield order[drawn]
    begin, end = yield from after_test(order, drawn, answers, column, wanted)
    labels = _most_probable_others(images, column)
    labels[order[end:]] = column
    return Found(
        wanted=wanted,
        column=column,
        answers=answers,
        taught=asked,
        order=order,
        drawn=drawn,
        begin=begin,
        end=end,
        rule=plan.opinion.rule,
        labels=labels,
        log_odds=plan.log_odds,
    )


def after_test(
    order: Rows, drawn: Bools, answers: Columns, column: int, wanted: Wanted
) -> Generator[Rows, Columns, tuple[int, int]]:
    """The questions after the test. They depend on the arguments and on the further answers alone.

    Args:
        order: `(R,)` images that were not asked before the test, least likely first.
        drawn: `(R,)`, whether an image of the order was drawn for the test.
        answers: `(N,)` answers so far; `NOBODY` for images without an answer. The further answers are written into this array.
        column: the class.
        wanted: what is promised.

    Yields:
        `(n,)` numbers of images to ask about.

    Receives:
        `(n,)` answers of the judge.

    Returns:
        `Found.begin` and `Found.end`.
    """
    accepted = np.zeros(len(order), dtype=bool)
    if wanted.precision is not None:
        others = (answers[order] != column)[::-1]
        share = complement(wanted.precision)
        length = precise_prefix(drawn[::-1], others, share=share, level=wanted.level)
        accepted[len(order) - length :] = True
    begin = end = len(order) - int(accepted.sum())
    step = -(-len(order) // STEPS)
    sure = _surely_positive(accepted, drawn, answers[order] == column, wanted)
    while True:
        positive = (answers[order] == column) | (answers[order] == NOBODY)
        known = int((answers == column).sum()) + sure
        prefix = longest_prefix(drawn, drawn & positive, allowed=wanted.missable(known), level=wanted.level)
        if prefix >= begin:
            return begin, end
        following, begin = begin, max(prefix, begin - step)
        rows = order[begin:following][~drawn[begin:following]]
        if len(rows):
            answers[rows] = yield rows


def _most_probable_others(images: Images, column: int) -> Columns:
    """`(N,)` columns of the most probable class of each image, except one class."""
    labels = np.empty(len(images), dtype=np.int64)
    for some in images.chunks():
        log_probs, _ = images.scored(some)
        log_probs[:, column] = -np.inf
        labels[some] = log_probs.argmax(axis=1)
    return labels


def _surely_positive(accepted: Bools, drawn: Bools, positive: Bools, wanted: Wanted) -> int:
    """The least number of positive images among the accepted ones that are not asked about, if the promise of precision holds."""
    if wanted.precision is None:
        return 0
    length, asked = int(accepted.sum()), accepted & drawn
    wrong = math.floor((1 - Fraction(str(wanted.precision))) * length) - int((asked & ~positive).sum())
    return max(0, length - int(asked.sum()) - max(0, wrong))
