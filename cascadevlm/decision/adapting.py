"""Fitting adapters: from labelled images, and from images whose label is not known.

Every method gives evidence g, in nats per label, about the embedding of an image. The adapter believes softmax(s l + α g), where
l are the scorer's own log-probabilities. The scale s and the strength α are fitted by maximum likelihood. The evidence for that
comes from fits that left the image out, because evidence about images that were fitted is overconfident. A group of
near-duplicates, such as the frames of one clip, counts as one image: one of them would tell the label of the others.

means: `cascadevlm.decision.teaching`. cache: `CacheAdapter`. linear: a softmax regression that starts from the scorer (the linear
probe of Lin et al., "Multimodality Helps Unimodality", CVPR 2023). Its α mixes what was learned with the scorer (Wortsman et al.,
"Robust fine-tuning of zero-shot models", CVPR 2022, have α = 0.5).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.decision.means import fit_strength
from cascadevlm.decision.scorer_calibration import FOLDS, Floats, ScorerCalibration, floored, fold_of
from cascadevlm.decision.teaching import Labelled, Linear, Scored, transduced
from cascadevlm.scorers.adapters import (
    METHODS,
    MOST_NUMBERS,
    Adapter,
    CacheAdapter,
    LinearAdapter,
    Made,
    Method,
    affinities,
    divergences,
    signatures,
)
from cascadevlm.scorers.base import ROUNDING

Rows: TypeAlias = NDArray[np.intp]

NEAR_DUPLICATE = 0.98
"""Cosine from which two images of one label are near-duplicates. Different photos of one kind of flower seldom come near it."""

FEWEST_IMAGES = 10
"""Fewer labelled images say nothing about the strength of the evidence."""

AT_ONCE = 1024
"""Unlabelled images that are looked at together."""

PRECISION = 0.01
"""Of the normal prior of each weight of the linear probe. From 0.003 to 0.1, the accuracy changes by about one point."""

ITERATIONS = 60
"""The most of the linear probe."""

SHARPNESSES = (1.0, 2.0, 4.0, 5.5, 8.0, 12.0, 20.0, 35.0, 60.0)
"""Values of β that are tried."""

TEMPERATURES = (0.02, 0.05, 0.1)
"""Factors of the scorer's logits in a signature that are tried. TIP-X has 0.02, for logits of 100 times the cosine."""

LIKENESSES = (0.1, 0.3, 1.0)
"""Weights of the likeness relative to the affinity that are tried."""

MOST_TRIED = 2000
"""The most images that the numbers of a cache are fitted to."""


def fit_adapter(scores: Scores, truths: Sequence[str] | None = None, *, method: Method = "means") -> Adapter:
    """The adapter that images teach.

    Args:
        scores: of N images, with embeddings, from the scorer without an adapter, as ``scorer.score(images, labels)`` or
            ``scorer.score_embeddings(embeddings, labels)`` gives them.
        truths: N names of labels, "" where the label is not known. Default: no label is known, and the images alone teach.
        method: "means" is best on most data, and the only one that learns from images without labels.

    Raises:
        InputError: if the method is unknown or needs the labels of all images, or the scores have no embeddings of length 1 or
            were made with an adapter.
        DataError: if the truths do not fit the images, there are fewer than 10 images, the labels of 1 to 9 images are known, or
            there are too many labels times dimensions.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}.", hint=f"Known: {', '.join(METHODS)}.")
    x, log_probs = embeddings_of(scores), floored(scores.log_probs)
    columns = columns_of([""] * len(x) if truths is None else truths, scores.labels)
    if len(columns) != len(x):
        raise DataError(f"There are {len(columns)} truths for {len(x)} images.")
    rows, unknown = distinct(x, columns), np.flatnonzero(columns == NOBODY)
    if len(unknown) and method != "means":
        raise InputError(f"The method {method!r} needs the labels of all images.", hint='The method "means" does not.')
    for number, what in ((len(x), "images"), (len(rows) or FEWEST_IMAGES, "different images with labels")):
        if number < FEWEST_IMAGES:
            raise DataError(f"{number} {what} are too few for an adapter, which needs at least {FEWEST_IMAGES}.")
    made = Made(method=method, images=len(x), labelled=len(x) - len(unknown))
    if method == "cache":
        return _fit_cache(scores, made, x[rows], log_probs[rows], columns[rows])
    if method == "linear":
        linear = _fit_probe(x[rows], log_probs[rows], np.eye(len(scores.labels))[columns[rows]])
    else:
        linear = _fit_means(x, log_probs, columns, rows, unknown)
    return linear_adapter(linear, scores.labels, scores.fingerprint, made)


def linear_adapter(linear: Linear, labels: LabelSet, fingerprint: str, made: Made) -> LinearAdapter:
    """A linear rule on the scorer's log-probabilities and the embeddings, as an adapter.

    Args:
        linear: for these C labels.
        labels: the label set.
        fingerprint: of the scorer without an adapter.
        made: how the rule was learned.
    """
    return LinearAdapter(
        labels=labels.names,
        fingerprint=fingerprint,
        made=made,
        own=linear.own,
        weights=linear.weights,
        bias=linear.bias.astype(np.float32),
    )


def columns_of(truths: Sequence[str], labels: LabelSet) -> Columns:
    """`(N,)` the column of each label, `NOBODY` for "".

    Raises:
        DataError: if a truth is no label.
    """
    if unknown := [truth for truth in truths if truth != "" and truth not in labels.columns]:
        hint = 'Give names of labels, and "" where the label is not known.'
        raise DataError(f"{unknown[0]!r} is no label of the label set.", hint=hint)
    return np.array([labels.columns[truth] if truth else NOBODY for truth in truths], dtype=np.int64)


def distinct(embeddings: NDArray[np.floating], columns: Columns) -> Rows:
    """`(n,)` the rows of the labelled images without near-duplicates, in their order: the first image of each group."""
    return np.unique(first_alike(embeddings, columns)[columns != NOBODY])


def first_alike(embeddings: NDArray[np.floating], columns: Columns) -> Rows:
    """`(N,)` for each image, the row of the first image in its group of near-duplicates.

    Images of one label with a cosine of at least 0.98 are in one group, and so are images that are connected by such pairs. An
    image without a label is a group of its own.
    """
    first = np.arange(len(columns))
    for column in np.unique(columns[columns != NOBODY]):
        rows = np.flatnonzero(columns == column)
        near = embeddings[rows] @ embeddings[rows].T >= NEAR_DUPLICATE
        _, begin, group = np.unique(
            connected_components(coo_array(near), directed=False)[1], return_index=True, return_inverse=True
        )
        first[rows] = rows[begin[group]]
    return first


def _fit_means(x: NDArray[np.float32], log_probs: Floats, columns: Columns, rows: Rows, unknown: Rows) -> Linear:
    """What the labelled ``rows`` teach, and the images with ``unknown`` labels beside them."""
    if len(rows):
        start = Labelled.of(log_probs[rows], x[rows], columns[rows], matrix=False)
    else:
        start = Labelled.none(ScorerCalibration.identity(log_probs.shape[1]), x.shape[1])

    def chunks() -> Iterator[Scored]:
        for begin in range(0, len(unknown), AT_ONCE):
            some = unknown[begin : begin + AT_ONCE]
            yield log_probs[some], x[some]

    return start.taught(transduced(start, chunks).sums if len(unknown) else start.nothing()).linear()


def _fit_probe(x: NDArray[np.float32], log_probs: Floats, truths: Floats) -> Linear:
    """What the softmax regression teaches.

    Args:
        x: `(N, D)`.
        log_probs: `(N, C)`.
        truths: `(N, C)`, one-hot.
    """
    evidence, folds = np.empty_like(log_probs), fold_of(len(x))
    for fold in range(FOLDS):
        inside = folds == fold
        weights, bias = probe(x[~inside], log_probs[~inside], truths[~inside])
        evidence[inside] = x[inside] @ weights.T + bias
    own, strength = fit_strength(log_probs, evidence, truths)
    weights, bias = probe(x, log_probs, truths)
    return Linear(own=own, weights=(strength * weights).astype(np.float32), bias=strength * bias)


def probe(x: NDArray[np.float32], log_probs: Floats, truths: Floats) -> tuple[Floats, Floats]:
    """`(C, D)` weights and `(C,)` biases of a softmax regression beside the scorer's opinion at its best temperature."""
    scale, _ = fit_strength(log_probs, np.zeros_like(log_probs), truths)
    mean = x.mean(axis=0)
    centred, start, wanted = x - mean, (scale * log_probs).astype(np.float32), truths.astype(np.float32)
    shape = log_probs.shape[1], x.shape[1]

    def objective(values: Floats) -> tuple[float, Floats]:
        fitted = log_softmax(start + centred @ values.reshape(shape).T.astype(np.float32), axis=1)
        gradient = (np.exp(fitted) - wanted).T @ centred
        unlikelihood = -(wanted * fitted).sum(dtype=np.float64)
        return float(unlikelihood + PRECISION / 2 * (values @ values)), gradient.ravel() + PRECISION * values

    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    weights = found.reshape(shape)
    return weights, -weights @ mean


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """One choice of the numbers of a cache, and what it is worth."""

    sharpness: float
    temperature: float = 0.0
    intercept: float = 0.0
    slope: float = 0.0
    scale: float = 1.0
    strength: float = 0.0
    log_likelihood: float = -np.inf


def _fit_cache(scores: Scores, made: Made, x: NDArray[np.float32], log_probs: Floats, columns: Columns) -> CacheAdapter:
    """β, α and the likeness of the best log-likelihood, where each image is left out of the cache."""
    values = np.eye(len(scores.labels), dtype=np.float32)[columns]
    tried = np.random.default_rng(0).permutation(len(x))[:MOST_TRIED]
    others = tried[:, None] != np.arange(len(x))
    cosines = x[tried] @ x.T

    def attempt(weights: NDArray[np.float32], cache: _Cache) -> _Cache:
        evidence = np.where(others, weights, np.float32(0)) @ values
        scale, strength = fit_strength(log_probs[tried], evidence.astype(np.float64), values[tried].astype(np.float64))
        fitted = log_softmax(scale * log_probs[tried] + strength * evidence, axis=1)
        return replace(cache, scale=scale, strength=strength, log_likelihood=float((values[tried] * fitted).sum()))

    def likelihood(cache: _Cache) -> float:
        return cache.log_likelihood

    best = max((attempt(affinities(cosines, beta), _Cache(sharpness=beta)) for beta in SHARPNESSES), key=likelihood)
    near = affinities(cosines, best.sharpness)
    lowest, highest = near[others].min(), near[others].max()
    alike = []
    for temperature, weight in product(TEMPERATURES, LIKENESSES):
        signed = signatures(log_probs, temperature)
        apart = divergences(signed[tried], signed)
        closest, farthest = apart[others].min(), apart[others].max()
        slope = weight * float(highest - lowest) / max(float(farthest - closest), 1e-6)
        intercept = weight * float(highest) + slope * float(closest)
        cache = _Cache(sharpness=best.sharpness, temperature=temperature, intercept=intercept, slope=slope)
        alike.append(attempt(near + np.float32(intercept) - np.float32(slope) * apart, cache))
    best = max([best, *alike], key=likelihood)
    return CacheAdapter(
        labels=scores.labels.names,
        fingerprint=scores.fingerprint,
        made=made,
        own=best.scale,
        keys=x.astype(np.float16),
        values=values.astype(np.float16),
        strength=best.strength,
        sharpness=best.sharpness,
        signatures=signatures(log_probs, best.temperature).astype(np.float16) if best.temperature else None,
        temperature=best.temperature,
        intercept=best.strength * best.intercept,
        slope=best.strength * best.slope,
    )


def embeddings_of(scores: Scores) -> NDArray[np.float32]:
    """`(N, D)` embeddings that an adapter can be made from.

    Raises:
        InputError: if there are none, their rows do not have length 1, or the scores were made with an adapter.
        DataError: if there are too many labels times dimensions.
    """
    if scores.embeddings is None:
        raise InputError("These scores have no embeddings, which an adapter needs.", hint="Use an open_clip or hf scorer.")
    if "|adapter=" in scores.fingerprint:
        raise InputError("These scores were made with an adapter.", hint="Score the images without it: scorer.adapter = None.")
    classes, dimensions = len(scores.labels), scores.embeddings.shape[1]
    if classes * dimensions > MOST_NUMBERS:
        raise DataError(
            f"{classes:,} labels times {dimensions:,} dimensions are more than {MOST_NUMBERS:,}.", hint="Learn for fewer labels."
        )
    embeddings = scores.embeddings.astype(np.float32)
    if not (np.abs(np.linalg.norm(embeddings, axis=1) - 1) <= ROUNDING).all():  # NaN, too
        hint = "Make the scores with scorer.score_embeddings(embeddings, labels), which normalises them."
        raise InputError("The rows of these scores' embeddings do not have length 1.", hint=hint)
    return embeddings
