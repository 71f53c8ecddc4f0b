"""What labelled images teach a scorer, and unlabelled images beside them.

The scale and the strength of what is learned are fitted to the labelled images. No label may then reach its own image by any
way: not through the calibration of the scorer, not through the sums, and not through the beliefs about other images, which teach
what they were taught. So everything is learned P times side by side: without the labels of each fold, for the images of that
fold; and once from all labels, for the predictions. Otherwise the learned beliefs are over-confident.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.arrays import Columns, StoredColumns, StoredEmbeddings
from cascadevlm.base.errors import InputError
from cascadevlm.decision.means import Means, Sums, fit_strength, widened
from cascadevlm.decision.scorer_calibration import CrossFit, Floats, ScorerCalibration, centre, cross_fit_scorer, fold_of

UNJUDGED = 0.3
"""Weight of an image that nobody was asked about; an image with a verdict or a label has weight 1."""

ROUNDS = 10
"""Of expectation and maximisation over unlabelled images."""

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
        return self.opinion(-1, log_probs, embeddings)

    def opinions(self, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> NDArray[np.floating]:
        """`(P, N, C)` log-probabilities, `float32` for embeddings of at most 32 bits. One product gives all evidence."""
        images, (directions, offsets) = widened(embeddings), self._evidence
        logits: NDArray[np.floating] = images @ directions.astype(images.dtype, copy=False)
        logits += offsets
        opinions, centred = logits.reshape(len(logits), len(self.means), -1), centre(log_probs)
        for number, calibration in enumerate(self.calibrations):
            opinions[:, number] += self.own * calibration.logits(centred)
        opinions -= opinions.max(axis=2, keepdims=True)
        opinions -= np.log(np.exp(opinions).sum(axis=2, keepdims=True))
        return opinions.swapaxes(0, 1)

    @cached_property
    def _evidence(self) -> tuple[Floats, Floats]:
        """`(D, P C)` directions and `(P C,)` offsets of the evidence of all P estimates, both times the strength."""
        directions = np.hstack([means.directions for means in self.means])
        offsets = np.concatenate([means.offsets - means.mean @ means.directions for means in self.means])
        return self.strength * directions, self.strength * offsets

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

    def opinion(self, number: int, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating]) -> Floats:
        """`(N, C)` log-probabilities; without the labels of a fold by its number, or from all labels by -1."""
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

    Raises:
        ValueError: if the parts are not of the same images and labels.
    """

    embeddings: StoredEmbeddings
    truths: StoredColumns
    fit: CrossFit

    def __post_init__(self) -> None:
        images, classes = self.fit.held_out.shape
        if not (self.embeddings.ndim == 2 and len(self.embeddings) == len(self.truths) == images):
            raise ValueError("embeddings, truths and log-probabilities are not of the same images")
        if any(calibration.bias.shape != (classes,) for calibration in self.calibrations):
            raise ValueError("log-probabilities and calibrations are not of the same labels")
        if not ((self.truths >= 0) & (self.truths < classes)).all():
            raise ValueError("a truth is no label")

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
        """P sums of the labelled images: without each fold, and of all images.

        In the sums of all images, each image has the weight of the share of images that are not in a fold. So all P sums have the
        same weight. The evidence grows with this weight, and its strength is fitted to the sums without a fold: with a larger
        weight, the predictions would be over-confident.
        """
        folds = len(self.fit.without)
        inside = [fold_of(len(self.truths)) != fold for fold in range(folds)]
        without = [Sums.of(self.embeddings[rows], self.responsibilities[rows], np.ones(rows.sum())) for rows in inside]
        weights = np.full(len(self.truths), 1 - 1 / folds if folds else 1.0)
        return (*without, Sums.of(self.embeddings, self.responsibilities, weights))

    def nothing(self) -> Sums:
        """P sums of no further image."""
        return Sums.zero(len(self.calibrations), len(self.fit.calibration.bias), self.embeddings.shape[1])

    def taught(self, sums: Sums, unlabelled: tuple[Sums, ...] = ()) -> Taught:
        """What the labelled images and P sums of others teach.

        Args:
            sums: of the others.
            unlabelled: P sums of labelled images as if they were not: `Transduced.fold`.
        """
        support = [own + other for own, other in zip(self.support, unlabelled, strict=True)] if unlabelled else self.support
        means = tuple((own + sums.opinion(number)).means() for number, own in enumerate(support))
        evidence = np.zeros_like(self.fit.held_out)
        for fold in range(len(self.fit.without)):
            rows = fold_of(len(self.truths)) == fold
            evidence[rows] = means[fold].evidence(self.embeddings[rows])
        own, strength = fit_strength(self.fit.held_out, evidence, self.responsibilities)
        held_out = log_softmax(own * self.fit.held_out + strength * evidence, axis=1)
        return Taught(own=own, strength=strength, calibrations=self.calibrations, means=means, held_out=held_out)

    def as_unlabelled(self, rule: Taught) -> tuple[Sums, ...]:
        """P sums: of each fold, its images with what the rule believes of them without the fold's labels; last, of no image."""
        beliefs, folds = np.exp(rule.held_out), fold_of(len(self.truths))
        inside = [folds == fold for fold in range(len(self.fit.without))] + [np.zeros(len(self.truths), dtype=bool)]
        return tuple(Sums.of(self.embeddings[rows], beliefs[rows], np.full(rows.sum(), UNJUDGED)) for rows in inside)


@dataclass(frozen=True, kw_only=True, eq=False)
class Transduced:
    """What unlabelled images teach.

    Attributes:
        sums: P sums of these images.
        fold: P sums of the labelled images of each fold, which are unlabelled images for what is learned without that fold. An
            image that is in the sums confirms its own belief; scale and strength are fitted to images that do so, too.
        rule: what their responsibilities in these sums were computed with, so that an image can be taken out again.
    """

    sums: Sums
    fold: tuple[Sums, ...]
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
    seconds: Floats | None = None
    for remaining in reversed(range(rounds)):
        parts = (unjudged(rule, *chunk, with_seconds=seconds is None) for chunk in chunks())
        sums = reduce(Sums.__add__, parts, labelled.nothing())
        seconds = sums.seconds if seconds is None else seconds  # they are the same in every round
        sums = replace(sums, seconds=seconds)
        fold = labelled.as_unlabelled(rule)
        if remaining:
            rule = labelled.taught(sums, fold)
    return Transduced(sums=sums, fold=fold, rule=rule)


def unjudged(
    rule: Taught, log_probs: NDArray[np.floating], embeddings: NDArray[np.floating], *, with_seconds: bool = True
) -> Sums:
    """P sums of N images, each with what the rule believes of it.

    Args:
        with_seconds: false to leave `Sums.seconds` at 0.
    """
    images, weights = widened(embeddings), np.full(len(embeddings), UNJUDGED)
    weighted = np.exp(rule.opinions(log_probs, images))
    weighted *= UNJUDGED
    wide = images.astype(np.float64) if with_seconds else np.zeros((1, images.shape[1]))
    return Sums.weighted(images, weighted, weights, UNJUDGED * (wide.T @ wide))
