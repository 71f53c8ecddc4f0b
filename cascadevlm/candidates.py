"""Which labels a judge is offered, and in which order."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.errors import InputError
from cascadevlm.images import pixel_digest
from cascadevlm.types import Candidate, Scores

Order = Literal["ranked", "reversed", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class CandidateRule(ABC):
    """Chooses the candidates of each image.

    Attributes:
        order: best first as the scorer ranks them (CascadeVLM found that order to matter), reversed, or shuffled.
        seed: of the shuffle; an image's order depends on the seed and the image alone.
    """

    order: Order = "ranked"
    seed: int = 0

    @abstractmethod
    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        """How many candidates each of N images gets, given its N x C probabilities in descending order."""

    def choose(self, scores: Scores) -> list[tuple[Candidate, ...]]:
        """The candidates of N images, best first."""
        ranking = np.argsort(-scores.log_probs, axis=1, kind="stable")
        descending = np.take_along_axis(scores.probabilities, ranking, axis=1)
        return [
            tuple(
                Candidate(label=scores.labels[column], probability=float(descending[row, rank]), rank=rank + 1)
                for rank, column in enumerate(ranking[row, :size])
            )
            for row, size in enumerate(self.sizes(descending))
        ]

    def arrange(self, candidates: tuple[Candidate, ...], image: Image.Image) -> tuple[Candidate, ...]:
        """The candidates of one image in the order to be shown."""
        if self.order == "ranked":
            return candidates
        if self.order == "reversed":
            return candidates[::-1]
        seed = hashlib.sha256(f"{self.seed}:{pixel_digest(image)}".encode()).digest()
        permutation = np.random.default_rng(int.from_bytes(seed)).permutation(len(candidates))
        return tuple(candidates[i] for i in permutation)


@dataclass(frozen=True, kw_only=True)
class TopK(CandidateRule):
    """The ``k`` most probable labels (all, where there are fewer)."""

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"A judge needs at least 1 candidate, not {self.k}.")

    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        return np.full(len(descending), min(self.k, descending.shape[1]))


@dataclass(frozen=True, kw_only=True)
class CumulativeMass(CandidateRule):
    """The smallest set of most probable labels that together reach ``mass``, of at least ``minimum`` and at most ``maximum``."""

    mass: float = 0.95
    minimum: int = 2
    maximum: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(f"mass is a probability above 0 and up to 1, not {self.mass!r}.")
        if not 1 <= self.minimum <= self.maximum:
            raise InputError(f"minimum {self.minimum} and maximum {self.maximum} must be at least 1 and in order.")

    def sizes(self, descending: NDArray[np.floating]) -> NDArray[np.intp]:
        reached: NDArray[np.intp] = (descending.cumsum(axis=1) < self.mass - 1e-6).sum(
            axis=1
        ) + 1  # float32 sums stop a little short of 1
        return reached.clip(self.minimum, self.maximum).clip(max=descending.shape[1])
