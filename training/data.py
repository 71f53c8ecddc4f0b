"""Render the training images once, at the resolution the judge sees; the scorer sees them shrunk further."""

import multiprocessing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.birds import render, species

SCORER_SIZE = 28
JUDGE_SIZE = 96
EACH = 200
SEED = 1

Pixels = NDArray[np.uint8]


def _individual(key: tuple[int, int]) -> Pixels:
    index, number = key
    return shrink(render(species()[0][index], np.random.default_rng((SEED, index, number))), JUDGE_SIZE)


def shrink(image: Image.Image, size: int) -> Pixels:
    """``size`` x ``size`` x 3, antialiased as both models' own preprocessing does it."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def load(build: Path) -> tuple[Pixels, NDArray[np.int64]]:
    """Training images for the judge, N x S x S x 3, and the index of each one's species; rendered at first use."""
    path = build / "judge.npy"
    labels = np.repeat(np.arange(len(species()[0])), EACH)
    if not path.exists():
        build.mkdir(parents=True, exist_ok=True)
        keys = [(index, number) for index in range(len(species()[0])) for number in range(EACH)]
        images = np.empty((len(keys), JUDGE_SIZE, JUDGE_SIZE, 3), np.uint8)
        with multiprocessing.Pool() as pool:
            for row, image in enumerate(pool.imap(_individual, keys, chunksize=64)):
                images[row] = image
        np.save(path, images)
    return np.load(path, mmap_mode="r"), labels


def for_scorer(images: Pixels) -> Pixels:
    """The same images at the scorer's resolution."""
    return np.stack([shrink(Image.fromarray(image), SCORER_SIZE) for image in images])
