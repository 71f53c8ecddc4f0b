"""What the answers of a judge teach a scorer: opinions that agree with this judge as often as possible.

The judge's answers count as labels. Without embeddings, the opinion is a calibration of the scores. With embeddings, it
is the mean of the log-probabilities of two linear rules: the class means of `teaching`, and a softmax regression. The mean
of two linear rules is a linear rule, because their normalisers cancel. So an adapter can hold every opinion of embeddings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.agreement import Rows
from cascadevlm.decision.means import fit_strength
from cascadevlm.decision.scorer_calibration import (
    FOLDS,
    CrossFit,
    Floats,
    ScorerCalibration,
    cross_fit_scorer,
    floored,
    fold_of,
)
from cascadevlm.decision.teaching import Labelled, Linear

Rule = ScorerCalibration | Linear

FEWEST_ANSWERS = 10
"""Fewer answers teach nothing."""

MOST_TAUGHT = 1_000_000
"""The largest number of answers times classes that is learned from. It bounds the time: about a minute for 768 dimensions."""

AT_ONCE = 4096
"""Number of images whose log-probabilities are in memory at once."""

PRECISION = 0.3
"""Precision of the normal prior of each weight of the softmax regression. Few answers need a strong prior."""

STEPS = 20
"""Steps of the softmax regression."""

SUREST = 50.0
"""Largest log-odds. Larger values have no meaning, and infinity has no place in a fit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """What a scorer says of N images. All arrays may be memory maps; they are read in parts.

    Attributes:
        log_probs: `(M, C)`, the scorer's log-probabilities, not calibrated.
        embeddings: `(M, D)`, unit length; None for a scorer without embeddings.
        candidates: `(M, k)` columns that the judge can answer; values below 0 fill short lists. Default: all classes.
        rows: `(N,)`, the rows of the images that count. An image that cannot be read is not among them. All numbers of images
            elsewhere are positions in ``rows``. Default: all M rows.
    """

    log_probs: NDArray[np.floating]
    embeddings: NDArray[np.floating] | None = None
    candidates: Columns | None = None
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.log_probs if self.rows is None else self.rows)

    @cached_property
    def classes(self) -> int:
        """C, number of classes."""
        return int(self.log_probs.shape[1])

    def scored(self, some: Rows) -> tuple[Floats, NDArray[np.float32] | None]:
        """`(n, C)` log-probabilities and `(n, D) float32` embeddings of some images; None without embeddings."""
        rows = some if self.rows is None else self.rows[some]
        embeddings = None if self.embeddings is None else np.asarray(self.embeddings[rows], dtype=np.float32)
        return floored(self.log_probs[rows]), embeddings

    def surest(self, log_probs: Floats, some: Rows) -> tuple[Columns, Floats]:
        """`(n,)` most probable candidates of some images, and `(n,)` log-odds that these are right.

        Args:
            log_probs: `(n, C)` of these images.
            some: `(n,)` numbers of the images.
        """
        if self.candidates is None:
            return most_probable(log_probs)
        listed = self.candidates[some if self.rows is None else self.rows[some]]
        among = np.where(listed >= 0, np.take_along_axis(log_probs, np.maximum(listed, 0), axis=1), -np.inf)
        places, odds = most_probable(among)
        return np.take_along_axis(listed, places[:, None], axis=1)[:, 0].astype(np.int64), odds

    @property
    def numbers(self) -> Rows:
        """`(N,)`, the rows of the images that count."""
        return np.arange(len(self)) if self.rows is None else self.rows

    def chunks(self) -> Iterator[Rows]:
        """The numbers of all images, in parts."""
        for begin in range(0, len(self), AT_ONCE):
            yield np.arange(begin, min(begin + AT_ONCE, len(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Opinion:
    """What is believed without asking.

    Attributes:
        rule: gives log-probabilities.
        held_out: `(n, C)` log-probabilities of the images that taught, each without its own answer.
    """

    rule: Rule
    held_out: Floats

    def of(self, images: Images, column: int | None = None) -> tuple[Columns, NDArray[np.float32]]:
        """`(N,)` answers and `(N,) float32` log-odds that these are the judge's.

        Args:
            images: of the scorer.
            column: a class. The answers are then `NOBODY`, for "not this class", as in `against`.
        """
        labels, odds = np.empty(len(images), dtype=np.int64), np.empty(len(images), dtype=np.float32)
        for some in images.chunks():
            log_probs = applied(self.rule, *images.scored(some))
            labels[some], odds[some] = images.surest(log_probs, some) if column is None else against(log_probs, column)
        return labels, odds


def applied(rule: Rule, log_probs: Floats, embeddings: NDArray[np.float32] | None) -> Floats:
    """`(N, C)` log-probabilities that a rule gives."""
    if isinstance(rule, ScorerCalibration):
        return rule(log_probs)
    if embeddings is None:
        raise ValueError("a linear rule needs embeddings")
    return rule(log_probs, embeddings)


def most_probable(log_probs: Floats) -> tuple[Columns, Floats]:
    """`(N,)` columns of the largest of `(N, C)` log-probabilities, and their `(N,)` log-odds against all others together."""
    top = log_probs.argmax(axis=1)
    others = log_probs.copy()
    np.put_along_axis(others, top[:, None], -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        odds = log_probs.max(axis=1) - logsumexp(others, axis=1)
    return top.astype(np.int64), np.clip(odds, -SUREST, SUREST)


def against(log_probs: Floats, column: int) -> tuple[Columns, Floats]:
    """`(N,)` times `NOBODY`, for "not this class", and the `(N,)` log-odds that an image is not of the class."""
    odds = logsumexp(np.delete(log_probs, column, axis=1), axis=1) - log_probs[:, column]
    return np.full(len(log_probs), NOBODY, dtype=np.int64), np.clip(odds, -SUREST, SUREST)


def taught_by(images: Images, rows: Rows, answers: Columns) -> Opinion:
    """The opinion that some answers of the judge teach.

    Args:
        images: of the scorer.
        rows: `(n,)` images that the judge was asked about.
        answers: `(n,)` columns; below 0 where the judge named no class.
    """
    log_probs, embeddings = images.scored(rows)
    named = answers >= 0
    if named.sum() < FEWEST_ANSWERS:
        return Opinion(rule=ScorerCalibration.identity(images.classes), held_out=log_probs)
    known = answers[named]
    rule: Rule
    if embeddings is None:
        fit = cross_fit_scorer(log_probs[named], np.eye(images.classes)[known])
        rule, held_out = fit.calibration, fit.held_out
    else:
        rule, held_out = _mean_of_two(log_probs[named], embeddings[named], known)
    found = applied(rule, log_probs, embeddings)
    found[named] = held_out
    return Opinion(rule=rule, held_out=found)


def _mean_of_two(log_probs: Floats, embeddings: NDArray[np.float32], answers: Columns) -> tuple[Linear, Floats]:
    """The mean of the class means and a softmax regression; and `(n, C)` log-probabilities of the images, each held out."""
    identity = ScorerCalibration.identity(log_probs.shape[1])
    fit = CrossFit(calibration=identity, held_out=log_probs, without=(identity,) * FOLDS)
    labelled = Labelled(embeddings=embeddings, truths=answers, fit=fit)
    means = labelled.taught(labelled.nothing())
    held_out, folds = np.empty_like(log_probs), fold_of(len(log_probs))
    for fold in range(FOLDS):
        inside = folds == fold
        regression = softmax_regression(log_probs[~inside], embeddings[~inside], answers[~inside])
        held_out[inside] = regression(log_probs[inside], embeddings[inside])
    regression, linear = softmax_regression(log_probs, embeddings, answers), means.linear()
    mean = Linear(
        own=(linear.own + regression.own) / 2,
        weights=((linear.weights + regression.weights) / 2).astype(np.float32),
        bias=(linear.bias + regression.bias) / 2,
    )
    return mean, log_softmax((means.held_out + held_out) / 2, axis=1)


def softmax_regression(log_probs: Floats, embeddings: NDArray[np.float32], answers: Columns) -> Linear:
    """A softmax regression on embeddings, beside the scorer's opinion at its best temperature.

    The steps use an upper bound of the curvature (Böhning, "Multinomial logistic regression algorithm", 1992), with momentum
    (Nesterov 1983).

    Args:
        log_probs: `(n, C)`, the scorer's.
        embeddings: `(n, D)`.
        answers: `(n,)` columns.
    """
    wanted = np.eye(log_probs.shape[1])[answers]
    scale, _ = fit_strength(log_probs, np.zeros_like(log_probs), wanted)
    mean = embeddings.mean(axis=0)
    centred, start, wanted32 = embeddings - mean, (scale * log_probs).astype(np.float32), wanted.astype(np.float32)
    bound = 0.5 * (centred.T @ centred) + PRECISION * np.eye(centred.shape[1], dtype=np.float32)
    inverse = np.linalg.inv(bound)
    weights = ahead = np.zeros((centred.shape[1], log_probs.shape[1]), dtype=np.float32)
    for step in range(STEPS):
        logits = start + centred @ ahead
        logits -= logits.max(axis=1, keepdims=True)
        fitted = np.exp(logits)
        fitted /= fitted.sum(axis=1, keepdims=True)
        before, weights = weights, ahead - inverse @ (centred.T @ (fitted - wanted32) + np.float32(PRECISION) * ahead)
        ahead = weights + np.float32(step / (step + 3)) * (weights - before)
    return Linear(own=scale, weights=weights.T.copy(), bias=-(mean @ weights).astype(np.float64))
