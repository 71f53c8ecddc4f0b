"""The scores of all images of a run, from before the first decision.

`score_first` writes three files into the folder of the run:

- ``scores.npy``, ``(N, C) float32``: log-probabilities; NaN for images that could not be read;
- ``embeddings.npy``, ``(N, D) float16``, if the scorer gives embeddings: rows of length 1; 0 for images that could not be read;
- ``scored.jsonl``: one line per image, with its name, the digest of its file, and the checksums of its rows.

A row is written when its image is scored. A process that is killed loses at most the rows of its last batches, which are scored
again. The batches are the same then, so the scores are exactly equal.
"""

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import aclosing, closing
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, InstanceOf, JsonValue

from cascadevlm.base import loop
from cascadevlm.base.errors import DataError, ImageError
from cascadevlm.base.files import writing_to
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Checkpoint, Read, ReadBatch, Run
from cascadevlm.cascade.observer import Observer
from cascadevlm.decision.distinct import NONE, Distinct, keys_of
from cascadevlm.decision.judge_model import Bools
from cascadevlm.runs.inputs import Named, after, names
from cascadevlm.runs.lines import checked, with_checksum
from cascadevlm.runs.run_folder import has_changed
from cascadevlm.runs.scores_file import EMBEDDINGS, SCORES, ScoresFile
from cascadevlm.scorers.base import EmbeddingScorer, Prepared, Scorer, WrapperScorer, load_once
from cascadevlm.scorers.kept import CachedEmbeddings, note_digest

SCORED = "scored.jsonl"
AT_ONCE = 1024
"""Number of images of a block of `ScoredImages.blocks`."""

Numbers: TypeAlias = NDArray[np.intp]
"""Numbers of images, from 0."""

SAME = "This run looks at all its images before it decides: give the same images, or another folder."


class ScoredLine(BaseModel):
    """A line of ``scored.jsonl``. Texts may contain invalid Unicode.

    Attributes:
        error: the reason why the image has no scores; "" if it has scores.
        digest: the image's digest (`Prepared.digest`); "" if the image has no scores.
        is_file: true if the image is a file, and not part of a table.
        size: width and height in pixels; None if the image was not decoded.
        fingerprint: the fingerprint of the scorer; "" if the image has no scores.
        scores: checksum of the image's row in ``scores.npy``.
        embedding: checksum of the image's row in ``embeddings.npy``; None if there is no embedding.
    """

    path: InstanceOf[str]
    error: InstanceOf[str] = ""
    digest: str = ""
    is_file: bool = False
    size: tuple[int, int] | None = None
    fingerprint: InstanceOf[str] = ""
    scores: int
    embedding: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """The scores of all N images of a run, as memory maps.

    Attributes:
        folder: the folder of the run.
        labels: the C labels.
        fingerprint: the fingerprint of the scorer; "" if no image could be read.
    """

    folder: Path
    labels: LabelSet
    fingerprint: str

    @classmethod
    def read(cls, folder: Path, labels: LabelSet) -> Self:
        """The scores in the folder of a run that scored all its images.

        Raises:
            DataError: if the scores are damaged.
        """
        count, fingerprint = 0, ""
        for line, _ in _lines(folder):
            count, fingerprint = count + 1, fingerprint or line.fingerprint
        found = cls(folder=folder, labels=labels, fingerprint=fingerprint)
        if count != len(found.log_probs):
            raise DataError(f"{str(folder / SCORED)!r} is damaged.", hint="Repeat the command that made the run.")
        return found

    @cached_property
    def log_probs(self) -> NDArray[np.float32]:
        """``(N, C) float32``; NaN for images that could not be read."""
        found: NDArray[np.float32] = np.load(self.folder / SCORES, mmap_mode="r", allow_pickle=False)
        return found

    @cached_property
    def embeddings(self) -> NDArray[np.float16] | None:
        """``(N, D) float16``; 0 for images that could not be read. None if the scorer gives none."""
        if not (self.folder / EMBEDDINGS).exists():
            return None
        found: NDArray[np.float16] = np.load(self.folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        return found

    def rows(self, begin: int, end: int) -> Scores:
        """The scores of the images from number ``begin`` to before ``end`` that could be read, in memory."""
        return self.some(slice(begin, end))

    def some(self, numbers: Numbers | slice) -> Scores:
        """The scores of those images with the given numbers that could be read, in memory."""
        log_probs = np.array(self.log_probs[numbers])
        readable = ~np.isnan(log_probs[:, 0])
        embeddings = None if self.embeddings is None else self.embeddings[numbers][readable]
        return Scores(log_probs=log_probs[readable], labels=self.labels, fingerprint=self.fingerprint, embeddings=embeddings)

    def require_of(self, scorer: Scorer) -> None:
        """Refuse another scorer, although no image is left to score. A scorer without embeddings tells its fingerprint only with
        scores, so it is not checked.

        Raises:
            DataError: if the images were scored by another scorer.
        """
        scorer = scorer.wrapped if isinstance(scorer, CachedEmbeddings) else scorer
        if self.fingerprint and isinstance(scorer, EmbeddingScorer):  # "" if no image could be read
            load_once(scorer)
            _require_same(self.folder, self.fingerprint, scorer.fingerprint(self.labels))

    @cached_property
    def distinct(self) -> Bools:
        """``(N,)`` booleans: the image could be read, and no image with the same digest came before it."""
        seen, parts, lines = Distinct(NONE), [], (line for line, _ in _lines(self.folder))
        while some := list(islice(lines, AT_ONCE)):
            readable = np.array([not line.error for line in some])
            parts.append(readable & seen.take(keys_of(line.digest for line in some)))
        return np.concatenate(parts) if parts else np.empty(0, dtype=bool)

    def blocks(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float16]]]:
        """The log-probabilities and embeddings of the `distinct` images, in order, from `AT_ONCE` images at a time."""
        for begin in range(0, len(self.log_probs), AT_ONCE):
            rows = begin + np.flatnonzero(self.distinct[begin : begin + AT_ONCE])
            if self.embeddings is not None:
                yield self.log_probs[rows], self.embeddings[rows]

    def given_to(self, cascade: Cascade, numbers: Numbers | None = None) -> Cascade:
        """A copy of the cascade whose runs get these scores. An image is read only if a judge is asked about it.

        Args:
            cascade: the cascade.
            numbers: numbers of the images of the runs, in ascending order. Default: all images.
        """
        own = np.arange(len(self.log_probs)) if numbers is None else numbers
        return cascade.altered(scorer=ScoredElsewhere(cascade.scorer), reading=lambda first: self._reading(own[first:]))

    def lines(self, numbers: Numbers) -> Iterator[ScoredLine]:
        """The lines of the images with the given numbers, in ascending order. The file is open only while it is read."""
        place = position = 0
        for begin in range(0, len(numbers), AT_ONCE):
            found = []
            with (self.folder / SCORED).open("rb") as lines:
                lines.seek(position)
                for number in numbers[begin : begin + AT_ONCE].tolist():
                    for _ in range(place, number):
                        lines.readline()
                    found.append(ScoredLine.model_validate(json.loads(lines.readline())))
                    place = number + 1
                position = lines.tell()
            yield from found

    def _reading(self, numbers: Numbers) -> ReadBatch:
        lines, left = self.lines(numbers), numbers

        async def read(sources: Sequence[ImageSource]) -> list[Read]:
            nonlocal left
            scores, left = self.some(left[: len(sources)]), left[len(sources) :]
            rows = iter(range(len(scores)))
            return [
                (
                    path_of(source),
                    ImageError(line.error)
                    if line.error
                    else Arrived(source=source, digest=line.digest, size=line.size, chunk=scores, row=next(rows)),
                )
                for source, line in zip(sources, islice(lines, len(sources)), strict=True)
            ]

        return read


@dataclass(kw_only=True, eq=False)
class Arrived(Prepared):
    """An image that was scored elsewhere or before. This process reads the image only if a judge is asked about it.

    Attributes:
        chunk: `(n, C)` the scores of the images that were scored together.
        row: the row of this image.
    """

    chunk: Scores
    row: int


class ScoredElsewhere(WrapperScorer):
    """A scorer that returns the scores of images that arrived. It loads no model."""

    def load(self) -> None:
        pass

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        arrived = [each for each in prepared if isinstance(each, Arrived)]
        return arrived[0].chunk.rows(np.array([each.row for each in arrived]))


def score_first(
    cascade: Cascade,
    inputs: Iterable[Named],
    folder: Path,
    *,
    began: datetime,
    retry_failed: bool = False,
    observers: Sequence[Observer] = (),
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda images: None,
) -> ScoredImages | None:
    """Score all images that are not scored yet. Returns None if the work was stopped before its end.

    Args:
        cascade: its scorer, which may be in a cluster, scores the images in batches of its `batch_size`. No judge is asked.
        inputs: the images. Their number must be known (`Sized`).
        folder: the locked folder of the run.
        began: when the run was started. Files that changed since then are scored again, with all images after them.
        retry_failed: true to read images that could not be read again, and to score all images after the first one again.
        observers: further observers of the scores, for example a check that raises an error.
        stopping: function that is called before each batch. If it returns true, the work ends.
        progress: function that is called with the number of scored images after each image.

    Raises:
        DataError: if the images are not those that were scored before, or if another scorer scored these.
        RunError: if the folder cannot be written.

    Warns:
        RuntimeWarning: if an image was changed.
    """
    assert isinstance(inputs, Sized)
    with writing_to(folder), closing(_Writer(folder, cascade.labels, len(inputs))) as writer:
        writer.keep_what_is_sound(names(inputs), began, cascade.batch_size, retry_failed=retry_failed)
        alone = cascade.altered(
            stages=(), calibration=None, follow_shares=False, learns_from=None, observers=[*observers, writer]
        )
        if writer.images < len(inputs):
            run = alone.begin(Checkpoint(images=writer.images), stopping)
            loop.run(_score(run, inputs, writer, progress))
        return (
            ScoredImages(folder=folder, labels=cascade.labels, fingerprint=writer.fingerprint)
            if writer.images == len(inputs)
            else None
        )


async def _score(run: Run, inputs: Iterable[Named], writer: "_Writer", progress: Callable[[int], None]) -> None:
    begun: deque[str] = deque()

    def sources() -> Iterator[ImageSource]:
        for name, source in after(inputs, writer.images):
            begun.append(name)
            yield source

    async with aclosing(run.predictions(sources())) as predictions:
        async for prediction in predictions:
            writer.append(begun.popleft(), "" if prediction.candidates else prediction.error)
            progress(writer.images)


class _Writer(Observer):
    """Writes the three files.

    Attributes:
        images: number of images with a sound line.
        fingerprint: the fingerprint of the scorer; "" before the first scores.
    """

    def __init__(self, folder: Path, labels: LabelSet, total: int) -> None:
        self.folder, self.total = folder, total
        self.images, self.fingerprint = 0, ""
        self._require_same_number()
        self._rows = ScoresFile(folder, labels, width=len(labels))
        self._rows.resize(total)
        self._lines = (folder / SCORED).open("ab")
        self._known: dict[int, dict[str, JsonValue]] = {}

    def _require_same_number(self) -> None:
        try:
            before = len(np.load(self.folder / SCORES, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return
        if before != self.total:
            raise DataError(
                f"The run in {str(self.folder)!r} was started with {before} images; there are now {self.total}.", hint=SAME
            )

    def keep_what_is_sound(self, expected: Iterator[str], began: datetime, batch_size: int, *, retry_failed: bool) -> None:
        """Count the images that need not be scored again: whole batches with right checksums and unchanged files.

        Raises:
            DataError: if an image has another name than before.
        """
        kept, position = (0, 0), 0
        for line, length in _lines(self.folder):
            if line.path != (name := next(expected, "")):
                raise DataError(
                    f"Image {self.images} of {str(self.folder)!r} was {line.path!r} and is now {name or 'gone'!r}.", hint=SAME
                )
            if (retry_failed and line.error) or not self._rows.holds(self.images, line.scores, line.embedding):
                break
            if line.is_file and has_changed(line.path, line.digest, began):
                told = f"The image {line.path!r} was changed after it was scored; it and all later images are scored again."
                warnings.warn(told, RuntimeWarning, stacklevel=2)
                break
            self.images, position = self.images + 1, position + length
            self.fingerprint = self.fingerprint or line.fingerprint
            if self.images % batch_size == 0 or self.images == self.total:
                kept = self.images, position
        self.images, end = kept
        self._lines.truncate(end)

    def prepared(self, image: Prepared) -> None:
        note_digest(image)

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        """Write the rows of images that were scored together.

        Raises:
            DataError: if earlier images were scored by another scorer.
        """
        self._lines.flush()  # of the batches before
        self.fingerprint = self.fingerprint or scores.fingerprint
        _require_same(self.folder, self.fingerprint, scores.fingerprint)
        embeddings = repeat(None) if scores.embeddings is None else scores.embeddings
        for number, image, log_probs, embedding in zip(numbers, images, scores.log_probs, embeddings, strict=False):
            self._known[number] = {
                "digest": image.digest,
                "is_file": isinstance(image.source, str | Path),
                "size": None if image.size is None else [*image.size],
                "fingerprint": scores.fingerprint,
                **self._rows.write(number, log_probs, embedding),
            }

    def append(self, path: str, error: str) -> None:
        """Write the line of the next image."""
        known = self._known.pop(self.images, None) or {"error": error, **self._rows.write_unreadable(self.images)}
        self._lines.write(with_checksum(json.dumps({"path": path, **known}).encode()))
        self.images += 1

    def close(self) -> None:
        """Bring everything to the disk, and close the files."""
        self._rows.sync()
        self._rows.close()
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._lines.close()


def _require_same(folder: Path, before: str, now: str) -> None:
    """Raises: DataError: if the fingerprint of the scorer is another one than before."""
    if now != before:
        raise DataError(f"{str(folder)!r} has scores of {before!r}; the scorer is now {now!r}.", hint="Give another folder.")


def _lines(folder: Path) -> Iterator[tuple[ScoredLine, int]]:
    """The lines of ``scored.jsonl`` up to the first damaged line, each with its number of bytes."""
    with (folder / SCORED).open("rb") as lines:
        for line in lines:
            body = checked(line)
            if body is None:
                return
            yield ScoredLine.model_validate(json.loads(body)), len(line)
