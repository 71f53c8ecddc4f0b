"""What a run learns: the beliefs about the images so far teach the scorer about the images to come.

Learning starts from the labelled images of a calibration (`Labelled`), adds unlabelled images (`transduced`) and, in a run, each
image with what is believed of it after its verdict (`Learning`). `decision/means` has the estimate.

The scale and the strength of what was learned are fitted to the labelled images, again in each period. No label may then reach
its own image by any way: not through the calibration of the scorer, not through the sums, and not through the beliefs about other
images, which teach what they were taught. So everything is learned several times side by side: once from all labels, for the
predictions; and once without the labels of each fold, for the images of that fold. Otherwise the learned beliefs are
over-confident.

Verdicts come in any order, predictions do not: a period of images is scored with what was learned before its predecessor began,
whatever the latencies of the judges.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import InputError
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.means import Means, Sums, fit_strength
from cascadevlm.decision.scorer_calibration import CrossFit, Floats, ScorerCalibration, cross_fit_scorer, fold_of

PERIOD, LONGEST, GROWTH = 128, 4096, 8
"""Images of the shortest and of the longest period. Between these, a period has an eighth of the images before it, so that the
cost of learning per image falls in a long run."""

UNJUDGED = 0.3
"""Weight of an image that nobody was asked about; an image with a verdict or a label has weight 1."""

ROUNDS = 10
"""Of expectation and maximisation over unlabelled images."""

LEAST = 1e-30
"""The least probability that a belief is read as."""

Scored = tuple[NDArray[np.floating], NDArray[np.floating]]
"""`(N, C)` log-probabilities of the scorer as they come, not calibrated, and `(N, D)` unit embeddings of the same images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """What was learned, as one linear rule: log p = log softmax(own l + x W' + b).

    Attributes:
        own: factor of the scorer's log-probabilities l.
        weights: W, `(C, D) float32`.
        bias: b, `(C,) float64`.
    """

    own: float
    weights: NDArray[np.float32]
    bias: Floats

    def __call__(self, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> Floats:
        """`(N, C)` log-probabilities."""
        logits = self.own * np.asarray(log_probs, dtype=np.float64) + embeddings @ self.weights.T.astype(np.float64)
        found: Floats = log_softmax(logits + self.bias, axis=1)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught:
    """What was learned, P times side by side: without the labels of each fold, and, last, from all labels.

    Attributes:
        own: factor of the calibrated log-probabilities.
        strength: factor of the evidence.
        calibrations: P calibrations of the scorer.
        means: P estimates.
        held_out: `(n, C)` log-probabilities of the labelled images, each without its own label: for conformal thresholds and
            models of judges.
    """

    own: float
    strength: float
    calibrations: tuple[ScorerCalibration, ...]
    means: tuple[Means, ...]
    held_out: Floats

    def __call__(self, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> Floats:
        """`(N, C)` log-probabilities, from all labels."""
        return self._opinion(-1, log_probs, embeddings)

    def opinions(self, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> Floats:
        """`(P, N, C)` log-probabilities."""
        return np.stack([self._opinion(number, log_probs, embeddings) for number in range(len(self.means))])

    def linear(self) -> Linear:
        """The same as one rule on the scorer's log-probabilities.

        Raises:
            InputError: if the calibration mixes the scores of several classes: see `Labelled.of`.
        """
        calibration, means = self.calibrations[-1], self.means[-1]
        if calibration.mixing is not None:
            raise InputError(
                "A calibration with a matrix is no linear rule.", hint="Fit one without: Labelled.of(..., matrix=False)."
            )
        evidence = means.offsets - means.mean @ means.directions
        return Linear(
            own=self.own * calibration.scale,
            weights=(self.strength * means.directions.T).astype(np.float32),
            bias=self.own * calibration.bias + self.strength * evidence,
        )

    def _opinion(self, number: int, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> Floats:
        scorer = self.calibrations[number](log_probs)
        found: Floats = log_softmax(self.own * scorer + self.strength * self.means[number].evidence(embeddings), axis=1)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """The n labelled images that learning starts from; n may be 0.

    Attributes:
        embeddings: `(n, D)`, of unit length.
        truths: `(n,)` columns.
        fit: of the scorer's calibration, on the same images in the same order; without images, one that was made before.
    """

    embeddings: NDArray[np.floating]
    truths: Columns
    fit: CrossFit

    @classmethod
    def of(
        cls,
        log_probs: NDArray[np.floating],
        embeddings: NDArray[np.floating],
        truths: Columns,
        *,
        prior: Floats | None = None,
        matrix: bool = True,
    ) -> "Labelled":
        """Labelled images, with a calibration of the scorer that is fitted to them: see `cross_fit_scorer`.

        Args:
            log_probs: `(n, C)`, the scorer's.
            embeddings: `(n, D)`, of unit length.
            truths: `(n,)` columns.
            prior: `(C,)` shares of the classes to match. Default: all classes alike.
            matrix: whether the calibration may mix the scores of several classes; `Taught.linear` needs one that does not.
        """
        responsibilities = np.eye(log_probs.shape[1])[truths]
        fit = cross_fit_scorer(log_probs, responsibilities, prior=prior, matrix=matrix)
        return cls(embeddings=embeddings, truths=truths, fit=fit)

    @classmethod
    def none(cls, calibration: ScorerCalibration, dimensions: int) -> "Labelled":
        """No labelled image, and a calibration of the scorer that was fitted otherwise."""
        fit = CrossFit(calibration=calibration, held_out=np.empty((0, len(calibration.bias))), without=())
        return cls(embeddings=np.empty((0, dimensions)), truths=np.empty(0, dtype=np.int64), fit=fit)

    @cached_property
    def calibrations(self) -> tuple[ScorerCalibration, ...]:
        """P calibrations: without each fold, and of all images."""
        return (*self.fit.without, self.fit.calibration)

    @cached_property
    def responsibilities(self) -> Floats:
        """`(n, C)`, one-hot."""
        return np.eye(len(self.fit.calibration.bias))[self.truths]

    @cached_property
    def support(self) -> tuple[Sums, ...]:
        """P sums of the labelled images: without each fold, and of all images."""
        inside = [fold_of(len(self.truths)) != fold for fold in range(len(self.fit.without))]
        inside.append(np.ones(len(self.truths), dtype=bool))
        return tuple(Sums.of(self.embeddings[rows], self.responsibilities[rows], np.ones(rows.sum())) for rows in inside)

    def nothing(self) -> Sums:
        """P sums of no further image."""
        return Sums.zero(len(self.calibrations), len(self.fit.calibration.bias), self.embeddings.shape[1])

    def taught(self, sums: Sums) -> Taught:
        """What the labelled images and P sums of others teach."""
        means = tuple((own + sums.opinion(number)).means() for number, own in enumerate(self.support))
        evidence = np.zeros_like(self.fit.held_out)
        for fold in range(len(self.fit.without)):
            rows = fold_of(len(self.truths)) == fold
            evidence[rows] = means[fold].evidence(self.embeddings[rows])
        own, strength = fit_strength(self.fit.held_out, evidence, self.responsibilities)
        held_out = log_softmax(own * self.fit.held_out + strength * evidence, axis=1)
        return Taught(own=own, strength=strength, calibrations=self.calibrations, means=means, held_out=held_out)


@dataclass(frozen=True, kw_only=True, eq=False)
class Transduced:
    """What unlabelled images teach.

    Attributes:
        sums: P sums of these images.
        rule: what their responsibilities in these sums were computed with, so that an image can be taken out again.
    """

    sums: Sums
    rule: Taught


def transduced(labelled: Labelled, chunks: Callable[[], Iterable[Scored]], *, rounds: int = ROUNDS) -> Transduced:
    """Expectation and maximisation over unlabelled images, each with the weight `UNJUDGED`.

    Args:
        labelled: where to start.
        chunks: goes through the images from the first on, once per round; the result depends on their order, by rounding alone.
        rounds: at least 1.
    """
    rule = Taught(
        own=1.0,
        strength=0.0,
        calibrations=labelled.calibrations,
        means=tuple(sums.means() for sums in labelled.support),
        held_out=labelled.fit.held_out,
    )
    for remaining in reversed(range(rounds)):
        sums = reduce(Sums.__add__, (_unjudged(rule, *chunk) for chunk in chunks()), labelled.nothing())
        if remaining:
            rule = labelled.taught(sums)
    return Transduced(sums=sums, rule=rule)


def _unjudged(rule: Taught, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating], weight: float = UNJUDGED) -> Sums:
    return Sums.of(embeddings, np.exp(rule.opinions(log_probs, embeddings)), np.full(len(embeddings), weight))


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What a run has learned at the beginning of a period; with it, a run goes on as if it had not been left.

    Attributes:
        images: number of images of the run before the period.
        batch_size: of the run.
        before: P sums of the images before the previous period: what this period is scored with.
        sums: P sums of the images before this period.
    """

    images: int = 0
    batch_size: int
    before: Sums
    sums: Sums


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
        self._entered = asyncio.Condition()
        begin, taught = self.learned.images, labelled.taught(self.learned.sums)
        began = taught if self.learned.before is self.learned.sums else labelled.taught(self.learned.before)
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
    ) -> None:
        """Add the images of a batch; batch by batch, in order. Images that were unreadable, or that came before, are left out.

        Args:
            log_probs: `(N, C)`, the scorer's, not calibrated.
            embeddings: `(N, D)`, of unit length.
            beliefs: `(N, C)` probabilities after the verdicts, before any shift to other shares of the classes; one-hot where a
                person gave the label. Rows of images that are not judged are not looked at.
            judged: `(N,)`, whether a judge or a person said something.
            begin: number of images of the run before the batch, those left out too.
        """
        period = self.period_of(begin)
        if period > self.learned.images:
            await self._enter(period)
        if not len(embeddings):
            return
        opinions = self._taught[period].opinions(log_probs, embeddings)
        said = np.log(np.maximum(beliefs, LEAST)) - opinions[-1]
        after = np.exp(log_softmax(opinions + np.where(judged[:, None], said, 0.0), axis=-1))
        self._sums = self._sums + Sums.of(embeddings, after, np.where(judged, 1.0, UNJUDGED))
        if self.unlabelled is not None:
            self._sums = self._sums + _unjudged(self.unlabelled.rule, log_probs, embeddings, -UNJUDGED)

    def again(self) -> Taught:
        """What all images so far teach: for a finished run, whose images are then decided on anew without a question."""
        return self.labelled.taught(self._sums)

    async def _enter(self, period: int) -> None:
        """Begin a period: what was learned before it is what the next one is scored with."""
        earlier = self.learned.images
        self.learned = Learned(images=period, batch_size=self.learned.batch_size, before=self.learned.sums, sums=self._sums)
        taught = await asyncio.to_thread(self.labelled.taught, self._sums)
        async with self._entered:
            self._taught[self._next(period)] = taught
            del self._taught[earlier]
            self._entered.notify_all()

    def _next(self, period: int) -> int:
        """Number of images before the period that follows a period: whole batches."""
        batch = self.learned.batch_size
        length = min(max(PERIOD, period // GROWTH), LONGEST)
        return period + -(-length // batch) * batch
