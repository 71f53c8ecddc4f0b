"""An audit: further questions about kept images, for as long as images come.

The kept images are cut into blocks of consecutive images. From each block, one image is drawn at random, and the judge is
asked about it. The share of all kept images that disagree is the mean of the blocks' shares. A confidence sequence bounds this
mean from below at all times at once, so it may be looked at after each answer (Robbins, "Statistical methods related to the law
of the iterated logarithm", 1970; Howard et al., "Time-uniform Chernoff bounds via nonnegative supermartingales", 2020).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from cascadevlm.base.errors import InputError

TILTS = np.geomspace(0.02, 6, 80)
"""Log-odds by which images may disagree more often than promised. The sequence is a mixture over these values."""


def block_length(share: float) -> int:
    """Number of kept images per audited image.

    Args:
        share: share of the kept images that is audited, above 0 and at most 1.

    Raises:
        InputError: if the share is out of its range.
    """
    if not 0 < share <= 1:
        raise InputError(f"The share of the audit must be above 0 and at most 1, not {share!r}.")
    return round(1 / share)


def audited(share: float, seed: int) -> Iterator[bool]:
    """For one kept image after another, whether the judge is asked about the image: exactly one image per block.

    Args:
        share: share of the kept images that is audited.
        seed: seed of the run. The same seed gives the same images.
    """
    length, block = block_length(share), 0
    while True:
        chosen = int(np.random.default_rng([seed, 2, block]).integers(length))
        yield from (place == chosen for place in range(length))
        block += 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit has found so far.

    Attributes:
        asked: number of audited images with an answer, a refusal or a failure, one per block.
        disagreements: number of these images where the judge did not give the kept answer.
    """

    asked: int = 0
    disagreements: int = 0

    def lower(self, level: float) -> float:
        """Lower end of the confidence sequence for the share of the kept images that disagree.

        The result is the largest p with a mean over `TILTS` s of exp(s k) / (1 + p (exp(s) - 1))^n of at least 1 / level. For
        every s, the fraction is a supermartingale if p is at least the mean of the blocks' shares, also where the shares of
        the blocks differ, because log(1 + p (exp(s) - 1)) is concave in p.

        Args:
            level: largest probability that the true mean is ever below the result.
        """
        if not self.disagreements:
            return 0.0
        exponents = TILTS * self.disagreements

        def evidence(mean: float) -> float:
            return float(logsumexp(exponents - self.asked * np.log1p(mean * np.expm1(TILTS))) - math.log(len(TILTS) / level))

        return float(brentq(evidence, 0.0, self.disagreements / self.asked)) if evidence(0.0) > 0 else 0.0
