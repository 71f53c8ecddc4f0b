"""Image embeddings kept on disk: a new label set, template, policy or judge then costs no second pass of the image tower.

A folder for every model, named by its fingerprint, holds ``index.sqlite``, which tells the row of every image by the digest of
its file, and the rows, float16, in shards that are mapped into memory. Safe across threads and processes. What a killed process
wrote last is not in the index, and written over; what a failing disk made of a row, its checksum tells.
"""

import hashlib
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.errors import BackendError, ImageError
from cascadevlm.images import ImageSource, load_image, pixel_digest, read_bytes
from cascadevlm.labels import LabelSet
from cascadevlm.scorer import EmbeddingScorer, Prepared, Scorer
from cascadevlm.types import Scores

SHARD_ROWS = 16_384
"""Rows of a shard: 16 MB of 512 numbers each."""

SHARDS_MAPPED = 4
"""How many shards are mapped at once: what is mapped counts as memory of the process."""

LONGEST_WAIT = 60.0
"""How long a store waits for other processes, in seconds."""

_WIDTH = np.dtype(np.float16).itemsize

Embedding = NDArray[np.float16]


class EmbeddingStore:
    """The embeddings of one model, D float16 each, by the digest of their image.

    Args:
        folder: made, unless it is there.

    Raises:
        BackendError: if the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._shard = lru_cache(SHARDS_MAPPED)(self._map)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / "lock", timeout=LONGEST_WAIT):  # SQLite waits for no one who makes a file WAL
                self._index = sqlite3.connect(
                    folder / "index.sqlite", timeout=LONGEST_WAIT, isolation_level=None, check_same_thread=False
                )
                self._index.execute("PRAGMA journal_mode = WAL")
                self._index.execute("PRAGMA synchronous = NORMAL")
                self._index.execute("CREATE TABLE IF NOT EXISTS rows (row INTEGER PRIMARY KEY, digest UNIQUE, checksum INTEGER)")
        except (OSError, sqlite3.Error) as exc:
            hint = "Set cache.folder to one that can, or cache.embeddings = false."
            raise BackendError(f"The folder {str(folder)!r} cannot keep embeddings: {exc}.", hint=hint) from exc

    def get(self, digest: bytes) -> Embedding | None:
        """The embedding of an image, if it is kept.

        Raises:
            OSError, ValueError, sqlite3.DatabaseError: if the files are damaged.
        """
        with self._lock:
            found = self._index.execute("SELECT row, checksum FROM rows WHERE digest = ?", (digest,)).fetchone()
            if found is None:
                return None
            shard, row = divmod(found[0], SHARD_ROWS)
            embedding: Embedding = np.array(self._shard(shard)[row])
        return embedding if _checksum(embedding) == found[1] else None

    def put(self, embeddings: Mapping[bytes, Embedding]) -> None:
        """Keep embeddings by the digests of their images."""
        with self._lock, self._index:
            self._index.execute("BEGIN IMMEDIATE")
            (first,) = self._index.execute("SELECT coalesce(max(row) + 1, 0) FROM rows").fetchone()
            self._write(first, np.stack([*embeddings.values()]))
            self._index.executemany(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
                [(row, digest, _checksum(embedding)) for row, (digest, embedding) in enumerate(embeddings.items(), start=first)],
            )

    def __len__(self) -> int:
        (rows,) = self._index.execute("SELECT count(*) FROM rows").fetchone()
        return int(rows)

    def close(self) -> None:
        """Let go of the files."""
        self._shard.cache_clear()
        self._index.close()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.f16"

    def _write(self, row: int, rows: NDArray[np.float16]) -> None:
        """Write rows, not through the map: there a full disk would be the end of the process."""
        while len(rows):
            shard, start = divmod(row, SHARD_ROWS)
            part, rows = np.split(rows, [SHARD_ROWS - start])
            self._path(shard).touch()
            with self._path(shard).open("r+b") as file:
                file.truncate(SHARD_ROWS * rows.shape[1] * _WIDTH)
                file.seek(start * rows.shape[1] * _WIDTH)
                file.write(part.tobytes())
            row += len(part)

    def _map(self, shard: int) -> "np.memmap[tuple[int, int], np.dtype[np.float16]]":
        width = self._path(shard).stat().st_size // (SHARD_ROWS * _WIDTH)
        return np.memmap(self._path(shard), np.float16, "r", shape=(SHARD_ROWS, width))


def _checksum(embedding: Embedding) -> int:
    return zlib.crc32(embedding.tobytes())


@dataclass(kw_only=True, eq=False)
class _Known(Prepared):
    """An image with its digest and, where it was embedded before, its embedding."""

    digest: bytes
    embedding: Embedding | None = None


class CachedEmbeddings(Scorer):
    """Scores as an embedding model does, from embeddings rounded to float16, and embeds no image twice; a file whose embedding is
    kept is not even decoded, unless a judge is asked about it.

    Args:
        wrapped: the model.
        folder: of all models' embeddings.

    Warns:
        RuntimeWarning: once, if what is kept is damaged or cannot be added to: no further embeddings are kept then.
    """

    def __init__(self, wrapped: EmbeddingScorer, folder: Path) -> None:
        self.wrapped = wrapped
        self.folder = folder
        self._keeping = True
        self._telling = threading.Lock()

    @cached_property
    def store(self) -> EmbeddingStore:
        fingerprint = self.wrapped.model_fingerprint()
        return EmbeddingStore(self.folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16])

    def load(self) -> None:
        self.wrapped.load()
        self.store  # noqa: B018  # opens it

    def prepare(self, source: ImageSource) -> Prepared:
        content, digest = _content_and_digest(source)
        embedding = self._kept(digest)
        if embedding is not None:
            return _Known(source=source, digest=digest, embedding=embedding)
        try:
            prepared = self.wrapped.prepare(content)
        except ImageError:
            prepared = self.wrapped.prepare(source)  # fails again, by its name
        return _Known(source=source, features=prepared.features, pixels=prepared.pixels, digest=digest)

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.score_prepared([self.prepare(image) for image in images], labels)

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        known = [each for each in prepared if isinstance(each, _Known)]
        new = [each for each in known if each.embedding is None]
        if new:
            for each, row in zip(new, self.wrapped.embed_prepared(new), strict=True):
                each.embedding = row.astype(np.float16)
            self._keep({each.digest: each.embedding for each in new if each.embedding is not None})
        embeddings = np.array([each.embedding for each in known], dtype=np.float32)
        return self.wrapped.score_embeddings(embeddings, labels)

    def _kept(self, digest: bytes) -> Embedding | None:
        try:
            return self.store.get(digest)
        except (OSError, ValueError, sqlite3.DatabaseError) as exc:
            self._keep_no_more(f"The embeddings in {str(self.store.folder)!r} are damaged: {exc}. Delete that folder.")
            return None

    def _keep(self, embeddings: Mapping[bytes, Embedding]) -> None:
        if not self._keeping:
            return
        try:
            self.store.put(embeddings)
        except (OSError, sqlite3.Error) as exc:
            self._keep_no_more(f"No more embeddings can be kept in {str(self.store.folder)!r}: {exc}.")

    def _keep_no_more(self, why: str) -> None:
        with self._telling:
            told, self._keeping = not self._keeping, False
        if not told:
            warnings.warn(why, RuntimeWarning, stacklevel=2)


def _content_and_digest(source: ImageSource) -> tuple[ImageSource, bytes]:
    """What an image is made of, read once, and its sha256."""
    if isinstance(source, str | Path):
        source = read_bytes(source)
    if isinstance(source, bytes):
        return source, hashlib.sha256(source).digest()
    image = load_image(source)
    return image, bytes.fromhex(pixel_digest(image))
