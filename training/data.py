"""Renders the training images once, at the judge's resolution. For the scorer, they are made smaller."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm_backends.aviary.birds import Species, render

SCORER_SIZE = 28
JUDGE_SIZE = 96

Pixels = NDArray[np.uint8]


def _individual(key: tuple[Species, tuple[int, int, int]]) -> Pixels:
    kind, seed = key
    return shrink(render(kind, np.random.default_rng(seed)), JUDGE_SIZE)


def shrink(image: Image.Image, size: int) -> Pixels:
    """``(size, size, 3) uint8``: the resized image, with the same antialiasing as in the preprocessing of both models."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def load(path: Path, kinds: Sequence[Species], *, each: int, seed: int) -> tuple[Pixels, NDArray[np.int64]]:
    """``(N, S, S, 3) uint8``, ``each`` images of every species at the judge's resolution, and ``(N,) int64``, their species.

    The images are rendered at the first call and read from the file later.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = [(kind, (seed, index, number)) for index, kind in enumerate(kinds) for number in range(each)]
        images = np.empty((len(keys), JUDGE_SIZE, JUDGE_SIZE, 3), np.uint8)
        with multiprocessing.Pool() as pool:
            for row, image in enumerate(pool.imap(_individual, keys, chunksize=64)):
                images[row] = image
        np.save(path, images)
    return np.load(path, mmap_mode="r"), np.repeat(np.arange(len(kinds)), each)


def for_scorer(images: Pixels) -> Pixels:
    """The images, resized to the scorer's resolution."""
    return np.stack([shrink(Image.fromarray(image), SCORER_SIZE) for image in images])
