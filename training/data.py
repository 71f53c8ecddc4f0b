"""Render the training images once, at the two resolutions the models see."""

import multiprocessing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.birds import render, species

SCORER_SIZE = 36
JUDGE_SIZE = 96
EACH = 200
SEED = 1

Pixels = NDArray[np.uint8]


def _individual(key: tuple[int, int]) -> tuple[Pixels, Pixels]:
    index, number = key
    image = render(species()[0][index], np.random.default_rng((SEED, index, number)))
    return _shrink(image, SCORER_SIZE), _shrink(image, JUDGE_SIZE)


def _shrink(image: Image.Image, size: int) -> Pixels:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def load(build: Path) -> tuple[Pixels, Pixels, NDArray[np.int64]]:
    """Training images for scorer and judge, N x S x S x 3, and the index of each one's species; rendered at first use."""
    paths = build / "scorer.npy", build / "judge.npy"
    labels = np.repeat(np.arange(len(species()[0])), EACH)
    if not all(path.exists() for path in paths):
        build.mkdir(parents=True, exist_ok=True)
        keys = [(index, number) for index in range(len(species()[0])) for number in range(EACH)]
        small = np.empty((len(keys), SCORER_SIZE, SCORER_SIZE, 3), np.uint8)
        large = np.empty((len(keys), JUDGE_SIZE, JUDGE_SIZE, 3), np.uint8)
        with multiprocessing.Pool() as pool:
            for row, images in enumerate(pool.imap(_individual, keys, chunksize=64)):
                small[row], large[row] = images
        np.save(paths[0], small)
        np.save(paths[1], large)
    return np.load(paths[0]), np.load(paths[1], mmap_mode="r"), labels
