"""What a run learns: the beliefs about the images so far teach the scorer about the images to come.

Learning starts from what the labelled images of a calibration teach, and adds each image of the run with what is believed of it
after its verdict. Scale and strength of what was learned are fitted again in each period: see `teaching`.

Verdicts come in any order, predictions do not: a period of images is scored with what was learned before its predecessor began,
whatever the latencies of the judges.
"""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.errors import InputError
from cascadevlm.decision.distinct import NONE, Distinct, Keys
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.means import Sums, widened
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.decision.teaching import UNJUDGED, Labelled, Taught, Transduced

PERIOD, LONGEST, GROWTH = 128, 4096, 8
"""Images of the shortest and of the longest period. Between these, a period has an eighth of the images before it, so that the
cost of learning per image falls in a long run."""

AT_ONCE = 256
"""Images of a period whose sums are computed together."""

LEAST = 1e-30
"""The least probability that a belief is read as."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What a run has learned at the beginning of a period; with it, a run goes on as if it had not been left.

    Attributes:
        images: number of images of the run before the period.
        batch_size: of the run.
        before: P sums of the images before the previous period: what this period is scored with.
        sums: P sums of the images before this period.
        keys: keys of the images before this period (`Distinct`).
    """

    images: int = 0
    batch_size: int
    before: Sums
    sums: Sums
    keys: Keys = field(default_factory=lambda: NONE)


class Learning:
    """The learning of a run under way.

    Args:
        labelled: the labelled images of the calibration.
        batch_size: of the run.
        start: what the run had learned at the beginning of the period that it goes on with.
        unlabelled: what the images of the run taught before the run, if they are known beforehand. Each image is taken out of
            these sums when the run adds it with its verdict.

    Attributes:
        learned: at the beginning of the current period: what a checkpoint keeps.

    Raises:
        InputError: if the run was begun with batches of another size, as its periods are then others.
    """

    def __init__(
        self,
        labelled: Labelled,
        batch_size: int,
        *,
        start: Learned | None = None,
        unlabelled: Transduced | None = None,
    ) -> None:
        beginning = labelled.nothing() if unlabelled is None else unlabelled.sums
        self.labelled, self.unlabelled = labelled, unlabelled
        self.learned = start or Learned(batch_size=batch_size, before=beginning, sums=beginning)
        if self.learned.batch_size != batch_size:
            raise InputError(
                f"The run has learned in batches of {self.learned.batch_size} images so far, not of {batch_size}.",
                hint="Continue with the batch_size that the run began with.",
            )
        self._sums = self.learned.sums
        self._distinct = Distinct(self.learned.keys)
        self._waiting: list[tuple[NDArray[np.floating], NDArray[np.floating], Floats]] = []
        self._entered = asyncio.Condition()
        begin, taught = self.learned.images, self._teach(self.learned.sums)
        began = taught if self.learned.before is self.learned.sums else self._teach(self.learned.before)
        self._taught = {begin: began, self._next(begin): taught}

    def period_of(self, begin: int) -> int:
        """Number of images before the period of the batch that begins with image number ``begin``."""
        period = self.learned.images
        while (following := self._next(period)) <= begin:
            period = following
        return period

    async def taught(self, begin: int) -> Taught:
        """What the batch that begins with image number ``begin`` is scored with; waits until it is known."""
        period = self.period_of(begin)
        async with self._entered:
            await self._entered.wait_for(lambda: period in self._taught)
        return self._taught[period]

    async def take(
        self,
        log_probs: NDArray[np.floating],
        embeddings: NDArray[np.floating],
        beliefs: NDArray[np.floating],
        judged: Bools,
        begin: int,
        keys: Keys | None = None,
    ) -> None:
        """Add the images of a batch; batch by batch, in order. Images that came before in the run are left out.

        Args:
            log_probs: `(N, C)`, the scorer's, not calibrated.
            embeddings: `(N, D)`, of unit length.
            beliefs: `(N, C)` probabilities after the verdicts, before any shift to other shares of the classes; one-hot where a
                person gave the label. Rows of images that are not judged are not looked at.
            judged: `(N,)`, whether a judge or a person said something.
            begin: number of images of the run before the batch, with those that are unreadable.
            keys: `(N,)`. Default: all images are different.
        """
        period = self.period_of(begin)
        if period > self.learned.images:
            await self._enter(period)
        new = np.ones(len(embeddings), dtype=bool) if keys is None else self._distinct.take(keys)
        if not new.any():
            return
        log_probs, beliefs, judged = log_probs[new], beliefs[new], judged[new]
        images, weights = widened(embeddings[new]), np.where(judged, 1.0, UNJUDGED)
        opinions = self._taught[period].opinions(log_probs, images)
        said = np.log(np.maximum(beliefs[judged], LEAST)) - opinions[-1, judged]
        opinions[:, judged] = log_softmax(opinions[:, judged] + said, axis=-1)
        weighted = np.exp(opinions) * weights[:, None].astype(opinions.dtype)
        if self.unlabelled is not None:
            weighted -= UNJUDGED * np.exp(self.unlabelled.rule.opinions(log_probs, images))
            weights -= UNJUDGED
        self._waiting.append((images, weighted, weights))
        if sum(len(each) for each, _, _ in self._waiting) >= AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Add the images that wait. Few large products are faster than many small ones."""
        if self._waiting:
            images, weighted, weights = zip(*self._waiting, strict=True)
            self._waiting.clear()
            x, w = np.concatenate(images), np.concatenate(weights)
            seconds = (x * w[:, None]).T @ x
            self._sums = self._sums + Sums.weighted(x, np.concatenate(weighted, axis=1), w, seconds)

    def again(self) -> Taught:
        """What all images so far teach: for a finished run, whose images are then decided on anew without a question."""
        self._add_waiting()
        return self._teach(self._sums)

    async def _enter(self, period: int) -> None:
        """Begin a period: what was learned before it is what the next one is scored with."""
        earlier = self.learned.images
        self._add_waiting()
        self.learned = replace(self.learned, images=period, before=self.learned.sums, sums=self._sums, keys=self._distinct.keys())
        taught = await asyncio.to_thread(self._teach, self._sums)
        async with self._entered:
            self._taught[self._next(period)] = taught
            del self._taught[earlier]
            self._entered.notify_all()

    def _teach(self, sums: Sums) -> Taught:
        return self.labelled.taught(sums, () if self.unlabelled is None else self.unlabelled.fold)

    def _next(self, period: int) -> int:
        """Number of images before the period that follows a period: whole batches."""
        batch = self.learned.batch_size
        length = min(max(PERIOD, period // GROWTH), LONGEST)
        return period + -(-length // batch) * batch
