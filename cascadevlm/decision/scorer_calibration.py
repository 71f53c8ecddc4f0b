"""Calibration of a scorer: probabilities that are as often right as they say, fitted on few labelled images.

With log-probabilities l of one image (less their mean), the calibrated ones are log softmax(l (s I + W) + b): a temperature
1/s (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017), a bias of every class (Alexandari, Kundaje and
Shrikumar, "Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation", ICML 2020) and,
where there are few classes, how scores of one class speak for another (Kull et al., "Beyond temperature scaling", NeurIPS
2019, who also shrink W). Bias and W have normal priors, whose strengths are chosen by cross-validated log-likelihood.

Responsibilities are N x C, rows sum to 1: how likely each label is to be the truth. One-hot where it is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import PlainSerializer, PlainValidator
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Floats: TypeAlias = NDArray[np.float64]


def _floats(value: ArrayLike) -> Floats:
    return np.asarray(value, dtype=np.float64)


StoredFloats = Annotated[Floats, PlainValidator(_floats), PlainSerializer(np.ndarray.tolist)]
"""An array that pydantic writes and reads as lists."""

CalibrationMethod = Literal["none", "temperature", "bias", "matrix"]

FOLDS = 5
FLOOR = -50.0
"""Log-probabilities below are no different from it: a scorer that rounds to 0 says nothing about how improbable."""

BIAS_PRECISIONS = (100.0, 10.0, 3.0, 1.0, 0.3)
"""Of the normal prior of a class's bias, in nats; from the strongest on, each fit begins where the last ended."""

MIXING_PRECISIONS = (30.0, 10.0, 3.0, 1.0)
"""Of the normal prior of each element of W, for scores of standard deviation 1."""

MOST_CLASSES_MIXED = 50
"""Beyond, W has too many elements for the labels that anybody has."""

FEW = 10.0
"""How many images it takes for marginals to be matched half-way to a prior."""

METHODS = ("none", "temperature", "matched prior, temperature", "bias", "matched prior, bias", "matrix")
"""From the simplest on."""

ITERATIONS = 60
"""The most of each fit: a prior makes them converge sooner."""


@dataclass(frozen=True, kw_only=True)
class ScorerCalibration:
    """What makes a scorer's log-probabilities calibrated ones.

    Attributes:
        method: the richest part of it; "none" leaves the scores as they are.
        scale: s, the inverse of the temperature.
        bias: b, C numbers in nats.
        mixing: W, C x C; None without.
        log_likelihoods: mean cross-validated log-likelihood of the truth in nats by what was tried.
    """

    method: CalibrationMethod
    scale: float
    bias: StoredFloats
    mixing: StoredFloats | None = None
    log_likelihoods: dict[str, float] | None = None

    @classmethod
    def identity(cls, classes: int) -> "ScorerCalibration":
        """The one that changes nothing."""
        return cls(method="none", scale=1.0, bias=np.zeros(classes))

    def __call__(self, log_probs: NDArray[np.floating]) -> Floats:
        """N x C log-probabilities, from the scorer's."""
        centred = centre(log_probs)
        logits = self.scale * centred + self.bias
        calibrated: Floats = log_softmax(logits if self.mixing is None else logits + centred @ self.mixing, axis=1)
        return calibrated


def centre(log_probs: NDArray[np.floating]) -> Floats:
    """N x C, every row less its mean."""
    floored = np.maximum(log_probs, FLOOR, dtype=np.float64)
    centred: Floats = floored - floored.mean(axis=1, keepdims=True)
    return centred


def match_prior(log_probs: NDArray[np.floating], prior: Floats | None = None) -> Floats:
    """C biases that make the mean of the N calibrated distributions the ``prior`` over classes (uniform, unless given).

    Needs no labels. Of few images (`FEW`), the marginals are brought only a part of the way. Source: the marginal constraint of
    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, solved by iterative scaling (Deming and Stephan 1940).
    """
    classes = log_probs.shape[1]
    wanted = np.full(classes, 1 / classes) if prior is None else prior
    centred, bias = centre(log_probs), np.zeros(classes)
    part = len(centred) / (len(centred) + FEW)
    target = part * wanted + (1 - part) * softmax(centred, axis=1).mean(axis=0)
    for _ in range(ITERATIONS):
        step = np.log(target / softmax(centred + bias, axis=1).mean(axis=0))
        bias += step
        if np.abs(step).max() < 1e-3:
            break
    return bias


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is fitted: from C biases ``start`` on, a scale and, where their prior has a precision, bias and mixing."""

    start: Floats
    bias: float | None = None
    mixing: float | None = None


def fit_scorer(
    log_probs: NDArray[np.floating], responsibilities: Floats, *, unlabelled: NDArray[np.floating] | None = None
) -> tuple[ScorerCalibration, Floats]:
    """The simplest calibration that none is better than by more than a standard error of the cross-validated log-likelihood.

    Args:
        log_probs: N x C, the scorer's.
        responsibilities: N x C.
        unlabelled: M x C, further scores of the same kind of images for `match_prior`.

    Returns:
        the calibration, and the N x C calibrated log-probabilities of the images as those fitted on the other folds give
        them: what models of the judge are fitted on.
    """
    classes = log_probs.shape[1]
    fold_of = np.random.default_rng(0).permutation(len(log_probs)) % FOLDS
    matched = match_prior(log_probs if unlabelled is None else np.concatenate([log_probs, unlabelled]))
    tried = {"none": _Tried.of(np.maximum(log_probs, FLOOR, dtype=np.float64), responsibilities, None)}

    def attempt(name: str, shapes: Sequence[Shape]) -> None:
        found = _held_out(log_probs, responsibilities, fold_of, shapes)
        fits = [_Tried.of(held_out, responsibilities, shape) for shape, held_out in zip(shapes, found, strict=True)]
        tried[name] = max(fits, key=lambda fit: fit.likelihoods.mean())

    for name, start in (("", np.zeros(classes)), ("matched prior, ", matched)):
        attempt(name + "temperature", [Shape(start=start)])
        attempt(name + "bias", [Shape(start=start, bias=precision) for precision in BIAS_PRECISIONS])
    if classes <= MOST_CLASSES_MIXED:
        biased = max(tried["bias"], tried["matched prior, bias"], key=lambda fit: fit.likelihoods.mean())
        if biased.shape is not None:
            attempt("matrix", [replace(biased.shape, mixing=precision) for precision in MIXING_PRECISIONS])
    best = reduce(_Tried.unless_better, (tried[name] for name in METHODS if name in tried))
    calibration = ScorerCalibration.identity(classes)
    if best.shape is not None:
        (calibration,) = fit_shapes(log_probs, responsibilities, [best.shape])
    likelihoods = {name: float(fit.likelihoods.mean()) for name, fit in tried.items()}
    return replace(calibration, log_likelihoods=likelihoods), best.held_out


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """What cross-validation gave.

    Attributes:
        shape: of what was fitted; None of nothing.
        held_out: N x C log-probabilities.
        likelihoods: N, of the truth, in nats.
    """

    shape: Shape | None
    held_out: Floats
    likelihoods: Floats

    @classmethod
    def of(cls, held_out: Floats, responsibilities: Floats, shape: Shape | None) -> "_Tried":
        return cls(shape=shape, held_out=held_out, likelihoods=(held_out * responsibilities).sum(axis=1))

    def unless_better(self, richer: "_Tried") -> "_Tried":
        """The richer one, if it is better by more than a standard error (Breiman et al., "Classification and Regression Trees",
        1984, section 3.4.3)."""
        gained = richer.likelihoods - self.likelihoods
        return richer if gained.mean() > gained.std() / np.sqrt(len(gained)) else self


def _held_out(
    log_probs: NDArray[np.floating], responsibilities: Floats, fold_of: NDArray[np.int64], shapes: Sequence[Shape]
) -> Floats:
    held_out = np.empty((len(shapes), *log_probs.shape))
    for fold in range(FOLDS):
        inside = fold_of == fold
        for number, calibration in enumerate(fit_shapes(log_probs[~inside], responsibilities[~inside], shapes)):
            held_out[number, inside] = calibration(log_probs[inside])
    return held_out


def fit_shapes(log_probs: NDArray[np.floating], responsibilities: Floats, shapes: Sequence[Shape]) -> list[ScorerCalibration]:
    """A fit of every shape, all with the same parts; each begins at the one before."""
    classes, first = log_probs.shape[1], shapes[0]
    centred = centre(log_probs) + first.start
    spread, means = max(float(centred.std()), 1e-6), centred.mean(axis=0)
    features = (centred - means) / spread
    parts = (1, classes * (first.bias is not None), classes**2 * (first.mixing is not None))
    ends = np.cumsum(parts)

    def objective(values: Floats, precisions: Floats) -> tuple[float, Floats]:
        log_scale, bias, mixing = np.split(values, ends[:-1])
        logits = np.exp(log_scale) * centred
        if bias.size:
            logits = logits + bias
        if mixing.size:
            logits = logits + features @ mixing.reshape(classes, classes)
        predicted = log_softmax(logits, axis=1)
        errors = np.exp(predicted) - responsibilities
        gradient = [np.array([(errors * centred).sum() * np.exp(log_scale[0])])]
        if bias.size:
            gradient.append(errors.sum(axis=0))
        if mixing.size:
            gradient.append((features.T @ errors).ravel())
        penalty = precisions * values
        return float(-(predicted * responsibilities).sum() + penalty @ values / 2), np.concatenate(gradient) + penalty

    values, fitted = np.zeros(ends[-1]), []
    for shape in shapes:
        precisions = np.repeat([1.0, shape.bias or 0.0, shape.mixing or 0.0], parts)
        values = minimize(objective, values, (precisions,), "L-BFGS-B", jac=True, options={"maxiter": ITERATIONS}).x
        log_scale, bias, mixing = np.split(values, ends[:-1])
        scale = float(np.exp(log_scale[0]))
        whole = mixing.reshape(classes, classes) / spread if mixing.size else None
        offset = scale * shape.start + (bias if bias.size else 0)
        if whole is not None:
            offset = offset + (shape.start - means) @ whole
        method: CalibrationMethod = "matrix" if mixing.size else "bias" if bias.size or shape.start.any() else "temperature"
        fitted.append(ScorerCalibration(method=method, scale=scale, bias=offset, mixing=whole))
    return fitted
