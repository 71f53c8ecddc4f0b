"""An audit: further questions about kept images, for as long as images come.

The images are cut into blocks of consecutive images. From each block, one image is drawn at random. If its label was kept without
a question, the judge is asked about it. The share of all images that were kept with another label than the judge's is the mean
of the blocks' shares. A confidence sequence bounds this mean from below at all times at once, so it may be looked at after each
answer (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970; Howard et al., "Time-uniform Chernoff
bounds via nonnegative supermartingales", 2020).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from cascadevlm.base.errors import InputError
from cascadevlm.decision.judge_model import Bools

TILTS = np.geomspace(0.02, 6, 80)
"""Log-odds by which images may disagree more often than promised. The sequence is a mixture over these values."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The images that are drawn for an audit: one of each block of consecutive images. They depend on the attributes alone.

    Attributes:
        share: share of the images that are drawn, above 0 and at most 1. A block has 1 / share images, rounded.
        seed: seed of the draws.

    Raises:
        InputError: if the share is out of its range.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"The share of the audit must be above 0 and at most 1, not {self.share!r}.")

    @property
    def length(self) -> int:
        """Number of images of a block."""
        return round(1 / self.share)

    def _place(self, block: int) -> int:
        """Place of the drawn image in a block, from 0."""
        return int(np.random.default_rng([self.seed, 2, block]).integers(self.length))

    def drawn(self, begin: int, end: int) -> Bools:
        """`(end - begin,)` booleans: the images from number ``begin`` to before ``end`` that are drawn."""
        places = [self._place(block) + block * self.length for block in range(begin // self.length, -(-end // self.length))]
        return np.isin(np.arange(begin, end), places)

    def count(self, images: int) -> int:
        """Number of drawn images among the first images."""
        block, place = divmod(images, self.length)
        return block + (self._place(block) < place)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit has found so far.

    Attributes:
        asked: number of drawn images, one per block.
        disagreements: number of these images whose label was kept, and to which the judge did not give this label.
    """

    asked: int = 0
    disagreements: int = 0

    def lower(self, level: float) -> float:
        """Lower end of the confidence sequence for the share of the images that were kept and disagree.

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
