"""Keeps embeddings on disk, so that the image tower runs once per image and the text tower runs once per label text.

Each model has its own folder, named by a digest of its fingerprint. The file ``index.sqlite`` maps the digest of an image to the
row of its embedding. The rows are float32, stored in shards that are mapped into memory. The sub-folder ``labels`` stores the
embeddings of labels in the same way, by the digest of the templates and the text. Threads and processes can share a folder. If a
process is killed, the rows that it wrote but did not add to the index are overwritten. A checksum per row detects damage by a
failing disk.
"""

import hashlib
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeAlias

import filelock
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.errors import BackendError, ImageError
from cascadevlm.base.images import ImageSource, load_image, pixel_digest, read_bytes
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.portable import Live
from cascadevlm.base.types import Scores
from cascadevlm.scorers.base import EmbeddingScorer, Prepared, Scorer, load_once

SHARD_ROWS = 16_384
"""Number of rows per shard. A shard of embeddings with 512 numbers has 32 MB."""

DAMAGE = (OSError, ValueError, sqlite3.Error)
"""Errors that are raised for damaged files and for a full disk."""

SHARDS_MAPPED = 4
"""Maximum number of shards that are mapped at the same time. Mapped shards count as memory of the process."""

LONGEST_WAIT = 60.0
"""Maximum time, in seconds, that a store waits for other processes."""

Embedding: TypeAlias = NDArray[np.float32]


class EmbeddingStore:
    """The embeddings of one model. Each embedding is ``(D,) float32`` and is found by the digest of its image or text.

    Args:
        folder: folder of the store. A missing folder is created.

    Raises:
        BackendError: if the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._shard = lru_cache(SHARDS_MAPPED)(self._map)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(
                folder / "lock", timeout=LONGEST_WAIT
            ):  # SQLite's timeout does not cover the change to WAL mode
                self._index = sqlite3.connect(
                    folder / "index.sqlite", timeout=LONGEST_WAIT, isolation_level=None, check_same_thread=False
                )
                self._index.execute("PRAGMA journal_mode = WAL")
                self._index.execute("PRAGMA synchronous = NORMAL")
                self._index.execute("CREATE TABLE IF NOT EXISTS rows (row INTEGER PRIMARY KEY, digest UNIQUE, checksum INTEGER)")
        except (OSError, sqlite3.Error) as exc:
            hint = "Set cache.folder to a folder that can be written to, or set cache.embeddings = false."
            raise BackendError(f"The folder {str(folder)!r} cannot keep embeddings: {exc}.", hint=hint) from exc

    def get(self, digest: bytes) -> Embedding | None:
        """The embedding with this digest, ``(D,) float32``; None if there is none or if its checksum is wrong.

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
        """Store embeddings under their digests."""
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
        """Close the files."""
        self._shard.cache_clear()
        self._index.close()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.f32"

    def _write(self, row: int, rows: Embedding) -> None:
        """Write rows to the files. A write to mapped memory would end the process if the disk is full."""
        while len(rows):
            shard, start = divmod(row, SHARD_ROWS)
            part, rows = np.split(rows, [SHARD_ROWS - start])
            self._path(shard).touch()
            with self._path(shard).open("r+b") as file:
                file.truncate(SHARD_ROWS * part.shape[1] * part.itemsize)
                file.seek(start * part.shape[1] * part.itemsize)
                file.write(part.tobytes())
            row += len(part)

    def _map(self, shard: int) -> "np.memmap[tuple[int, int], np.dtype[np.float32]]":
        width = self._path(shard).stat().st_size // (SHARD_ROWS * np.dtype(np.float32).itemsize)
        return np.memmap(self._path(shard), np.float32, "r", shape=(SHARD_ROWS, width))


def _checksum(embedding: Embedding) -> int:
    return zlib.crc32(embedding.tobytes())


def folder_of(scorer: EmbeddingScorer, folder: Path) -> Path:
    """The folder for one model's embeddings, in the folder for the embeddings of all models."""
    return folder / hashlib.sha256(scorer.model_fingerprint().encode()).hexdigest()[:16]


def kept_labels(scorer: EmbeddingScorer, names: Sequence[str], *, folder: Path) -> NDArray[np.float32]:
    """``(C, D) float32``, the embeddings of the texts of C labels. Only texts that are not stored are embedded.

    If the store cannot be used, texts are embedded and not stored.

    Args:
        scorer: the scorer that embeds the texts.
        names: the C texts.
        folder: folder for the embeddings of all models.
    """
    digests = [hashlib.sha256("\0".join((*scorer.templates, name)).encode(errors="surrogatepass")).digest() for name in names]
    known: dict[bytes, Embedding] = {}
    store = None
    with suppress(BackendError, *DAMAGE):
        store = EmbeddingStore(folder_of(scorer, folder) / "labels")
        known = {digest: found for digest in digests if (found := store.get(digest)) is not None}
    new = {digest: name for digest, name in zip(digests, names, strict=True) if digest not in known}
    places = iter(new)
    for block, embeddings in scorer.embed_in_blocks([*new.values()]):
        embedded = dict(zip(islice(places, len(block)), embeddings, strict=True))
        known |= embedded
        if store is not None and np.isfinite(embeddings).all():
            with suppress(*DAMAGE):
                store.put(embedded)
    if store is not None:
        store.close()
    return np.array([known[digest] for digest in digests], dtype=np.float32)


@dataclass(kw_only=True, eq=False)
class _Known(Prepared):
    """An image with, if it was embedded before, its embedding."""

    embedding: Embedding | None = None


class CachedEmbeddings(Scorer):
    """A scorer that embeds each image only once. An image whose embedding is stored is decoded only if a judge is asked about it.

    Args:
        wrapped: the scorer that embeds the images.
        folder: folder for the embeddings of all models.

    Warns:
        RuntimeWarning: once, if the stored embeddings are damaged or cannot be written. No further embeddings are stored then.
    """

    live: ClassVar[Live] = (("_telling", threading.Lock),)

    def __init__(self, wrapped: EmbeddingScorer, folder: Path) -> None:
        self.wrapped = wrapped
        self.folder = folder
        wrapped.keep_labels = partial(kept_labels, folder=folder)
        self._keeping = True
        self._telling = threading.Lock()

    @cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore(folder_of(self.wrapped, self.folder))

    def load(self) -> None:
        load_once(self.wrapped)
        self.store  # noqa: B018  # opens the store

    def prepare(self, source: ImageSource) -> Prepared:
        content, digest = _content_and_digest(source)
        embedding = self._kept(digest)
        if embedding is not None:
            return _Known(source=source, digest=digest, embedding=embedding)
        try:
            prepared = self.wrapped.prepare(content)
        except ImageError:
            prepared = self.wrapped.prepare(source)  # raises the same error again, with the name of the file
        return _Known(
            source=source,
            features=prepared.features,
            pixels=prepared.pixels,
            size=prepared.size,
            digest=digest,
        )

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.score_prepared([self.prepare(image) for image in images], labels)

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        known = [each for each in prepared if isinstance(each, _Known)]
        new = [each for each in known if each.embedding is None]
        if new:
            for each, row in zip(new, self.wrapped.embed_prepared(new), strict=True):
                each.embedding = row
            finite = {each.digest: row for each in new if (row := each.embedding) is not None and np.isfinite(row).all()}
            self._keep({bytes.fromhex(digest): row for digest, row in finite.items()})
        return self.wrapped.score_embeddings(np.array([each.embedding for each in known]), labels)

    def _kept(self, digest: str) -> Embedding | None:
        try:
            return self.store.get(bytes.fromhex(digest))
        except DAMAGE as exc:
            self._keep_no_more(f"The embeddings in {str(self.store.folder)!r} are damaged: {exc}. Delete this folder.")
            return None

    def _keep(self, embeddings: Mapping[bytes, Embedding]) -> None:
        if not (self._keeping and embeddings):
            return
        try:
            self.store.put(embeddings)
        except (OSError, sqlite3.Error) as exc:
            self._keep_no_more(f"No more embeddings can be stored in {str(self.store.folder)!r}: {exc}.")

    def _keep_no_more(self, why: str) -> None:
        with self._telling:
            told, self._keeping = not self._keeping, False
        if not told:
            warnings.warn(why, RuntimeWarning, stacklevel=2)


def note_digest(image: Prepared) -> None:
    """Note the digest of a prepared image, if it is not known yet.

    Raises:
        ImageError: if the image cannot be read.
    """
    if not image.digest:
        image.digest = digest_of(image.source) if isinstance(image.source, str | Path | bytes) else image.image_digest


def digest_of(source: str | Path | bytes) -> str:
    """The sha256 of an image's file, in hexadecimal.

    Raises:
        ImageError: if the file cannot be read.
    """
    return _content_and_digest(source)[1]


def _content_and_digest(source: ImageSource) -> tuple[ImageSource, str]:
    """The content of an image, and its sha256 in hexadecimal. A file is read once: its bytes are returned."""
    if isinstance(source, str | Path):
        source = read_bytes(source)
    if isinstance(source, bytes):
        return source, hashlib.sha256(source).hexdigest()
    image = load_image(source)
    return image, pixel_digest(image)
