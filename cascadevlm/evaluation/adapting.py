"""Making an adapter from images, and measuring what it gains on images that it was not made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.decision.adapting import FEWEST_IMAGES, FOLDS, fit_adapter, folds, near_duplicates, responsibilities
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.scorers.adapters import Adapter, Method
from cascadevlm.scorers.base import Scorer, WrapperScorer


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """An adapter and what it gains.

    All figures but ``changed`` are of images with known labels, in five folds: an adapter that was made without a fold is
    measured on that fold. A group of near-duplicates counts as one image. None without labels.

    Attributes:
        adapter: made from all images.
        groups: number of groups of near-duplicates, and of images that have none, among the images with known labels.
        before: accuracy of the scorer without an adapter, from 0 to 1.
        after: accuracy with the adapter.
        gain: ``after`` less ``before``.
        gain_interval: 95 % interval of the gain. The images are resampled in pairs.
        changed: share of all images whose best label the adapter changes.
    """

    adapter: Adapter
    groups: int
    before: float | None
    after: float | None
    gain: float | None
    gain_interval: Interval | None
    changed: float

    @property
    def gains(self) -> bool:
        """Whether the lower end of the interval of the gain is above 0."""
        return self.gain_interval is not None and self.gain_interval[0] > 0


def adapt(scores: Scores, truths: Sequence[str], *, method: Method = "means") -> Adapted:
    """Make an adapter and measure it.

    Args:
        scores: of N images, with embeddings, from the scorer without an adapter.
        truths: N names of labels, "" where the label is not known.
        method: how to learn.

    Raises:
        InputError: as `fit_adapter`.
        DataError: as `fit_adapter`; if some labels are known, but fewer than 20.
    """
    beliefs = responsibilities(truths, scores.labels)
    known = beliefs.sum(axis=1) > 0
    if 0 < known.sum() < 2 * FEWEST_IMAGES:
        hint = "Give more images, or leave their labels out."
        raise DataError(f"{known.sum()} images with labels are too few: at least {2 * FEWEST_IMAGES} are needed.", hint=hint)
    adapter = fit_adapter(scores, truths, method=method)
    assert scores.embeddings is not None
    x = scores.embeddings.astype(np.float32)
    after = adapter.logits(x, scores.log_probs).argmax(axis=1)
    changed = float((after != scores.log_probs.argmax(axis=1)).mean())
    if not known.any():
        return Adapted(adapter=adapter, groups=0, before=None, after=None, gain=None, gain_interval=None, changed=changed)
    fold_of = folds(x, beliefs)
    for fold in range(FOLDS):
        inside = fold_of == fold
        outside = np.flatnonzero(~inside)
        made = fit_adapter(scores.rows(outside), [truths[int(row)] for row in outside], method=method)
        after[inside] = made.logits(x[inside], scores.log_probs[inside]).argmax(axis=1)
    groups = near_duplicates(x[known], beliefs[known])
    columns = beliefs[known].argmax(axis=1)
    before = _per_group(scores.log_probs[known].argmax(axis=1) == columns, groups)
    now = _per_group(after[known] == columns, groups)
    adapted = Adapted(
        adapter=adapter,
        groups=len(now),
        before=float(before.mean()),
        after=float(now.mean()),
        gain=float((now - before).mean()),
        gain_interval=interval(now - before),
        changed=changed,
    )
    figures: dict[str, JsonValue] = {"before": adapted.before, "after": adapted.after, "groups": adapted.groups}
    return replace(adapted, adapter=replace(adapter, made=replace(adapter.made, figures=figures)))


def _per_group(right: NDArray[np.bool_], groups: NDArray[np.intp]) -> NDArray[np.float64]:
    """The share of right answers in each group."""
    found: NDArray[np.float64] = np.bincount(groups, weights=right) / np.bincount(groups)
    return found


def embedded(
    cascade: Cascade, images: Sequence[ImageSource], progress: Callable[[Prediction], None]
) -> tuple[Scores, NDArray[np.bool_]]:
    """The scores, with embeddings, of the n images that can be read; and for each of N images whether it can.

    Args:
        cascade: its scorer embeds the images.
        images: N images.
        progress: called once per image.

    Raises:
        DataError: if no image can be read.
    """
    keeping = _Keeping(cascade.scorer)
    readable = []
    for prediction in cascade.altered(scorer=keeping, stages=()).stream(images):
        readable.append(bool(prediction.candidates))
        progress(prediction)
    if not keeping.kept:
        raise DataError("No image can be read.")
    return Scores.joined(keeping.kept), np.array(readable, dtype=bool)


class _Keeping(WrapperScorer):
    """Scores as another scorer does, and keeps the scores."""

    def __init__(self, wrapped: Scorer) -> None:
        super().__init__(wrapped)
        self.kept: list[Scores] = []

    def altered(self, scores: Scores) -> Scores:
        self.kept.append(scores)
        return scores
