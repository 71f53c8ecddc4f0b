"""Calibrates a scorer on few labelled images: of the labels with a probability of 80 %, about 80 % are right.

Let l be the log-probabilities of one image, minus their mean. The calibrated log-probabilities are log softmax(l (s I + W) + b).

- s is a scale, the inverse of a temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
- b has one bias per class (Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with Bias-Corrected Calibration is
  Hard-To-Beat at Label Shift Adaptation", ICML 2020).
- W is a matrix: a high score of one class can change the probability of another class (Kull et al., "Beyond temperature
  scaling", NeurIPS 2019, who also shrink W). W is used only with few classes.

b and W have normal priors. Cross-validated log-likelihood chooses the strengths of these priors.

Responsibilities are ``(N, C)`` probabilities that each label is the truth. Rows sum to 1, and are one-hot for known truths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import PlainSerializer, PlainValidator
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from cascadevlm.base.arrays import StoredRows

Floats: TypeAlias = NDArray[np.float64]


def _floats(value: ArrayLike) -> Floats:
    return np.asarray(value, dtype=np.float64)


StoredFloats = Annotated[Floats, PlainValidator(_floats), PlainSerializer(np.ndarray.tolist)]
"""An array that pydantic reads and writes as nested lists."""

CalibrationMethod = Literal["none", "temperature", "matched prior", "bias", "matrix"]

FOLDS = 5
"""Number of folds of a cross-validation."""

FLOOR = -50.0
"""Log-probability that replaces minus infinity, or the image's smallest finite log-probability if that is lower."""

BIAS_PRECISIONS = (100.0, 10.0, 3.0, 1.0, 0.3)
"""Precisions of the normal prior of each class bias in nats, strongest first. Each fit starts at the previous result."""

MIXING_PRECISIONS = (30.0, 10.0, 3.0, 1.0)
"""Precisions of the normal prior of each element of W, for scores with a standard deviation of 1."""

MOST_CLASSES_MIXED = 50
"""Largest number of classes for which W is tried. W has one element per pair of classes."""

MATCHING_PRECISION = 3.0
"""Precision of the normal prior of each class bias in `match_prior`. Few images show class shares only roughly."""

SCALE_PRECISION = 0.1
"""Precision of the normal prior of log s, with mean 0."""

FARTHEST = 12.0
"""Largest absolute value of log s that is tried. Without this limit, wide steps of the optimiser would overflow."""

ITERATIONS = 60
"""Largest number of iterations of each fit. The priors make most fits converge earlier."""


@dataclass(frozen=True, kw_only=True)
class ScorerCalibration:
    """A function from a scorer's log-probabilities to calibrated log-probabilities.

    Attributes:
        method: the method with the most parameters that is part of the calibration; "none" leaves the scores unchanged.
        scale: s, the inverse of the temperature.
        bias: b, ``(C,)``, in nats.
        mixing: W, ``(C, C)``; None if it is not used.
        log_likelihoods: mean cross-validated log-likelihood of the truth in nats, by the name of each method tried.
    """

    method: CalibrationMethod
    scale: float
    bias: StoredFloats
    mixing: StoredFloats | None = None
    log_likelihoods: dict[str, float] | None = None

    @classmethod
    def identity(cls, classes: int) -> "ScorerCalibration":
        """A calibration that changes nothing."""
        return cls(method="none", scale=1.0, bias=np.zeros(classes))

    def __call__(self, log_probs: NDArray[np.floating]) -> Floats:
        """``(N, C)`` calibrated log-probabilities from the scorer's ``(N, C)``."""
        calibrated: Floats = log_softmax(self.logits(centre(log_probs)), axis=1)
        return calibrated

    def logits(self, centred: Floats) -> Floats:
        """``(N, C)`` calibrated log-probabilities plus one constant per row, from the scorer's with a mean of 0 (`centre`)."""
        logits = self.scale * centred + self.bias
        return logits if self.mixing is None else logits + centred @ self.mixing


def floored(log_probs: NDArray[np.floating]) -> Floats:
    """``(N, C)`` log-probabilities with minus infinity replaced by a finite value, see `FLOOR`."""
    values = np.asarray(log_probs, dtype=np.float64)
    impossible = np.isneginf(values)
    least = np.where(impossible, 0.0, values).min(axis=1, keepdims=True)
    return np.where(impossible, np.minimum(least, FLOOR), values)


def centre(log_probs: NDArray[np.floating]) -> Floats:
    """``(N, C)`` log-probabilities. The mean of each row is subtracted from the row."""
    values = floored(log_probs)
    centred: Floats = values - values.mean(axis=1, keepdims=True)
    return centred


def match_prior(log_probs: NDArray[np.floating], prior: Floats | None = None) -> Floats:
    """``(C,)`` biases in nats that bring the mean predicted distribution near to the class shares ``prior``.

    No labels are needed. The biases have a normal prior with the precision `MATCHING_PRECISION`, and the result has the highest
    posterior probability. With few images, the normal prior keeps the biases small. Without it, the mean would be exactly
    ``prior``. Source: the marginal constraint of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.

    Args:
        log_probs: ``(N, C)`` log-probabilities of the scorer.
        prior: ``(C,)`` class shares. Default: equal shares.
    """
    images, classes = log_probs.shape
    wanted = images * (np.full(classes, 1 / classes) if prior is None else prior)
    centred = centre(log_probs)

    def objective(bias: Floats) -> tuple[float, Floats]:
        logits = centred + bias
        totals = logsumexp(logits, axis=1, keepdims=True)
        gradient = np.exp(logits - totals).sum(axis=0) - wanted + MATCHING_PRECISION * bias
        return float(totals.sum() - wanted @ bias + MATCHING_PRECISION * (bias @ bias) / 2), gradient

    found: Floats = minimize(objective, np.zeros(classes), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    return found


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which parts of a calibration are fitted.

    Attributes:
        scale: precision of the prior of the logarithm of the scale.
        matched: whether the biases of `match_prior` are added to the scores before the fit.
        bias: precision of the prior of the class biases; None if they are not fitted.
        mixing: precision of the prior of W; None if W is not fitted.
    """

    scale: float = SCALE_PRECISION
    matched: bool = False
    bias: float | None = None
    mixing: float | None = None


def fit_scorer(
    log_probs: NDArray[np.floating], responsibilities: Floats, *, prior: Floats | None = None
) -> tuple[ScorerCalibration, Floats]:
    """The calibration of the highest cross-validated log-likelihood, and the log-probabilities that it gives images held out.

    See `cross_fit_scorer`, of which these are the first two attributes.
    """
    fit = cross_fit_scorer(log_probs, responsibilities, prior=prior)
    return fit.calibration, fit.held_out


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossFit:
    """A calibration, and the same kind of calibration fitted on all folds but one.

    Attributes:
        calibration: fitted on all N images.
        held_out: `(N, C) float64` calibrated log-probabilities of the images, each by the calibration that was fitted without the
            image's fold.
        without: one calibration per fold, fitted without the images of that fold.
    """

    calibration: ScorerCalibration
    held_out: StoredRows
    without: tuple[ScorerCalibration, ...]


def fold_of(images: int) -> NDArray[np.int64]:
    """`(N,)` the fold of each image, from 0 to `FOLDS` - 1; always the same for a number of images."""
    return np.random.default_rng(0).permutation(images) % FOLDS


def cross_fit_scorer(
    log_probs: NDArray[np.floating], responsibilities: Floats, *, prior: Floats | None = None, matrix: bool = True
) -> CrossFit:
    """The calibration of the highest cross-validated log-likelihood; a matrix, which has by far the most to fit, only if it is
    better by more than a standard error.

    Args:
        log_probs: N x C, the scorer's.
        responsibilities: N x C.
        prior: C shares of the classes to match; even, unless given.
        matrix: whether a matrix is tried.
    """
    classes, folds = log_probs.shape[1], fold_of(len(log_probs))
    identity = ScorerCalibration.identity(classes)

    def attempt(shapes: Sequence[Shape]) -> "_Tried":
        held_out = np.empty((len(shapes), *log_probs.shape))
        parts = []
        for fold in range(FOLDS):
            inside = folds == fold
            parts.append(fit_shapes(log_probs[~inside], responsibilities[~inside], shapes, prior))
            for number, fitted in enumerate(parts[-1]):
                held_out[number, inside] = fitted(log_probs[inside])
        tried = [
            _Tried.of(found, responsibilities, shape, without)
            for shape, found, without in zip(shapes, held_out, zip(*parts, strict=True), strict=True)
        ]
        return max(tried, key=_Tried.mean)

    tried = {
        "none": _Tried.of(floored(log_probs), responsibilities, None, (identity,) * FOLDS),
        "temperature": attempt([Shape()]),
        "matched prior": attempt([Shape(matched=True)]),
        "bias": attempt([Shape(bias=precision) for precision in BIAS_PRECISIONS]),
    }
    best = max(tried.values(), key=_Tried.mean)
    if matrix and classes <= MOST_CLASSES_MIXED and (biased := tried["bias"].shape):
        tried["matrix"] = attempt([replace(biased, mixing=precision) for precision in MIXING_PRECISIONS])
        best = best.unless_surely_better(tried["matrix"])
    calibration = identity
    if best.shape is not None:
        (calibration,) = fit_shapes(log_probs, responsibilities, [best.shape], prior)
    calibration = replace(calibration, log_likelihoods={name: fit.mean() for name, fit in tried.items()})
    return CrossFit(calibration=calibration, held_out=best.held_out, without=best.without)


def surely_better(richer: Floats, simpler: Floats) -> bool:
    """Whether the mean of ``(N,)`` log-likelihoods of a richer model is higher by more than one standard error.

    The images are compared in pairs. Source: Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3.
    """
    gained = richer - simpler
    return bool(gained.mean() > gained.std() / np.sqrt(len(gained)))


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """The result of a cross-validation.

    Attributes:
        shape: of what was fitted; None of nothing.
        held_out: N x C log-probabilities.
        likelihoods: N, of the truth, in nats.
        without: one calibration per fold, fitted without the images of that fold.
    """

    shape: Shape | None
    held_out: Floats
    likelihoods: Floats
    without: tuple[ScorerCalibration, ...]

    @classmethod
    def of(
        cls, held_out: Floats, responsibilities: Floats, shape: Shape | None, without: tuple[ScorerCalibration, ...]
    ) -> "_Tried":
        return cls(shape=shape, held_out=held_out, likelihoods=(held_out * responsibilities).sum(axis=1), without=without)

    def unless_surely_better(self, richer: "_Tried") -> "_Tried":
        """The richer result if it is surely better, else this result."""
        return richer if surely_better(richer.likelihoods, self.likelihoods) else self

    def mean(self) -> float:
        """Mean log-likelihood of the truth in nats."""
        return float(self.likelihoods.mean())


def fit_shapes(
    log_probs: NDArray[np.floating], responsibilities: Floats, shapes: Sequence[Shape], prior: Floats | None = None
) -> list[ScorerCalibration]:
    """One fit per shape. All shapes fit the same parts, and each fit starts at the result of the previous fit."""
    classes, first = log_probs.shape[1], shapes[0]
    matched = match_prior(log_probs, prior) if first.matched else np.zeros(classes)
    centred = centre(log_probs) + matched
    spread, means = max(float(centred.std()), 1e-6), centred.mean(axis=0)
    features = (centred - means) / spread
    parts = (1, classes * (first.bias is not None), classes**2 * (first.mixing is not None))
    ends = np.cumsum(parts)
    bounds = [(-FARTHEST, FARTHEST)] + [(None, None)] * (sum(parts) - 1)

    def objective(values: Floats, precisions: Floats) -> tuple[float, Floats]:
        log_scale, bias, mixing = np.split(values, ends[:-1])
        logits = np.exp(log_scale) * centred
        if bias.size:
            logits = logits + bias
        if mixing.size:
            logits = logits + features @ mixing.reshape(classes, classes)
        highest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - highest)
        totals = weights.sum(axis=1, keepdims=True)
        errors = weights / totals - responsibilities
        gradient = [np.array([(errors * centred).sum() * np.exp(log_scale[0])])]
        if bias.size:
            gradient.append(errors.sum(axis=0))
        if mixing.size:
            gradient.append((features.T @ errors).ravel())
        penalty = precisions * values
        unlikelihood = (np.log(totals) + highest).sum() - (responsibilities * logits).sum()
        return float(unlikelihood + penalty @ values / 2), np.concatenate(gradient) + penalty

    values, fitted = np.zeros(ends[-1]), []
    for shape in shapes:
        precisions = np.repeat([shape.scale, shape.bias or 0.0, shape.mixing or 0.0], parts)
        values = minimize(
            objective, values, (precisions,), "L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": ITERATIONS}
        ).x
        log_scale, bias, mixing = np.split(values, ends[:-1])
        scale = float(np.exp(log_scale[0]))
        whole = mixing.reshape(classes, classes) / spread if mixing.size else None
        offset = scale * matched + (bias if bias.size else 0)
        if whole is not None:
            offset = offset + (matched - means) @ whole
        method: CalibrationMethod = (
            "matrix" if mixing.size else "bias" if bias.size else "matched prior" if first.matched else "temperature"
        )
        fitted.append(ScorerCalibration(method=method, scale=scale, bias=offset, mixing=whole))
    return fitted
