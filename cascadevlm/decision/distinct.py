"""Which images of a run came before."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cascadevlm.decision.judge_model import Bools

Keys = NDArray[np.uint64]
"""`(n,)` the first 8 bytes of the digests of n images; 0 for an image whose digest is not known. Two of 100 million different
images have the same key with a probability of 0.03 %."""

NONE: Keys = np.empty(0, dtype=np.uint64)

UNSORTED = 65_536
"""Number of keys that are kept unsorted: to sort all keys after each batch would take long."""


class Distinct:
    """Finds the images that came before, by their keys. It keeps 8 bytes per image: 8 MB per million images.

    Args:
        before: keys of the images that came before, in any order.
    """

    def __init__(self, before: Keys) -> None:
        self._sorted = np.union1d(before, keys_of([""]))
        self._latest: set[int] = set()

    def take(self, keys: Keys) -> Bools:
        """Add the next n images. Returns ``(n,)`` booleans: no image with this key came before. An image without a key is new."""
        new: Bools = self._sorted.take(np.searchsorted(self._sorted, keys), mode="clip") != keys
        for row, key in enumerate(keys.tolist()):
            new[row] &= key not in self._latest
            self._latest.add(key)
        if len(self._latest) >= UNSORTED:
            self.keys()
        new |= keys == 0
        return new

    def keys(self) -> Keys:
        """The keys of all images so far, in ascending order."""
        self._sorted = np.union1d(self._sorted, np.fromiter(self._latest, np.uint64))
        self._latest.clear()
        return self._sorted


def keys_of(digests: Iterable[str]) -> Keys:
    """``(n,)`` keys of n digests in hexadecimal; "" for an image whose digest is not known."""
    return np.array([int(digest[:16] or "0", 16) for digest in digests], dtype=np.uint64)
