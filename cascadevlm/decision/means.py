"""What images teach about the embeddings of a scorer: one mean per class, and one covariance that all classes share.

Each class is taken to be normally distributed in the space of the embeddings, and all classes to have the same covariance
(linear discriminant analysis: Fisher, "The use of multiple measurements in taxonomic problems", 1936). With known labels this is
GDA-CLIP (Wang et al., "A Hard-to-Beat Baseline for Training-Free CLIP-based Adaptation", ICLR 2024). With labels that are
believed with a probability it is one step of expectation and maximisation. The estimate needs four sums, which add over batches,
workers and sessions. With unit embeddings x, responsibilities r and one weight w per image:

    n_c = sum of w r_c        S_c = sum of w r_c x        M = sum of w x x'        N = sum of w
    m = (sum of S_c) / N      u_c = (S_c - n_c m) / (n_c + PRIOR_IMAGES)
    K = M / N - m m' - (sum of n_c u_c u_c') / N,    then    K <- .9 K + .1 (trace K / D) I
    V_c = inverse(K) u_c      v_c = -u_c' V_c / 2         evidence g_c(x) = (x - m)' V_c + v_c

The evidence is in nats. What is believed of an image is the softmax of (own l + strength g), where l are the scorer's
log-probabilities. `fit_strength` fits the two numbers to images that are not in the sums.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import logsumexp

from cascadevlm.decision.scorer_calibration import Floats

PRIOR_IMAGES = 4.0
"""Every class has so many images more, at the mean of all images. A class without images has no evidence for or against it."""

SHRINKAGE = 0.1
"""Share of the covariance that is the same in all directions: the covariance of few images has no inverse."""

LEAST_VARIANCE = 1e-8
"""Per dimension: images that are all alike have a covariance of 0, and rounding can make it negative."""

STRENGTH = 0.3
"""Strength of the evidence where nothing is labelled. Less than 1, as the dimensions are not normally distributed."""

OWN_PRECISION = 4.0
"""Of the normal prior of log own, around 0: give or take .5."""

STRENGTH_MEAN, STRENGTH_PRECISION = float(np.log(0.1)), 0.25
"""Of the normal prior of log strength: give or take 2."""

BOUNDS = ((-3.0, 3.0), (-10.0, 3.0))
"""Between which log own and log strength are looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What some images add to the estimate, for one or for several opinions about them.

    Attributes:
        counts: `(..., C) float64`, weighted number of images per class.
        firsts: `(..., C, D) float64`, weighted sum of the embeddings per class.
        seconds: `(D, D) float64`, weighted sum of the outer products of the embeddings.
        weight: sum of the weights of all images.
    """

    counts: Floats
    firsts: Floats
    seconds: Floats
    weight: float

    @classmethod
    def of(
        cls, embeddings: NDArray[np.floating], responsibilities: NDArray[np.floating], weights: NDArray[np.floating]
    ) -> "Sums":
        """The sums of N images.

        Args:
            embeddings: `(N, D)`, of unit length.
            responsibilities: `(..., N, C)`, how likely each label is to be the truth; rows sum to 1.
            weights: `(N,)`, how much each image counts.
        """
        images = np.asarray(embeddings, dtype=np.float64)
        weighted = np.asarray(responsibilities, dtype=np.float64) * weights[:, None]
        return cls.weighted(images, weighted, weights, (images * weights[:, None]).T @ images)

    @classmethod
    def weighted(
        cls, images: NDArray[np.floating], weighted: NDArray[np.floating], weights: NDArray[np.floating], seconds: Floats
    ) -> "Sums":
        """The sums of N images from parts that are computed already.

        Args:
            images: `(N, D)`, embeddings of unit length.
            weighted: `(..., N, C)`, responsibilities times weights; they may also be differences of these.
            weights: `(N,)`, the sums of the rows of ``weighted``.
            seconds: `(D, D)`.
        """
        return cls(
            counts=weighted.sum(axis=-2, dtype=np.float64),
            firsts=(np.swapaxes(weighted, -1, -2) @ images).astype(np.float64),
            seconds=seconds,
            weight=float(weights.sum(dtype=np.float64)),
        )

    @classmethod
    def zero(cls, *shape: int) -> "Sums":
        """The sums of no image, for a shape of `firsts`: (..., C, D)."""
        dimensions = shape[-1]
        return cls(counts=np.zeros(shape[:-1]), firsts=np.zeros(shape), seconds=np.zeros((dimensions, dimensions)), weight=0.0)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            counts=self.counts + other.counts,
            firsts=self.firsts + other.firsts,
            seconds=self.seconds + other.seconds,
            weight=self.weight + other.weight,
        )

    def opinion(self, number: int) -> "Sums":
        """The sums for one of several opinions."""
        return Sums(counts=self.counts[number], firsts=self.firsts[number], seconds=self.seconds, weight=self.weight)

    def means(self) -> "Means":
        """The estimate for one opinion. Without images, the evidence is 0 for every class."""
        classes, dimensions = self.firsts.shape
        if self.weight <= 0:
            return Means(directions=np.zeros((dimensions, classes)), offsets=np.zeros(classes), mean=np.zeros(dimensions))
        mean = self.firsts.sum(axis=0) / self.weight
        centres = (self.firsts - self.counts[:, None] * mean) / (self.counts + PRIOR_IMAGES)[:, None]
        between = (centres * self.counts[:, None]).T @ centres
        covariance = (self.seconds - between) / self.weight - np.outer(mean, mean)
        variance = max(float(np.trace(covariance)) / dimensions, LEAST_VARIANCE)
        covariance *= 1 - SHRINKAGE
        covariance[np.diag_indices(dimensions)] += SHRINKAGE * variance
        directions = cho_solve(cho_factor(covariance, lower=True, check_finite=False), centres.T, check_finite=False)
        return Means(directions=directions, offsets=-0.5 * (centres * directions.T).sum(axis=1), mean=mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class Means:
    """The estimate that some sums give.

    Attributes:
        directions: V, `(D, C) float64`.
        offsets: v, `(C,) float64`.
        mean: m, `(D,) float64`, of all embeddings.
    """

    directions: Floats
    offsets: Floats
    mean: Floats

    def evidence(self, embeddings: NDArray[np.floating]) -> Floats:
        """g, `(N, C)` nats for each class, from `(N, D)` unit embeddings."""
        found: Floats = (embeddings - self.mean) @ self.directions + self.offsets
        return found


def widened(embeddings: NDArray[np.floating]) -> NDArray[np.floating]:
    """`(N, D)` embeddings for products: `float16` becomes `float32`, which loses nothing; others are unchanged."""
    return embeddings.astype(np.float32) if embeddings.dtype == np.float16 else embeddings


def fit_strength(log_probs: Floats, evidence: Floats, responsibilities: Floats) -> tuple[float, float]:
    """The scale of the scorer's log-probabilities and the strength of the evidence, of the highest posterior probability.

    The images must be a random part of those to come, and in neither the sums nor the fit of the log-probabilities: numbers that
    are fitted to what was learned by heart trust it too much. Images that a policy escalated are no random part. Without images,
    the scale is 1 and the strength `STRENGTH`.

    Args:
        log_probs: `(N, C)`, calibrated without looking at these images: `CrossFit.held_out`.
        evidence: `(N, C)`.
        responsibilities: `(N, C)`: one-hot for labels of people; for the answers of a judge, what is believed after them.
    """
    if not len(log_probs):
        return 1.0, STRENGTH

    def objective(values: Floats) -> tuple[float, Floats]:
        own, strength = np.exp(values)
        logits = own * log_probs + strength * evidence
        totals = logsumexp(logits, axis=1, keepdims=True)
        errors = np.exp(logits - totals) - responsibilities
        away = values - (0.0, STRENGTH_MEAN)
        precisions = np.array([OWN_PRECISION, STRENGTH_PRECISION])
        gradient = np.array([own * (errors * log_probs).sum(), strength * (errors * evidence).sum()])
        unlikelihood = totals.sum() - (responsibilities * logits).sum()
        return float(unlikelihood + (precisions * away) @ away / 2), gradient + precisions * away

    found = minimize(objective, (0.0, STRENGTH_MEAN), jac=True, method="L-BFGS-B", bounds=BOUNDS)
    own, strength = np.exp(found.x).tolist()
    return own, strength
