"""Several scorers as one: their calibrated log-probabilities are added with fitted weights.

The pool of K scorers is log softmax(Σ_k w_k l_k), where l_k are the calibrated log-probabilities of scorer k. Such a pool is
called log-linear or logarithmic (Genest and Zidek, "Combining Probability Distributions", Statistical Science 1986).

With w_k = exp(a + d_k), the weights maximise the likelihood of the truths. The d_k have a normal prior with mean 0, so that few
images give nearly equal weights. Cross-validated log-likelihood chooses the precision of this prior. The weights are fitted to
log-probabilities of images that the scorers' calibrations left out: a calibration that fits its own images too well would get too
much weight.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import minimize
from scipy.special import log_softmax

from cascadevlm.base.errors import ConfigError, DataError, InputError
from cascadevlm.base.files import write_whole
from cascadevlm.base.tables import read_form
from cascadevlm.base.types import Scores
from cascadevlm.decision.scorer_calibration import (
    FARTHEST,
    FOLDS,
    ITERATIONS,
    SCALE_PRECISION,
    Floats,
    ScorerCalibration,
    StoredFloats,
    centre,
    cross_fit_scorer,
    fold_of,
)

WEIGHT_PRECISIONS = (1e4, 30.0, 10.0, 3.0, 1.0)
"""Precisions of the normal prior of each d_k, strongest first. With the strongest one, the weights are practically equal."""

FEWEST_IMAGES = 20
"""Smallest number of labelled images that a pool is fitted to."""

MAKE_ANOTHER = "Make one for these scorers and labels: cascadevlm adapt --method pool."


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Makes one opinion of the opinions of K scorers.

    Attributes:
        labels: names of the C labels, in column order.
        fingerprints: the fingerprint of each scorer.
        calibrations: the calibration of each scorer's log-probabilities.
        weights: `(K,)`, the weight of each scorer's calibrated log-probabilities.
        images: number of labelled images that the pool was fitted to.
    """

    labels: tuple[str, ...]
    fingerprints: tuple[str, ...]
    calibrations: tuple[ScorerCalibration, ...]
    weights: StoredFloats
    images: int

    @cached_property
    def digest(self) -> str:
        """The first 12 digits of the sha256 of the pool's file."""
        return hashlib.sha256(_FORM.dump_json(self)).hexdigest()[:12]

    def __call__(self, parts: Sequence[Scores]) -> Floats:
        """`(N, C)` logits from the K scorers' scores of the same N images and C labels.

        Raises:
            ConfigError: if the scores are of other scorers or labels.
        """
        if any(part.labels.names != self.labels for part in parts):
            raise ConfigError("The pool was made for other labels, or for another order of the labels.", hint=MAKE_ANOTHER)
        given = tuple(part.fingerprint for part in parts)
        if given != self.fingerprints:
            known, other = next(
                ((one, two) for one, two in zip(self.fingerprints, given, strict=False) if one != two),
                (f"{len(self.fingerprints)} scorers", f"{len(given)} scorers"),
            )
            raise ConfigError(f"The pool was made for {known!r}, and not for {other!r}.", hint=MAKE_ANOTHER)
        calibrated = [fitted(part.log_probs) for fitted, part in zip(self.calibrations, parts, strict=True)]
        return pooled(calibrated, self.weights)

    def write(self, path: Path) -> None:
        """Write the pool as JSON.

        Raises:
            DataError: if the file cannot be written.
        """
        try:
            write_whole(path, _FORM.dump_json(self, indent=2) + b"\n")
        except OSError as exc:
            raise DataError(f"{str(path)!r} cannot be written: {exc.strerror}.") from exc


_FORM = TypeAdapter(Pool)


def read_pool(path: Path) -> Pool:
    """Read a pool from its JSON file.

    Raises:
        ConfigError: if the file cannot be read, or is not a pool.
    """
    return read_form(path, _FORM, name="pool", again=MAKE_ANOTHER)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPool:
    """A pool, and what it and its scorers say of images that they were not fitted to.

    Attributes:
        pool: fitted to all N images.
        held_out: `(N, C)` log-probabilities of the pool.
        parts: for each scorer, `(N, C)` calibrated log-probabilities.
    """

    pool: Pool
    held_out: Floats
    parts: tuple[Floats, ...]


def fit_pool(parts: Sequence[Scores], responsibilities: Floats) -> FittedPool:
    """Fit a pool to labelled images.

    Args:
        parts: the scores of the same N images and C labels by each of K scorers.
        responsibilities: `(N, C)` probabilities that each label is the truth.

    Raises:
        InputError: if there are fewer than 20 images.
    """
    images = len(responsibilities)
    if images < FEWEST_IMAGES:
        raise InputError(f"A pool needs at least {FEWEST_IMAGES} labelled images, not {images}.", hint="Give more images.")
    fits = [cross_fit_scorer(part.log_probs, responsibilities) for part in parts]
    outside, folds, held_out = (
        [fit.held_out for fit in fits],
        fold_of(images),
        np.empty((len(WEIGHT_PRECISIONS), *responsibilities.shape)),
    )
    for fold in range(FOLDS):
        inside = folds == fold
        for number, precision in enumerate(WEIGHT_PRECISIONS):
            weights = fit_weights([part[~inside] for part in outside], responsibilities[~inside], precision)
            held_out[number, inside] = log_softmax(pooled([part[inside] for part in outside], weights), axis=1)
    best = int((held_out * responsibilities).sum(axis=(1, 2)).argmax())
    pool = Pool(
        labels=parts[0].labels.names,
        fingerprints=tuple(part.fingerprint for part in parts),
        calibrations=tuple(fit.calibration for fit in fits),
        weights=fit_weights(outside, responsibilities, WEIGHT_PRECISIONS[best]),
        images=images,
    )
    return FittedPool(pool=pool, held_out=held_out[best], parts=tuple(outside))


def pooled(parts: Sequence[Floats], weights: Floats) -> Floats:
    """`(N, C)`, the weighted sum of K arrays `(N, C)`."""
    return sum((weight * part for weight, part in zip(weights, parts, strict=True)), start=np.zeros_like(parts[0]))


def fit_weights(parts: Sequence[Floats], responsibilities: Floats, precision: float) -> Floats:
    """`(K,)` weights of the highest posterior probability.

    Args:
        parts: `(N, C)` log-probabilities of each of K scorers.
        responsibilities: `(N, C)` probabilities that each label is the truth.
        precision: precision of the normal prior of each d_k.
    """
    centred = np.stack([centre(part) for part in parts])

    def objective(values: Floats) -> tuple[float, Floats]:
        weights = np.exp(values[0] + values[1:])
        logits = np.tensordot(weights, centred, axes=1)
        log_probs = log_softmax(logits, axis=1)
        slopes = weights * np.einsum("knc,nc->k", centred, np.exp(log_probs) - responsibilities)
        penalty = np.r_[SCALE_PRECISION * values[0], precision * values[1:]]
        return float(penalty @ values / 2 - (responsibilities * log_probs).sum()), penalty + np.r_[slopes.sum(), slopes]

    start, bounds = np.zeros(len(parts) + 1), [(-FARTHEST / 2, FARTHEST / 2)] * (len(parts) + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS}).x
    weights: Floats = np.exp(found[0] + found[1:])
    return weights
