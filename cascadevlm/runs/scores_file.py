"""``scores.npy`` and ``embeddings.npy`` of a record. A row is written when its image is scored."""

import io
import os
import zlib
from collections.abc import Sized
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY

SCORES, COLUMNS, EMBEDDINGS = "scores.npy", "columns.npy", "embeddings.npy"

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

    @classmethod
    def existing(cls, path: Path, kind: DTypeLike) -> Self | None:
        """The file at a path, with the width that its header states; None if there is no such file with rows of this kind."""
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, found = np.lib.format.read_array_header_1_0(file)
        except (FileNotFoundError, ValueError):
            return None
        return cls(path, shape[1], kind) if len(shape) == 2 and found == np.dtype(kind) else None

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
    """Writes ``scores.npy``, ``columns.npy`` if there are more than `MOST_WHOLE` labels, and ``embeddings.npy`` if the scorer
    gives embeddings.

    Args:
        folder: folder of the record.
        labels: the C labels.
        width: number of log-probabilities per image that are kept. Default: `scores_kept`.
    """

    def __init__(self, folder: Path, labels: Sized, width: int | None = None) -> None:
        self.folder = folder
        self.width = width or scores_kept(labels)
        self.images = 0
        self.files = [RowFile(folder / SCORES, self.width, np.float32)]
        if self.width < len(labels):
            self.files.append(RowFile(folder / COLUMNS, self.width, np.int32))
        self.embeddings = RowFile.existing(folder / EMBEDDINGS, np.float16)

    @property
    def _all(self) -> list[RowFile]:
        return [*self.files, *([] if self.embeddings is None else [self.embeddings])]

    def resize(self, images: int) -> None:
        """Set the number of images, readable or not."""
        self.images = images
        for file in self._all:
            file.resize(images)

    def write(self, number: int, log_probs: NDArray[np.float32], embedding: NDArray[np.float16] | None) -> dict[str, JsonValue]:
        """Keep ``(C,)`` log-probabilities and, if there is one, the ``(D,)`` embedding of an image.

        Returns:
            The checksums for the image's line: see `cascadevlm.runs.lines.LabelledLine`.
        """
        if self.width == len(log_probs):
            checksums = self._put(number, log_probs)
        else:
            best = np.argsort(-log_probs, kind="stable")[: self.width]
            checksums = self._put(number, log_probs[best], best.astype(np.int32))
        if embedding is None:
            return checksums
        if self.embeddings is None:  # the first one tells the number of dimensions
            self.embeddings = RowFile(self.folder / EMBEDDINGS, len(embedding), np.float16)
            self.embeddings.resize(self.images)
        self.embeddings.write(number, embedding)
        return checksums | {"embedding": checksum(embedding)}

    def write_unreadable(self, number: int) -> dict[str, JsonValue]:
        """Keep that an image could not be read: log-probabilities of NaN, `NOBODY` as columns, an embedding of 0. Returns as
        `write`."""
        if self.embeddings is not None:
            self.embeddings.write(number, np.zeros(self.embeddings.width, np.float16))
        return self._put(number, np.full(self.width, np.nan, np.float32), np.full(self.width, NOBODY, np.int32))

    def _put(self, number: int, *rows: NDArray[np.generic]) -> dict[str, JsonValue]:
        kept = rows[: len(self.files)]
        for file, row in zip(self.files, kept, strict=True):
            file.write(number, row)
        return {"scores": checksum(*kept)}

    def holds(self, number: int, scores: int, embedding: int | None) -> bool:
        """Whether what is kept of an image has these checksums; None is the checksum of an image without an embedding."""
        if scores != checksum(*(file.read(number) for file in self.files)):
            return False
        return embedding is None or (self.embeddings is not None and embedding == checksum(self.embeddings.read(number)))

    def sync(self) -> None:
        """Flush the files to the disk."""
        for file in self._all:
            os.fsync(file.file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._all:
            file.file.close()
