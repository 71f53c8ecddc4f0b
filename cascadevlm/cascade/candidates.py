"""Chooses the labels that a judge sees, and their order."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.bounds import Count, Mass, require_number
from cascadevlm.base.errors import InputError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.types import Candidate, Scores
from cascadevlm.decision.conformal import Conformal

Order = Literal["ranked", "reversed", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class CandidateRule(ABC):
    """Chooses the candidates of each image.

    Attributes:
        order: order in the question: the scorer's best label first, reversed, or shuffled. CascadeVLM found that the order
            matters.
        seed: seed of the shuffle. The order for an image depends only on the seed and the image.
    """

    order: Order = "ranked"
    seed: int = 0

    @abstractmethod
    def most(self) -> int:
        """Largest number of candidates of one image."""

    @abstractmethod
    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        """(N,) number of candidates of each image, from the `(N, K)` probabilities of its best labels in descending order."""

    def columns(self, scores: Scores) -> Columns:
        """`(N, K)` columns of the score matrix, best first. Among equal scores, the first column comes first. The places after
        the last candidate of an image contain `NOBODY`.
        """
        best = _best(scores.log_probs, min(self.most(), len(scores.labels)))
        sizes = self.sizes(np.take_along_axis(scores.probabilities, best, axis=1))
        return np.where(np.arange(best.shape[1]) < sizes[:, None], best, NOBODY)

    def choose(self, scores: Scores) -> list[tuple[Candidate, ...]]:
        """The candidates of each of N images, best first."""
        columns = self.columns(scores)
        probabilities = np.take_along_axis(scores.probabilities, columns, axis=1)
        return [
            tuple(
                Candidate(label=scores.labels[column], probability=probability, rank=rank)
                for rank, (column, probability) in enumerate(zip(*row, strict=True), start=1)
                if column != NOBODY
            )
            for row in zip(columns.tolist(), probabilities.tolist(), strict=True)
        ]

    def arrange(self, candidates: tuple[Candidate, ...], image: Image.Image) -> tuple[Candidate, ...]:
        """The candidates of one image, in the order in which the judge sees them."""
        if self.order == "ranked":
            return candidates
        if self.order == "reversed":
            return candidates[::-1]
        seed = hashlib.sha256(f"{self.seed}:{pixel_digest(image)}".encode()).digest()
        permutation = np.random.default_rng(int.from_bytes(seed)).permutation(len(candidates))
        return tuple(candidates[i] for i in permutation)


@dataclass(frozen=True, kw_only=True)
class TopK(CandidateRule):
    """The ``k`` most probable labels, or all labels if there are fewer."""

    k: int = 5

    def __post_init__(self) -> None:
        require_number("k", self.k, Count)

    def most(self) -> int:
        return self.k

    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        return np.full(len(descending), self.k)


@dataclass(frozen=True, kw_only=True)
class CumulativeMass(CandidateRule):
    """The most probable labels, as few as needed for a total probability of ``mass``, but at least ``minimum`` and at most
    ``maximum``.
    """

    mass: float = 0.95
    minimum: int = 2
    maximum: int = 10

    def __post_init__(self) -> None:
        require_number("mass", self.mass, Mass)
        _require_bounds(self.minimum, self.maximum)

    def most(self) -> int:
        return self.maximum

    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        short = descending.cumsum(axis=1) < self.mass - 1e-6  # float32 sums stop a little short of 1
        reached: NDArray[np.intp] = short.sum(axis=1) + 1
        return reached.clip(self.minimum, self.maximum)


@dataclass(frozen=True, kw_only=True)
class ConformalSet(CandidateRule):
    """The most probable labels: as many as a conformal ``rule`` needs, so that the list contains the truth as often as it
    promises.

    If the rule has a threshold per class, the promise holds for each class. There are at least ``minimum`` and at most
    ``maximum`` labels. If ``maximum`` shortens a list, the promise does not hold for it. Scores that changed while a cascade
    learned have a threshold of their own (`Scores.thresholds`).
    """

    rule: Conformal
    minimum: int = 2
    maximum: int = 10

    def __post_init__(self) -> None:
        _require_bounds(self.minimum, self.maximum)

    def most(self) -> int:
        return self.maximum

    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        return self.rule.sizes(descending, minimum=self.minimum, maximum=self.maximum)

    def columns(self, scores: Scores) -> Columns:
        if self.rule.class_thresholds is None:
            threshold = scores.thresholds.get(self.rule.coverage, self.rule.threshold)
            return CandidateRule.columns(replace(self, rule=replace(self.rule, threshold=threshold)), scores)
        inside = self.rule.sets(scores.probabilities, minimum=self.minimum, maximum=self.maximum)
        best = _best(np.where(inside, scores.log_probs, -np.inf), min(self.maximum, len(scores.labels)))
        return np.where(np.take_along_axis(inside, best, axis=1), best, NOBODY)

    def choose(self, scores: Scores) -> list[tuple[Candidate, ...]]:
        chosen = super().choose(scores)
        if self.rule.class_thresholds is None:
            return chosen
        rows = (scores.rows(slice(row, row + 1)) for row in range(len(scores)))
        return [tuple(as_scored(row, candidate) for candidate in each) for row, each in zip(rows, chosen, strict=True)]


def as_scored(scores: Scores, candidate: Candidate) -> Candidate:
    """A copy of the candidate with its probability and rank taken from `(1, C)` scores."""
    (row,), column = scores.probabilities, scores.labels.columns[candidate.label.name]
    rank = 1 + int((row > row[column]).sum() + (row[:column] == row[column]).sum())
    return replace(candidate, probability=float(row[column]), rank=rank)


def _require_bounds(minimum: int, maximum: int) -> None:
    require_number("minimum", minimum, Count)
    require_number("maximum", maximum, Count)
    if minimum > maximum:
        raise InputError(f"minimum is {minimum} and maximum is {maximum}: the maximum must not be less than the minimum.")


def _best(values: NDArray[np.floating], number: int) -> Columns:
    """`(N, K)` columns of the highest of `(N, C)` values in descending order. Among equal values, the first column comes first.
    Not all C values are sorted."""
    last = np.partition(values, -number, axis=1)[:, [-number]]
    above, equal = values > last, values == last
    room = number - above.sum(axis=1, keepdims=True)
    columns = np.nonzero(above | (equal & (equal.cumsum(axis=1) <= room)))[1].reshape(len(values), number)
    order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
