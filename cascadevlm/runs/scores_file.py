"""``scores.npy`` of a record: the log-probabilities of every image. A row is written when its image is scored."""

import io
import os
import zlib
from collections.abc import Sized
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cascadevlm.base.arrays import NOBODY

SCORES, COLUMNS = "scores.npy", "columns.npy"

MOST_WHOLE = 1000
"""The largest number of labels for which all log-probabilities are kept."""

BEST = 50
"""Number of log-probabilities per image that are kept if there are more labels."""


def scores_kept(labels: Sized) -> int:
    """Number of log-probabilities per image in a record."""
    return BEST if len(labels) > MOST_WHOLE else len(labels)


def checksum(*rows: NDArray[np.generic] | bytes) -> int:
    """The CRC-32 of an image's rows. The image's line in ``predictions.jsonl`` contains it."""
    return zlib.crc32(b"".join(row if isinstance(row, bytes) else row.tobytes() for row in rows))


class RowFile:
    """A NumPy file with an array of shape ``(N, width)``. Its rows are written one by one.

    A row that is not written yet is zero, or has the value of an earlier session. Nothing is changed before `resize`.
    """

    def __init__(self, path: Path, width: int, kind: DTypeLike) -> None:
        path.touch()
        self.file = path.open("r+b")
        self.width, self.kind = width, np.dtype(kind)
        self.row_bytes = width * self.kind.itemsize
        self.begin = len(self._header(0))

    def _header(self, rows: int) -> bytes:
        """The header of the file. Its length does not depend on the number of rows."""
        header = io.BytesIO()
        shape = {"shape": (rows, self.width), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self.kind)}
        np.lib.format.write_array_header_1_0(header, shape)
        return header.getvalue()

    def resize(self, rows: int) -> None:
        """Set the number of rows of the file."""
        self.file.seek(0)
        self.file.write(self._header(rows))
        self.file.truncate(self.begin + rows * self.row_bytes)

    def write(self, number: int, row: NDArray[np.generic]) -> None:
        """Write one row. No memory map is used, because a full disk would then end the process."""
        self.file.seek(self.begin + number * self.row_bytes)
        self.file.write(row.tobytes())
        self.file.flush()

    def read(self, number: int) -> bytes:
        """The bytes of one row. They are incomplete if the file is too short."""
        self.file.seek(self.begin + number * self.row_bytes)
        return self.file.read(self.row_bytes)


class ScoresFile:
    """Writes ``scores.npy`` and, for more than `MOST_WHOLE` labels, ``columns.npy``.

    Args:
        folder: folder of the record.
        labels: the C labels.
    """

    def __init__(self, folder: Path, labels: Sized) -> None:
        self.width = scores_kept(labels)
        self.files = [RowFile(folder / SCORES, self.width, np.float32)]
        if self.width < len(labels):
            self.files.append(RowFile(folder / COLUMNS, self.width, np.int32))

    def resize(self, images: int) -> None:
        """Set the number of images, readable or not."""
        for file in self.files:
            file.resize(images)

    def write(self, number: int, log_probs: NDArray[np.float32]) -> int:
        """Write the ``(C,)`` log-probabilities of an image. Returns the `checksum` of its rows."""
        if self.width == len(log_probs):
            return self._put(number, log_probs)
        best = np.argsort(-log_probs, kind="stable")[: self.width]
        return self._put(number, log_probs[best], best.astype(np.int32))

    def write_unreadable(self, number: int) -> int:
        """Write the rows of an image that could not be read: NaN as log-probabilities, and `NOBODY` as columns."""
        return self._put(number, np.full(self.width, np.nan, np.float32), np.full(self.width, NOBODY, np.int32))

    def _put(self, number: int, *rows: NDArray[np.generic]) -> int:
        kept = rows[: len(self.files)]
        for file, row in zip(self.files, kept, strict=True):
            file.write(number, row)
        return checksum(*kept)

    def checksum(self, number: int) -> int:
        """The `checksum` of the stored rows of an image."""
        return checksum(*(file.read(number) for file in self.files))

    def sync(self) -> None:
        """Flush the files to the disk."""
        for file in self.files:
            os.fsync(file.file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.file.close()
