"""The shares of the classes, followed in a run: images to come need not have those of the images of the calibration.

A classifier that is calibrated where a class has one share is calibrated where it has another, if its probability of the class
is multiplied by the ratio of the two and all are normalised; and the new share is the mean of the probabilities that result
(Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities: a simple procedure",
Neural Computation 14, 2002). Here the mean is of what is believed after the judges' verdicts, over the images seen so far, older
ones counting less and less, and those of the calibration. It supposes that the classes look as they did; `Drift` is for other
changes.

Verdicts come in any order, predictions do not: a period of so many images goes by the predictions of those before its
predecessor, whatever the judges' latencies. So a run has at most two periods under way.
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
"""Images, or a batch if it is larger."""

MEMORY = 4096
"""Images after which an image counts for 1/e: the share of a class of a tenth is then known to half a point."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What part of the images of a calibration each of C classes is believed to be, and how many these were."""

    images: int
    shares: StoredFloats

    @classmethod
    def of(cls, probabilities: Floats) -> "Shares":
        """Of N x C probabilities of the images; no class is impossible, as if one image more had been all classes alike."""
        images, classes = probabilities.shape
        return cls(images=images, shares=(probabilities.sum(axis=0) + 1 / classes) / (images + 1))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Sums of C beliefs over the images of a run.

    Attributes:
        length: images of a period; 0 before there were images.
        period: that the last image was in, from 0 on.
        earlier: sum over the periods before the previous one, faded; nothing, before there were images.
        previous: over the previous period.
        current: over this one, so far.
    """

    length: int = 0
    period: int = 0
    earlier: tuple[float, ...] = ()
    previous: tuple[float, ...] = ()
    current: tuple[float, ...] = ()


class Following:
    """The shares of a run under way.

    Args:
        calibrated: those that its scores are calibrated for.
        seen: what was seen of the run before.
        batch_size: of the run.

    Raises:
        InputError: if the run was begun with batches of another size, above `PERIOD`, as its periods are longer or shorter then.
    """

    def __init__(self, calibrated: Shares, seen: Seen, batch_size: int) -> None:
        self.calibrated = calibrated
        self.length = max(PERIOD, batch_size)
        nothing = (0.0,) * len(calibrated.shares)
        self.seen = seen if seen.length else Seen(length=self.length, earlier=nothing, previous=nothing, current=nothing)
        if self.seen.length != self.length:
            raise InputError(
                f"The shares of classes were followed in batches of {self.seen.length} images so far, not of {batch_size}.",
                hint="Go on with the batch_size that the run was begun with.",
            )
        self._entered = asyncio.Condition()
        period = self.seen.period
        self._shifts = {period: self._shift(self.seen.earlier), period + 1: self._shift(self._summed())}

    async def adjusted(self, scores: Scores, begin: int) -> Scores:
        """The scores of a batch that begins with an image of this number, by the shares that hold there; waits until these are
        known."""
        period = begin // self.length
        async with self._entered:
            await self._entered.wait_for(lambda: period in self._shifts)
        log_probs = log_softmax(scores.log_probs + self._shifts[period], axis=1)
        return replace(scores, log_probs=log_probs.astype(np.float32))

    async def take(self, beliefs: Sequence[NDArray[np.float32]], begin: int) -> None:
        """Add the `(C,)` probabilities that are believed of each image of a batch. Batches come in the order of the run."""
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
        """C: over the periods before the current one, what will be the earlier ones in the next."""
        return tuple((np.exp(-self.length / MEMORY) * np.array(self.seen.earlier) + self.seen.previous).tolist())

    def _shift(self, earlier: tuple[float, ...]) -> Floats:
        """C nats, by which log-probabilities are higher."""
        now = self.calibrated.images * self.calibrated.shares + earlier
        shift: Floats = np.log(now / now.sum() / self.calibrated.shares)
        return shift
