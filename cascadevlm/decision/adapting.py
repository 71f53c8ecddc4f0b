"""Fitting adapters: from images with labels, from images with beliefs in place of labels, and from images alone.

Every method gives evidence g, in nats per label, about the embedding of an image. The adapter believes softmax(s l + α g), where
l are the scorer's own log-probabilities. The scale s and the strength α are fitted by maximum likelihood. The evidence for that
comes from fits that left the image out, because evidence about images that were fitted is overconfident. Near-duplicates of an
image, such as other frames of one clip, are left out with it.

means: `cascadevlm.decision.means`. cache: `CacheAdapter`. linear: a softmax regression that starts from the scorer (the linear
probe of Lin et al., "Multimodality Helps Unimodality", CVPR 2023). Its α mixes what was learned with the scorer (Wortsman et al.,
"Robust fine-tuning of zero-shot models", CVPR 2022, have α = 0.5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax, softmax

from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.decision.means import STRENGTH, Sums, fit_strength
from cascadevlm.decision.scorer_calibration import Floats, floored
from cascadevlm.scorers.adapters import (
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

Ids: TypeAlias = NDArray[np.intp]

FOLDS = 5

NEAR_DUPLICATE = 0.98
"""Cosine from which two images of one label are near-duplicates. Different photos of one kind of flower seldom come near it."""

FEWEST_IMAGES = 10
"""Fewer labelled images say nothing about the strength of the evidence."""

ROUNDS = 10
"""Rounds of expectation and maximisation for images without labels."""

ROUND_STRENGTH = 0.1
"""α in these rounds, if no label is known."""

UNKNOWN = 0.3
"""Weight of an image without a label beside images with labels, which have weight 1."""

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


def fit_adapter(
    scores: Scores, truths: Sequence[str] | NDArray[np.floating] | None = None, *, method: Method = "means"
) -> Adapter:
    """The adapter that images teach.

    Args:
        scores: of N images, with embeddings, from the scorer without an adapter, as ``scorer.score(images, labels)`` or
            ``scorer.score_embeddings(embeddings, labels)`` gives them.
        truths: N names of labels, "" where the label is not known; or `(N, C)` beliefs, how likely each label is to be the truth,
            a row of zeros where nothing is known. Default: no label is known, and the images alone teach.
        method: "means" is best on most data, and the only one that learns from images without labels.

    Raises:
        InputError: if the scores have no embeddings, were made with an adapter, or the method needs the labels of all images.
        DataError: if the truths do not fit the images, there are fewer than 10 images, fewer than 10 labels of images are known
            but some, or there are too many labels times dimensions.
    """
    x, own = _embeddings(scores), floored(scores.log_probs)
    beliefs = responsibilities(truths if truths is not None else [""] * len(x), scores.labels)
    if beliefs.shape != own.shape:
        raise DataError(f"The truths have shape {beliefs.shape}, not {own.shape}.")
    known = beliefs.sum(axis=1) > 0
    for number, what in ((len(x), "images"), (int(known.sum()) or FEWEST_IMAGES, "images with labels")):
        if number < FEWEST_IMAGES:
            raise DataError(f"{number} {what} are too few for an adapter, which needs at least {FEWEST_IMAGES}.")
    if method != "means" and not known.all():
        raise InputError(f"The method {method!r} needs the labels of all images.", hint='The method "means" does not.')
    made = Made(method=method, images=len(x), labelled=int(known.sum()))
    fitting = _Fitting(labels=scores.labels.names, fingerprint=scores.fingerprint, made=made)
    if not known.any():
        return fitting.linear(learn_means(x, own, beliefs), 1.0, STRENGTH)
    if method == "cache":
        return _fit_cache(fitting, x, own, beliefs)
    return fitting.linear(*_cross_fitted(learn_means if method == "means" else learn_probe, x, own, beliefs))


def responsibilities(truths: Sequence[str] | NDArray[np.floating], labels: LabelSet) -> Floats:
    """`(N, C)`, how likely each label is to be the truth; a row of zeros where nothing is known.

    Raises:
        DataError: if a truth is no label, or beliefs are no probabilities.
    """
    if isinstance(truths, np.ndarray) and truths.ndim == 2:
        beliefs = truths.astype(np.float64)
        totals = beliefs.sum(axis=1)
        if not ((np.abs(totals - 1) < 1e-3) | (totals == 0)).all() or (beliefs < 0).any():
            raise DataError("The beliefs of an image must be probabilities that sum to 1, or all 0.")
        return beliefs
    if unknown := [str(truth) for truth in truths if truth and truth not in labels.columns]:
        raise DataError(f"{unknown[0]!r} is no label of the label set.")
    beliefs = np.zeros((len(truths), len(labels)))
    for row, truth in enumerate(truths):
        if truth:
            beliefs[row, labels.columns[str(truth)]] = 1.0
    return beliefs


def near_duplicates(embeddings: NDArray[np.floating], beliefs: Floats) -> Ids:
    """`(N,)`, the number of the group of each image. Images of one label with a cosine of at least 0.98 are in one group, and so
    are images that are connected by such pairs."""
    label_of = beliefs.argmax(axis=1)
    pairs = [(np.arange(0), np.arange(0))]
    for label in np.unique(label_of):
        rows = np.flatnonzero(label_of == label)
        first, second = np.nonzero(embeddings[rows] @ embeddings[rows].T >= NEAR_DUPLICATE)
        pairs.append((rows[first], rows[second]))
    first, second = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(embeddings),) * 2)
    found: Ids = connected_components(graph, directed=False)[1].astype(np.intp)
    return found


def folds(embeddings: NDArray[np.floating], beliefs: Floats) -> Ids:
    """`(N,)`, the fold of each image from 0 to 4; -1 for images whose label is not known. Near-duplicates are in one fold, and
    each label is spread evenly over the folds."""
    known = np.flatnonzero(beliefs.sum(axis=1))
    groups = near_duplicates(embeddings[known], beliefs[known])
    first_of = known[np.unique(groups, return_index=True)[1]]
    order = np.random.default_rng(0).permutation(len(first_of))
    order = order[np.argsort(beliefs[first_of[order]].argmax(axis=1), kind="stable")]
    fold_of_group = np.empty(len(order), dtype=np.intp)
    fold_of_group[order] = np.arange(len(order)) % FOLDS
    found = np.full(len(beliefs), -1)
    found[known] = fold_of_group[groups]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """Evidence that is linear in the embedding: ``x @ directions + offsets``, in nats.

    Attributes:
        directions: `(D, C)`.
        offsets: `(C,)`.
    """

    directions: Floats
    offsets: Floats

    def evidence(self, embeddings: NDArray[np.floating]) -> Floats:
        """`(N, C)`, from `(N, D)`."""
        found: Floats = embeddings @ self.directions + self.offsets
        return found


def _cross_fitted(
    learn: Callable[[NDArray[np.floating], Floats, Floats], Evidence], x: NDArray[np.floating], own: Floats, beliefs: Floats
) -> tuple[Evidence, float, float]:
    """What is learned from all images, with s and α from images that were left out."""
    fold_of = folds(x, beliefs)
    held_out = np.empty_like(own)
    for fold in range(FOLDS):
        inside = fold_of == fold
        held_out[inside] = learn(x[~inside], own[~inside], beliefs[~inside]).evidence(x[inside])
    known = fold_of >= 0
    return learn(x, own, beliefs), *fit_strength(own[known], held_out[known], beliefs[known])


def learn_means(x: NDArray[np.floating], own: Floats, beliefs: Floats) -> Evidence:
    """The evidence of class means with a shared covariance.

    Images whose label is not known count with what is believed of them: first by the scorer and the images with labels, then by
    all images (expectation and maximisation).
    """
    known = beliefs.sum(axis=1) > 0
    if known.all():
        return _means(x, beliefs, np.ones(len(x)))
    scale, strength = 1.0, ROUND_STRENGTH
    learned = Evidence(directions=np.zeros((x.shape[1], own.shape[1])), offsets=np.zeros(own.shape[1]))
    if known.any():
        learned, scale, strength = _cross_fitted(learn_means, x[known], own[known], beliefs[known])
    filled, weights = beliefs.copy(), np.where(known | ~known.any(), 1.0, UNKNOWN)
    for _ in range(ROUNDS):
        filled[~known] = softmax(scale * own[~known] + strength * learned.evidence(x[~known]), axis=1)
        learned = _means(x, filled, weights)
    return learned


def _means(x: NDArray[np.floating], beliefs: Floats, weights: Floats) -> Evidence:
    means = Sums.of(x, beliefs, weights).means()
    return Evidence(directions=means.directions, offsets=means.offsets - means.mean @ means.directions)


def learn_probe(x: NDArray[np.floating], own: Floats, beliefs: Floats) -> Evidence:
    """The evidence of a softmax regression on the embeddings, beside the scorer's logits at their best temperature."""
    scale, _ = fit_strength(own, np.zeros_like(own), beliefs)
    mean = x.mean(axis=0)
    centred, start, wanted = (each.astype(np.float32) for each in (x - mean, scale * own, beliefs))
    shape = own.shape[1], x.shape[1]

    def objective(values: Floats) -> tuple[float, Floats]:
        log_probs = log_softmax(start + centred @ values.reshape(shape).T.astype(np.float32), axis=1)
        gradient = (np.exp(log_probs) - wanted).T @ centred
        unlikelihood = -(wanted * log_probs).sum(dtype=np.float64)
        return float(unlikelihood + PRECISION / 2 * (values @ values)), gradient.ravel() + PRECISION * values

    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    directions = found.reshape(shape).T
    return Evidence(directions=directions, offsets=-mean @ directions)


@dataclass(frozen=True, kw_only=True)
class _Fitting:
    """What every adapter of one fit has in common; as in `Adapter`."""

    labels: tuple[str, ...]
    fingerprint: str
    made: Made

    def linear(self, learned: Evidence, scale: float, strength: float) -> LinearAdapter:
        return LinearAdapter(
            labels=self.labels,
            fingerprint=self.fingerprint,
            made=self.made,
            own=scale,
            weights=(strength * learned.directions.T).astype(np.float32),
            bias=(strength * learned.offsets).astype(np.float32),
        )


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


def _fit_cache(fitting: _Fitting, x: NDArray[np.floating], own: Floats, beliefs: Floats) -> CacheAdapter:
    """β, α and the likeness of the best log-likelihood, where each image is left out of the cache together with its group."""
    keys, values = x.astype(np.float32), beliefs.astype(np.float32)
    tried = np.random.default_rng(0).permutation(len(x))[:MOST_TRIED]
    groups = near_duplicates(x, beliefs)
    others = groups[tried, None] != groups
    cosines = keys[tried] @ keys.T

    def attempt(weights: NDArray[np.float32], cache: _Cache) -> _Cache:
        evidence = np.where(others, weights, np.float32(0)) @ values
        scale, strength = fit_strength(own[tried], evidence.astype(np.float64), beliefs[tried])
        log_probs = log_softmax(scale * own[tried] + strength * evidence, axis=1)
        return replace(cache, scale=scale, strength=strength, log_likelihood=float((beliefs[tried] * log_probs).sum()))

    def likelihood(cache: _Cache) -> float:
        return cache.log_likelihood

    best = max((attempt(affinities(cosines, beta), _Cache(sharpness=beta)) for beta in SHARPNESSES), key=likelihood)
    near = affinities(cosines, best.sharpness)
    lowest, highest = near[others].min(), near[others].max()
    alike = []
    for temperature, weight in product(TEMPERATURES, LIKENESSES):
        signed = signatures(own, temperature)
        apart = divergences(signed[tried], signed)
        closest, farthest = apart[others].min(), apart[others].max()
        slope = weight * float(highest - lowest) / max(float(farthest - closest), 1e-6)
        intercept = weight * float(highest) + slope * float(closest)
        cache = _Cache(sharpness=best.sharpness, temperature=temperature, intercept=intercept, slope=slope)
        alike.append(attempt(near + np.float32(intercept) - np.float32(slope) * apart, cache))
    best = max([best, *alike], key=likelihood)
    return CacheAdapter(
        labels=fitting.labels,
        fingerprint=fitting.fingerprint,
        made=fitting.made,
        own=best.scale,
        keys=x.astype(np.float16),
        values=beliefs.astype(np.float16),
        strength=best.strength,
        sharpness=best.sharpness,
        signatures=signatures(own, best.temperature).astype(np.float16) if best.temperature else None,
        temperature=best.temperature,
        intercept=best.strength * best.intercept,
        slope=best.strength * best.slope,
    )


def _embeddings(scores: Scores) -> NDArray[np.float32]:
    """`(N, D)`.

    Raises:
        InputError: if there are none, or the scores were made with an adapter.
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
    return scores.embeddings.astype(np.float32)
