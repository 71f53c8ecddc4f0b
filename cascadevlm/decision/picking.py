"""Picks the images that a person should label next."""

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import Columns
from cascadevlm.decision.scorer_calibration import Floats

POOL = 0.1
"""Share of the images that are uncertain enough to be picked."""

CHOICE = 3
"""Smallest number of images in the pool per image to pick. With fewer, there would be nothing to balance."""


def most_instructive(certainties: Floats, predicted: Columns, images: int) -> NDArray[np.bool_]:
    """`(N,)`, true for the images whose labels would teach most. At most ``images`` are picked.

    The pool is the most uncertain tenth of the N images, but at least three times as many images as are wanted. From the pool,
    one image at a time is picked: a random image of the label that was picked least often so far. The same arguments always give
    the same result.

    Source: Bang, Ahn and Lee, "Active Prompt Learning in Vision Language Models", CVPR 2024.

    Args:
        certainties: `(N,)` probabilities of the predictions.
        predicted: `(N,)` the column of each prediction.
        images: number of images to pick.
    """
    size = max(CHOICE * images, int(np.ceil(POOL * len(certainties))))
    shuffled = np.random.default_rng(0).permutation(np.argsort(certainties, kind="stable")[:size])
    rounds = np.empty(len(shuffled), dtype=np.int64)
    for label in np.unique(predicted[shuffled]):
        places = np.flatnonzero(predicted[shuffled] == label)
        rounds[places] = np.arange(len(places))
    picked = np.zeros(len(certainties), dtype=np.bool_)
    picked[shuffled[np.argsort(rounds, kind="stable")[:images]]] = True
    return picked
