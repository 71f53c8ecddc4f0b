"""Targets with guarantees: how sure an answer must be to be accepted, that few enough of the accepted ones are wrong.

Learn then test (Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve
Risk Control", 2021), for selective prediction. Of every threshold of a grid it is tested, on labelled images that nothing was
fitted on, whether more than the target of the answers accepted there are wrong. Among n accepted images the number of wrong
ones is binomial; the p-value is the probability of as few or fewer at the target. The tests are in a fixed sequence, from
the strictest threshold on, and end with the first that fails, so every one may be at the full level (fixed-sequence testing).

The grid is fixed beforehand and the order too: the best of many thresholds tried on these images would be chosen for being
lucky. The sequence begins where enough images are accepted that the test could be passed, and a quarter of all: one
wrong answer among the very surest would end it. That looks at how many are accepted, not at how many of them are wrong, and
is exact where the share of wrong answers among the accepted never falls as the threshold is lowered, which is what a
confidence is for.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtri, expit

from cascadevlm.base.errors import InputError
from cascadevlm.decision.judge_model import Bools

GRID = np.append(expit(np.arange(140, -70, -1) / 10), 0.0)
"""Thresholds, strictest first: steps of 0.1 in the log-odds, from 1 - 8e-7 to 0.001, and last 0, which accepts all."""

LEAST_SHARE = 0.25
"""Of the images, to be accepted at the first threshold that is tested."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Which answers are accepted; from the others the cascade abstains.

    Attributes:
        target_error: the largest share of accepted answers that may be wrong.
        confidence: how probable, at least, it is over draws of the labelled images that no more are.
        images: how many labelled images there were.
        threshold: the lowest confidence that is accepted; None where the images support no threshold. Of thresholds that
            accept the same of the images, the strictest.
        accepted: the share of the images that is accepted.
        error: the share of these that is wrong; None where there are none.
        bound: the upper limit of the true share, one-sided, at ``confidence`` (Clopper and Pearson 1934); None as well.
    """

    target_error: float
    confidence: float
    images: int
    threshold: float | None
    accepted: float = 0.0
    error: float | None = None
    bound: float | None = None

    def accepts(self, confidences: NDArray[np.floating]) -> Bools:
        """N booleans; NaN, where there is no answer, is never accepted."""
        return confidences >= (math.inf if self.threshold is None else self.threshold)

    def describe(self) -> str:
        """In one sentence."""
        promise = f"{self.target_error:.3g} wrong with confidence {self.confidence:.3g}"
        if self.threshold is None:
            least = least_images(self.target_error, self.confidence)
            return (
                f"The {self.images} labelled images do not support at most {promise} at any threshold; "
                f"that takes at least {least} accepted images if all are right, and more if not."
            )
        return (
            f"At most {promise}: accept from {self.threshold:.3g} on. That is {self.accepted:.1%} of {self.images} labelled "
            f"images, {self.error:.1%} of them wrong; the true share is up to {self.bound:.1%}."
        )


def require_probability(name: str, value: float) -> None:
    """Refuse a value that is not strictly between 0 and 1.

    Raises:
        InputError: if the value is out of this range.
    """
    if not 0 < value < 1:
        raise InputError(f"{name} must be between 0 and 1, and is {value!r}.")


def least_images(target_error: float, confidence: float) -> int:
    """How many accepted images, all of them right, it takes to support a target: (1 - target)^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - target_error))


def fit_acceptance(
    confidences: NDArray[np.floating], right: Bools, *, target_error: float, confidence: float = 0.95
) -> Acceptance:
    """The lowest threshold that the error among accepted answers is at most the target at, with so much confidence.

    Args:
        confidences: N, of the final answers, from 0 to 1, of labelled images that nothing was fitted on; NaN where there is
            no answer.
        right: N, whether the answer is the truth.

    Raises:
        InputError: if target or confidence is not between 0 and 1.
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
