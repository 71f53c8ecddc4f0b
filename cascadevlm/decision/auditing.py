"""An audit: further questions about kept images, for as long as images come.

The images are cut into blocks of consecutive images. From each block, one image is drawn at random. If its label was kept without
a question, the judge is asked about it. The share of all images that were kept with another label than the judge's is the mean
of the blocks' shares. A confidence sequence bounds this mean from below at all times at once, so it may be looked at after each
answer (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970; Howard et al., "Time-uniform Chernoff
bounds via nonnegative supermartingales", 2020).

When the lower bound is above the share that was promised, the run escalates all later images, after a lag (`Watch`). The sequence
stays valid, because whether a label is kept never depends on a draw of the same block or of a later one. So a run learns nothing
from the answers of an audit.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from cascadevlm.base.errors import InputError
from cascadevlm.decision.guarantee import complement
from cascadevlm.decision.judge_model import Bools

TILTS = np.geomspace(0.02, 6, 80)
"""Log-odds by which images may disagree more often than promised. The sequence is a mixture over these values."""

PERIOD = 128
"""Images of the shortest period of a `Watch`."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The images that are drawn for an audit: one of each block of consecutive images. They depend on the attributes alone.

    Attributes:
        share: share of the images that are drawn, above 0 and at most 1. A block has 1 / share images, rounded.
        seed: seed of the draws.
        agree: least share of the labels that must be the judge's. Default: nothing is promised.
        confidence: least probability that a promise that is kept is never said to be broken.

    Raises:
        InputError: if the share is out of its range.
    """

    share: float
    seed: int = 0
    agree: float | None = None
    confidence: float = 0.95

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

    def least(self, images: int, disagreements: int) -> float:
        """Lower end of the confidence sequence for the share of all labels that are kept and not the judge's.

        Audited images do not count, because the audit corrected their labels.

        Args:
            images: number of images so far.
            disagreements: number of drawn images that disagree so far.
        """
        lower = Audit(asked=self.count(images), disagreements=disagreements).lower(complement(self.confidence))
        return max(0.0, lower - disagreements / images) if images else 0.0

    def is_broken(self, images: int, disagreements: int) -> bool:
        """True if the audit shows that fewer labels are the judge's than must be. Arguments: as for `least`."""
        return self.agree is not None and self.least(images, disagreements) > 1 - self.agree


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


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What the audit of a run has found at a position. With it, a run goes on as if it had not been left.

    Attributes:
        length: number of images of a period; 0 before the first image.
        images: number of readable images before the position.
        disagreements: number of drawn images that disagree.
        escalated_from: number of the first readable image that is escalated because the promise is broken; None if it is not.
    """

    length: int = 0
    images: int = 0
    disagreements: int = 0
    escalated_from: int | None = None


class Watch:
    """The audit of a run under way. If the audit shows a broken promise, every image is escalated from the period after the next
    one on. So no image waits for the answers of its own period or of the period before, and which images are escalated depends
    on the order of the images alone, never on how fast the answers come.

    A period is at least as long as a block, so that no decision depends on a draw of its own block.

    Args:
        sampling: the audit.
        watched: what was found at the position where the run goes on.
        batch_size: of the run.

    Attributes:
        watched: what was found up to the latest image.

    Raises:
        InputError: if the run was started with periods of another length, because of another batch size.
    """

    def __init__(self, sampling: Sampling, watched: Watched, batch_size: int) -> None:
        self.sampling = sampling
        length = max(PERIOD, sampling.length, batch_size)
        self.watched = watched if watched.length else Watched(length=length)
        if self.watched.length != length:
            raise InputError(
                f"The audit of this run has periods of {self.watched.length} images, and batch_size = {batch_size} makes periods "
                f"of {length}.",
                hint="Continue with the batch_size that the run was started with.",
            )
        self._taken = asyncio.Condition()

    async def escalated(self, begin: int, end: int) -> Bools:
        """`(end - begin,)` booleans: the image is escalated because the promise is broken. Waits until that is known.

        Args:
            begin: number of the first readable image of a batch.
            end: number of the first readable image after the batch.
        """
        period = (end - 1) // self.watched.length
        async with self._taken:
            await self._taken.wait_for(lambda: self.watched.images >= (period - 1) * self.watched.length)
        first = self.watched.escalated_from
        return np.arange(begin, end) >= (end if first is None else first)

    async def take(self, differing: Sequence[bool]) -> None:
        """Add the readable images of a batch, in order. ``differing``: the image was drawn and disagrees."""
        for differs in differing:
            images, found = self.watched.images + 1, self.watched.disagreements + differs
            self.watched = replace(self.watched, images=images, disagreements=found)
            if differs and self.watched.escalated_from is None and self.sampling.is_broken(images, found):
                period = (images - 1) // self.watched.length
                self.watched = replace(self.watched, escalated_from=(period + 2) * self.watched.length)
        async with self._taken:
            self._taken.notify_all()
