"""Several scorers as one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.errors import InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.scorers.base import Prepared, Scorer, load_once, score_in_turn


class Pooling(Protocol):
    """Makes one opinion of the opinions of K scorers."""

    @property
    def digest(self) -> str:
        """Identifies everything that changes the result."""

    def __call__(self, parts: Sequence[Scores]) -> NDArray[np.floating]:
        """`(N, C)` logits from the K scorers' scores of the same N images and C labels.

        Raises:
            ConfigError: if the scores are of other scorers or labels.
        """


class EqualPool:
    """Averages the log-probabilities: all scorers have the same weight."""

    digest = "equal"

    def __call__(self, parts: Sequence[Scores]) -> NDArray[np.floating]:
        mean: NDArray[np.floating] = np.mean([part.log_probs for part in parts], axis=0)
        return mean


@dataclass(kw_only=True, eq=False)
class _PreparedByAll(Prepared):
    """An image on its way through several scorers.

    Attributes:
        parts: what each scorer prepared of the image.
    """

    parts: list[Prepared] = field(default_factory=list)


class SeveralScorers(Scorer):
    """Scores with K scorers and pools what they say. The embeddings of the scorers that embed stand side by side.

    Args:
        scorers: two or more scorers.
        pool: pools the scores. Default: the mean of the log-probabilities.

    Raises:
        InputError: if there are fewer than two scorers.
    """

    def __init__(self, scorers: Sequence[Scorer], *, pool: Pooling | None = None) -> None:
        if len(scorers) < 2:
            raise InputError(f"Several scorers are at least 2, not {len(scorers)}.", hint="Use the scorer itself.")
        self.scorers = tuple(scorers)
        self.pool = pool or EqualPool()

    def check(self) -> str:
        return "; ".join(filter(None, (scorer.check() for scorer in self.scorers)))

    def load(self) -> None:
        for scorer in self.scorers:
            load_once(scorer)

    def prepare(self, source: ImageSource) -> Prepared:
        parts = [scorer.prepare(source) for scorer in self.scorers]
        decoded = next((part for part in parts if part.decoded), None)
        for part in parts:
            if decoded is not None and part.decoded:
                part.pixels = decoded.pixels  # equal pixels, which are then in memory only once
        return _PreparedByAll(
            source=source,
            pixels=decoded.pixels if decoded else None,
            size=next((part.size for part in parts if part.size), None),
            digest=next((part.digest for part in parts if part.digest), ""),
            parts=parts,
        )

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self._pooled([scorer.score(images, labels) for scorer in self.scorers], labels)

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        known = [each for each in prepared if isinstance(each, _PreparedByAll)]
        parts = [
            score_in_turn(scorer, [each.parts[number] for each in known], labels) for number, scorer in enumerate(self.scorers)
        ]
        return self._pooled(parts, labels)

    def _pooled(self, parts: Sequence[Scores], labels: LabelSet) -> Scores:
        """The scores of all scorers as one."""
        named = " + ".join(part.fingerprint.replace("|", ";") for part in parts)
        rows = [part.embeddings for part in parts if part.embeddings is not None]
        return Scores.from_logits(
            self.pool(parts),
            labels,
            f"{named}|pool={self.pool.digest}|{labels.texts_part}",
            embeddings=(np.concatenate(rows, axis=1) / np.sqrt(len(rows))).astype(np.float16) if rows else None,
        )
