"""The law of a certificate: how many of the surest answers may stand without asking the judge.

There are N images. The cascade has an answer and a confidence for each of them without asking. The certificate promises that at
most W = N - ceil(T N) of the final answers are not the judge's.

Some images are asked first, to learn from their answers. Order the R other images, surest first. The order may depend on the
answers to the first images, and on no other answer of the judge. Then draw n of the R images at random without replacement, and
ask the judge about them. An image disagrees if the judge's answer is not the cascade's, or if the judge gives no answer. Keep
the longest prefix of the order that has at most c drawn images that disagree, and ask about all other images. A drawn image has
the judge's answer. So the final answers that are not the judge's are those of images that disagree and are kept.

Proof that at most W such images are kept, with a probability of at least 1 - level. Suppose that more than W are kept. Then go
through the images that disagree in the order of the prefix, up to number W + 1 + c. Among these W + 1 + c images, at most c are
drawn: if c + 1 of them were drawn, the prefix would end before it has W + 1 that are not drawn. These images are fixed before the
draw. So the number of drawn ones is hypergeometric, and c is chosen such that

    P(at most c of W + 1 + c images are drawn) = hypergeom.cdf(c; R, W + 1 + c, n) <= level.

With fewer than W + 1 + c images that disagree, the probability is smaller. The proof needs no assumption about the order: a bad
order costs questions, and does not break the promise. All prefixes are covered at once, because c does not depend on the prefix.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cascadevlm.base.arrays import Columns
from cascadevlm.decision.guarantee import complement, require_probability
from cascadevlm.decision.judge_model import Bools

T = TypeVar("T")

Rows = NDArray[np.intp]

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a certificate promises.

    Attributes:
        agreement: T, the least share of images whose final answer is the judge's, above 0 and below 1.
        confidence: the least probability that the promise is kept, above 0 and below 1.

    Raises:
        InputError: if a number is out of its range.
    """

    agreement: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require_probability("agreement", self.agreement)
        require_probability("confidence", self.confidence)

    @property
    def level(self) -> float:
        """The largest probability that the promise is broken."""
        return complement(self.confidence)

    def allowed(self, images: int) -> int:
        """W, the number of final answers that may not be the judge's: N - ceil(T N), exact for a decimal T."""
        return images - math.ceil(Fraction(str(self.agreement)) * images)


def driven(rule: Generator[Rows, Columns, T], answers: Columns) -> T:
    """The result of a rule that yields numbers of images to ask about. ``answers``: `(N,)`, the answers to all questions."""
    try:
        rows = next(rule)
        while True:
            rows = rule.send(answers[rows])
    except StopIteration as ended:
        result: T = ended.value
        return result


def draw(numbers: Rows, count: int, seed: int) -> Bools:
    """`(R,)` booleans: the images of the order that are drawn for the test. They depend on the three arguments alone.

    Args:
        numbers: `(R,)`, numbers of the images of the order, among all images of the run.
        count: n, number of images to draw, at most R.
        seed: seed of the run.
    """
    drawn = np.zeros(len(numbers), dtype=bool)
    drawn[shuffled(numbers, seed, stream=1)[:count]] = True
    return drawn


def shuffled(numbers: Rows, seed: int, *, stream: int) -> Rows:
    """`(N,)` positions of N images in a random order.

    Each image has a random key, which depends on its number, the seed and the stream alone. The images are in the order of their
    keys. So the order of the other images stays the same if an image is added or removed.

    Args:
        numbers: `(N,)`, numbers of the images, all different.
        seed: seed of the run.
        stream: number of an independent stream of keys.
    """
    keys = np.random.default_rng([seed, stream]).random(int(numbers.max(initial=-1)) + 1)
    return np.argsort(keys[numbers], kind="stable")


def most_found(images: int, drawn: Counts, *, allowed: int, level: float) -> Counts:
    """c, the largest number of drawn images that may disagree in a prefix that is kept; -1 if no prefix passes the test.

    Args:
        images: R, number of images in the order.
        drawn: `(K,)`, numbers n of images that might be drawn from the order.
        allowed: W, number of kept answers that may not be the judge's.
        level: largest probability that more than W such answers are kept.

    Returns:
        `(K,)`, c for each n.
    """
    least, most = np.full(drawn.shape, -1), drawn
    while (least < most).any():
        middle = (least + most + 1) // 2
        passed = chance_of_at_most(middle, images, np.minimum(allowed + 1 + middle, images), drawn) <= level
        least, most = np.where(passed, middle, least), np.where(passed, most, middle - 1)
    return np.where(images - drawn <= allowed, drawn, least)


def chance_of_at_most(found: ArrayLike, images: ArrayLike, marked: ArrayLike, drawn: ArrayLike) -> NDArray[np.float64]:
    """`(K,)`, the probability that at most `found` of `marked` images are drawn, if `drawn` of `images` images are drawn."""
    from scipy.stats import hypergeom  # a quarter of the time that it takes to import the whole framework

    chances: NDArray[np.float64] = hypergeom.cdf(found, images, marked, drawn)
    return chances


@lru_cache(maxsize=4096)
def most_found_of(images: int, drawn: int, *, allowed: int, level: float) -> int:
    """c for one number of drawn images: see `most_found`."""
    return int(most_found(images, np.array([drawn]), allowed=allowed, level=level)[0])


def longest_prefix(drawn: Bools, disagrees: Bools, *, allowed: int, level: float) -> int:
    """e, the length of the prefix that is kept. The first images that include W images that are not drawn need no test.

    Args:
        drawn: `(R,)`, whether an image of the order is drawn: see `draw`.
        disagrees: `(R,)`, whether the judge's answer is not the cascade's; only the values of drawn images are used.
        allowed: W, number of kept answers that may not be the judge's.
        level: largest probability that more than W such answers are kept.
    """
    untested = int(np.searchsorted(np.cumsum(~drawn), allowed, side="right"))
    most = most_found_of(len(drawn), int(drawn.sum()), allowed=allowed, level=level)
    found = np.flatnonzero(drawn & disagrees)
    if most < 0:
        return untested
    return max(untested, int(found[most]) if len(found) > most else len(drawn))
