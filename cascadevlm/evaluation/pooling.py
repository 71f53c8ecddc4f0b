"""Making a pool of several scorers from labelled images, and measuring what it gains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascadevlm.base.errors import InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import Prediction
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.decision.adapting import columns_of
from cascadevlm.decision.pooling import Pool, fit_pool
from cascadevlm.evaluation.adapting import embedded
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.scorers.several import SeveralScorers


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A pool and what it gains. All figures are of images that were left out of the fits, five times a fifth of the images.

    Attributes:
        pool: fitted to all images.
        each: accuracy of each scorer with its own calibration, from 0 to 1.
        right: accuracy of the pool.
        gain: ``right`` less the accuracy of the best scorer.
        gain_interval: 95 % interval of the gain. The images are resampled in pairs.
    """

    pool: Pool
    each: tuple[float, ...]
    right: float
    gain: float
    gain_interval: Interval


def pool(
    cascade: Cascade, images: Sequence[ImageSource], truths: Sequence[str], progress: Callable[[Prediction], None]
) -> Pooled:
    """Fit a pool to labelled images and measure it. Images that a scorer cannot read are left out.

    Args:
        cascade: its scorer is of several scorers, without a calibration.
        images: N images.
        truths: N names of labels.
        progress: called once per image and scorer.

    Raises:
        InputError: if the cascade has one scorer, or if fewer than 20 images can be read.
        DataError: if a scorer can read no image.
    """
    several = cascade.scorer
    if not isinstance(several, SeveralScorers):
        raise InputError("A pool needs several scorers.", hint="Give a cascade with a scorer of the class SeveralScorers.")
    scored = [embedded(cascade.altered(scorer=scorer), images, progress) for scorer in several.scorers]
    readable = np.all([read for _, read in scored], axis=0)
    parts = [scores.rows(readable[read]) for scores, read in scored]
    columns = columns_of(truths, cascade.labels)[readable]
    fitted = fit_pool(parts, np.eye(len(cascade.labels))[columns])
    each = [(part.argmax(axis=1) == columns).astype(np.float64) for part in fitted.parts]
    right, best = (fitted.held_out.argmax(axis=1) == columns).astype(np.float64), max(each, key=np.mean)
    gained = interval(right - best)
    assert gained is not None  # there are images
    return Pooled(
        pool=fitted.pool,
        each=tuple(float(one.mean()) for one in each),
        right=float(right.mean()),
        gain=float((right - best).mean()),
        gain_interval=gained,
    )
