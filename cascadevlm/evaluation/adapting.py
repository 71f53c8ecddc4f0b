"""Making an adapter from images, and measuring what it gains on images that it was not made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.decision.adapting import FEWEST_IMAGES, columns_of, distinct, fit_adapter
from cascadevlm.decision.scorer_calibration import FOLDS, Floats, fold_of
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.scorers.adapters import Adapter, Method
from cascadevlm.scorers.base import Scorer, WrapperScorer


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """An adapter and what it gains.

    All figures but ``changed`` are of labelled images that were left out: five adapters are made, each without one fifth of the
    images, and are measured on that fifth. A group of near-duplicates counts as one image. None without labelled images.

    Attributes:
        adapter: made from all images.
        measured: number of labelled images without near-duplicates.
        before: accuracy of the scorer without an adapter, from 0 to 1.
        after: accuracy with the adapter.
        gain: ``after`` less ``before``.
        gain_interval: 95 % interval of the gain. The images are resampled in pairs.
        changed: share of all images whose best label the adapter changes.
        unseen: number of labels without a labelled image, if there are labelled images. The gain says nothing about images of
            these labels.
    """

    adapter: Adapter
    measured: int
    changed: float
    before: float | None = None
    after: float | None = None
    gain: float | None = None
    gain_interval: Interval | None = None
    unseen: int = 0

    @property
    def gains(self) -> bool:
        """Whether the lower end of the interval of the gain is above 0, and no label is unseen."""
        return self.gain_interval is not None and self.gain_interval[0] > 0 and not self.unseen


def adapt(scores: Scores, truths: Sequence[str], *, method: Method = "means") -> Adapted:
    """Make an adapter and measure it.

    Args:
        scores: of N images, with embeddings, from the scorer without an adapter.
        truths: N names of labels, "" where the label is not known.
        method: how to learn.

    Raises:
        InputError: as `fit_adapter`.
        DataError: as `fit_adapter`; if there are labelled images, but fewer than 20 different ones.
    """
    columns = columns_of(truths, scores.labels)
    adapter = fit_adapter(scores, truths, method=method)
    changed = float((_best(adapter, scores) != scores.log_probs.argmax(axis=1)).mean())
    if (columns == NOBODY).all():
        return Adapted(adapter=adapter, measured=0, changed=changed)
    assert scores.embeddings is not None
    rows = distinct(scores.embeddings.astype(np.float32), columns)
    if len(rows) < 2 * FEWEST_IMAGES:
        message = (
            f"{len(rows)} different images with labels are too few to measure a gain: at least {2 * FEWEST_IMAGES} are needed."
        )
        raise DataError(message, hint="Give more images, or all images without labels.")
    folds, after = fold_of(len(rows)), np.empty(len(rows), dtype=np.int64)
    for fold in range(FOLDS):
        outside = np.concatenate([rows[folds != fold], np.flatnonzero(columns == NOBODY)])
        made = fit_adapter(scores.rows(outside), [truths[row] for row in outside.tolist()], method=method)
        after[folds == fold] = _best(made, scores.rows(rows[folds == fold]))
    before = (scores.log_probs[rows].argmax(axis=1) == columns[rows]).astype(np.float64)
    found = measured(adapter, before, (after == columns[rows]).astype(np.float64), changed)
    return replace(found, unseen=len(scores.labels) - len(np.unique(columns[rows])))


def measured(adapter: Adapter, before: Floats, after: Floats, changed: float) -> Adapted:
    """An adapter with what it gains.

    Args:
        adapter: the adapter.
        before: ``(n,)`` 1 for each labelled image that the scorer gets right without the adapter, else 0.
        after: ``(n,)`` the same with the adapter, which was made without the image.
        changed: share of all images whose best label the adapter changes.
    """
    figures: dict[str, JsonValue] = {"measured": len(before), "before": float(before.mean()), "after": float(after.mean())}
    return Adapted(
        adapter=replace(adapter, made=replace(adapter.made, figures=figures)),
        measured=len(before),
        changed=changed,
        before=float(before.mean()),
        after=float(after.mean()),
        gain=float((after - before).mean()),
        gain_interval=interval(after - before),
    )


def _best(adapter: Adapter, scores: Scores) -> Columns:
    """`(N,)` the column of the best label."""
    assert scores.embeddings is not None
    found: Columns = adapter.logits(scores.embeddings.astype(np.float32), scores.log_probs).argmax(axis=1)
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
