"""Guarantees: finds the lowest probability of accepted answers such that only few accepted answers are wrong.

The method is learn then test, applied to selective prediction (Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test:
Calibrating Predictive Algorithms to Achieve Risk Control", 2021). It needs labelled images that nothing was fitted on.

Each threshold of a grid is tested: the hypothesis is that more than the target share of the answers accepted at this threshold
are wrong. The number of wrong answers among n accepted images is binomial. The p-value is the probability of at most the
observed number of wrong answers if their true share is the target. The tests start at the strictest threshold and end at the
first test that fails. Because this order is fixed, each test can use the full level (fixed-sequence testing).

The grid and the order are fixed before the images are seen. The best of many thresholds on the same images would be partly luck.
The sequence starts at the first threshold that accepts a quarter of the images, and enough images to pass the test. With fewer
accepted images, one wrong answer among the most probable ones would end the sequence. The start depends only on the number of
accepted images, and not on the number of wrong ones. The guarantee is exact if the share of wrong answers among the accepted
never falls when the threshold is lowered. Calibrated probabilities are meant to have this property.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtri, expit

from cascadevlm.base.errors import InputError
from cascadevlm.decision.judge_model import Bools

GRID = np.append(expit(np.arange(140, -70, -1) / 10), 0.0)
"""Thresholds, strictest first: from 1 - 8e-7 to 0.001 in steps of 0.1 of the log-odds, and 0, which accepts all images."""

LEAST_SHARE = 0.25
"""Smallest share of the images that the first tested threshold accepts."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Which answers are accepted. The cascade abstains from the others.

    Attributes:
        target_error: the largest share of accepted answers that may be wrong.
        confidence: probability, over draws of the labelled images, that at most this share is wrong.
        images: number of labelled images.
        threshold: the lowest probability that is accepted; None if the images support no threshold. If several thresholds accept
            the same images, this is the strictest.
        accepted: share of the images that is accepted.
        error: share of the accepted images that is wrong; None without a threshold.
        bound: one-sided upper limit of the true share of wrong answers at ``confidence`` (Clopper and Pearson 1934); None without
            a threshold.
    """

    target_error: float
    confidence: float
    images: int
    threshold: float | None
    accepted: float = 0.0
    error: float | None = None
    bound: float | None = None

    def accepts(self, confidences: NDArray[np.floating]) -> Bools:
        """``(N,)`` booleans: the answer is accepted. A probability of NaN means no answer, which is never accepted."""
        return confidences >= (math.inf if self.threshold is None else self.threshold)

    def describe(self) -> str:
        """The guarantee in words, or the reason why there is none."""
        wrong, sure = 100 * self.target_error, 100 * self.confidence
        promise = f"at most {wrong:.4g} % of the accepted answers are wrong, with {sure:.4g} % confidence"
        if self.threshold is None:
            least = least_images(self.target_error, self.confidence)
            return (
                f"With {self.images} labelled images, no threshold guarantees that {promise}. "
                f"The guarantee needs at least {least} accepted images without a wrong answer, or more with some wrong answers."
            )
        return (
            f"Answers with a probability of at least {self.threshold:.3g} are accepted: {promise}. These are "
            f"{self.accepted:.1%} of {self.images} labelled images; {self.error:.1%} of them are wrong, and the upper limit of "
            f"the true share is {self.bound:.1%}."
        )


def complement(share: float) -> float:
    """1 minus a share, exact for a decimal share: 0.05 for 0.95."""
    return float(1 - Fraction(str(share)))


def require_probability(name: str, value: float) -> None:
    """Refuse a value that is not strictly between 0 and 1.

    Raises:
        InputError: if the value is out of this range.
    """
    if not 0 < value < 1:
        raise InputError(f"{name} must be between 0 and 1, not {value!r}.")


def least_images(target_error: float, confidence: float) -> int:
    """Smallest number of accepted images, all of them right, that supports a target: (1 - target)^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - target_error))


def fit_acceptance(
    confidences: NDArray[np.floating], right: Bools, *, target_error: float, confidence: float = 0.95
) -> Acceptance:
    """The lowest threshold at which the error among accepted answers is at most the target, with the given confidence.

    Args:
        confidences: ``(N,)`` probabilities of the final answers to labelled images that nothing was fitted on; NaN for no answer.
        right: ``(N,)`` booleans: the answer is the truth.
        target_error: the largest share of accepted answers that may be wrong, between 0 and 1.
        confidence: probability that the guarantee holds, between 0 and 1.

    Raises:
        InputError: if the target or the confidence is not between 0 and 1.
    """
    require_probability("target_error", target_error)
    require_probability("confidence", confidence)
    strictest = np.searchsorted(-GRID, -confidences)
    accepted, wrong = (
        np.bincount(strictest[counted], minlength=len(GRID) + 1)[: len(GRID)].cumsum()
        for counted in (np.ones(len(right), dtype=bool), ~right)
    )
    enough = accepted >= max(least_images(target_error, confidence), LEAST_SHARE * len(right))
    passed = bdtr(wrong, np.maximum(accepted, 1), target_error) <= 1 - confidence
    supported = (enough & np.logical_and.accumulate(passed | ~enough)).nonzero()[0]
    if not supported.size:
        return Acceptance(target_error=target_error, confidence=confidence, images=len(right), threshold=None)
    lowest = np.searchsorted(accepted, accepted[supported[-1]])
    images, errors = int(accepted[lowest]), int(wrong[lowest])
    return Acceptance(
        target_error=target_error,
        confidence=confidence,
        images=len(right),
        threshold=float(GRID[lowest]),
        accepted=images / len(right),
        error=errors / images,
        bound=float(bdtri(errors, images, 1 - confidence)),
    )
