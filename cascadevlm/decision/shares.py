"""Follows the shares of the classes in a run, which can differ from their shares among the images of the calibration.

Suppose that a classifier is calibrated for one share of a class, and the images have another share. Multiply its probability of
the class by the ratio of the new share to the old share, and normalise: then it is calibrated for the new share. The new share is
the mean of the resulting probabilities (Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori
probabilities: a simple procedure", Neural Computation 14, 2002).

Here the mean is over the probabilities after the judges' verdicts. It includes the images of the calibration and the images of
the run so far; older images of the run count less. The method assumes that the images of each class still look the same. `Drift`
detects other changes.

A run is divided into periods, blocks of consecutive images. Each period uses shares estimated from all periods except the one
directly before it. So the predictions do not depend on the order in which verdicts arrive, and at most two periods are open.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.errors import InputError
from cascadevlm.base.types import Scores
from cascadevlm.decision.scorer_calibration import Floats, StoredFloats

PERIOD = 256
"""Number of images of a period. If a batch is larger, a period is one batch."""

MEMORY = 4096
"""After this number of images, an image counts 1/e. The share of a class with 10 % is then known to about 0.5 points."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Estimated shares of the classes among the images of a calibration.

    Attributes:
        images: number of images of the calibration.
        shares: ``(C,)`` shares with sum 1.
    """

    images: int
    shares: StoredFloats

    @classmethod
    def of(cls, probabilities: Floats) -> "Shares":
        """The mean of ``(N, C)`` probabilities of the images and one more row of equal probabilities, so that no share is 0."""
        images, classes = probabilities.shape
        return cls(images=images, shares=(probabilities.sum(axis=0) + 1 / classes) / (images + 1))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Sums of class probabilities over the images of a run. Each sum has C numbers, or none before the first image.

    Attributes:
        length: number of images of a period; 0 before the first image.
        period: number of the period of the last image, from 0.
        earlier: sum over the periods before the previous period; older periods count less.
        previous: sum over the previous period.
        current: sum over the images of the current period so far.
    """

    length: int = 0
    period: int = 0
    earlier: tuple[float, ...] = ()
    previous: tuple[float, ...] = ()
    current: tuple[float, ...] = ()


class Following:
    """Follows the shares of the classes during a run.

    Args:
        calibrated: the shares for which the scores are calibrated.
        seen: the sums over the images of the run so far.
        batch_size: number of images of a batch.

    Raises:
        InputError: if the run was started with another length of periods, because of another batch size above `PERIOD`.
    """

    def __init__(self, calibrated: Shares, seen: Seen, batch_size: int) -> None:
        self.calibrated = calibrated
        self.length = max(PERIOD, batch_size)
        nothing = (0.0,) * len(calibrated.shares)
        self.seen = seen if seen.length else Seen(length=self.length, earlier=nothing, previous=nothing, current=nothing)
        if self.seen.length != self.length:
            raise InputError(
                f"This run follows the class shares in periods of {self.seen.length} images, and batch_size = {batch_size} "
                f"makes periods of {self.length}.",
                hint="Continue with the batch_size that the run was started with.",
            )
        self._entered = asyncio.Condition()
        period = self.seen.period
        self._shifts = {period: self._shift(self.seen.earlier), period + 1: self._shift(self._summed())}

    async def adjusted(self, scores: Scores, begin: int) -> Scores:
        """The scores of a batch, adjusted to the class shares of its period. Waits until these shares are known.

        Args:
            scores: the scores of the batch.
            begin: number of the first image of the batch in the run.
        """
        period = begin // self.length
        async with self._entered:
            await self._entered.wait_for(lambda: period in self._shifts)
        log_probs = log_softmax(scores.log_probs + self._shifts[period], axis=1)
        return replace(scores, log_probs=log_probs.astype(np.float32))

    async def take(self, beliefs: Sequence[NDArray[np.float32]], begin: int) -> None:
        """Add the class probabilities after the verdicts of a batch. Batches are added in order.

        Args:
            beliefs: one row `(C,)` of probabilities per image.
            begin: number of the first image of the batch in the run.
        """
        period = begin // self.length
        if period > self.seen.period:
            nothing = (0.0,) * len(self.seen.current)
            self.seen = replace(self.seen, period=period, earlier=self._summed(), previous=self.seen.current, current=nothing)
            async with self._entered:
                self._shifts[period + 1] = self._shift(self._summed())
                del self._shifts[period - 1]
                self._entered.notify_all()
        sums = np.sum(beliefs, axis=0, dtype=np.float64)
        self.seen = replace(self.seen, current=tuple(np.add(self.seen.current, sums).tolist()))

    def _summed(self) -> tuple[float, ...]:
        """``(C,)`` sums over all periods before the current one; they are ``earlier`` in the next period."""
        return tuple((np.exp(-self.length / MEMORY) * np.array(self.seen.earlier) + self.seen.previous).tolist())

    def _shift(self, earlier: tuple[float, ...]) -> Floats:
        """``(C,)`` numbers in nats to add to the log-probabilities."""
        now = self.calibrated.images * self.calibrated.shares + earlier
        shift: Floats = np.log(now / now.sum() / self.calibrated.shares)
        return shift
