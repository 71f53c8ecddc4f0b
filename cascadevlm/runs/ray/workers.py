"""Code that runs in the workers of a cluster: it reads and scores batches, and answers questions one by one.

Errors of cascadevlm are returned as values. Ray would turn raised errors into long texts, or would try again.
"""

import asyncio
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from threading import Lock

from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, CascadeError, ImageError
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores, Verdict
from cascadevlm.config.config import Config
from cascadevlm.config.loading import load_judge
from cascadevlm.config.section import Options
from cascadevlm.judges.base import Judge
from cascadevlm.runs.inputs import Named, after
from cascadevlm.scorers.base import Scorer, prepare_in, score_together
from cascadevlm.scorers.kept import note_digest

SAME_FILES = "Every machine of the cluster needs the working directory and the images under the same paths."


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Settings that a worker gets from the process that runs the command.

    Attributes:
        folder: the working directory.
        threads: number of threads for numerical libraries, as the text of ``OMP_NUM_THREADS``.
    """

    folder: str
    threads: str

    def enter(self) -> None:
        """Prepare a worker. Called before the worker loads anything.

        Raises:
            BackendError: if the worker's machine has no such directory.
        """
        os.environ["OMP_NUM_THREADS"] = self.threads
        try:
            os.chdir(self.folder)
        except OSError as exc:
            raise BackendError(f"A worker cannot use the directory {self.folder!r}: {exc.strerror}.", hint=SAME_FILES) from exc


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """A batch of N images that a worker read and scored.

    Attributes:
        paths: N paths; "" for an image that is not a file.
        errors: for each of the N images, the reason why it has no scores; None for the n images that have scores.
        digests: n digests of the images (`Prepared.digest`).
        sizes: n widths and heights in pixels; None if the image was not decoded.
        scores: `(n, C)`, with embeddings only if the run learns; None if n is 0.
    """

    paths: Sequence[str]
    errors: Sequence[ImageError | None]
    digests: Sequence[str]
    sizes: Sequence[tuple[int, int] | None]
    scores: Scores | None


class _Packer(pickle.Pickler):
    """Pickles without the label set, because both sides have the label set."""

    def persistent_id(self, value: object) -> str | None:
        return "labels" if isinstance(value, LabelSet) else None


class _Unpacker(pickle.Unpickler):
    def __init__(self, content: bytes, labels: LabelSet) -> None:
        super().__init__(io.BytesIO(content))
        self.labels = labels

    def persistent_load(self, name: str) -> LabelSet:
        return self.labels


def packed(batch: ScoredBatch | CascadeError) -> bytes:
    """The message of a worker: a batch without its label set, or an error."""
    content = io.BytesIO()
    _Packer(content).dump(batch)
    return content.getvalue()


def unpacked(content: bytes, labels: LabelSet) -> ScoredBatch | CascadeError:
    """The content of a worker's message, with its label set."""
    batch: ScoredBatch | CascadeError = _Unpacker(content, labels).load()
    return batch


def list_images(
    rows: Mapping[str, Sequence[int]], images: Iterable[Named], batch_size: int, place: Workplace
) -> Iterator[dict[str, list[bytes]]]:
    """The images from the number in ``rows``, one batch per row."""
    try:
        place.enter()
        sources = (source for _, source in after(images, int(rows["item"][0])))
        while batch := list(islice(sources, batch_size)):
            yield {"images": [pickle.dumps(batch)]}
    except CascadeError as exc:
        yield {"images": [pickle.dumps(exc)]}


class ScoringWorker:
    """Reads and scores batches. Several threads may call it, so that one batch is read while another batch is scored."""

    def __init__(self, config: Mapping[str, JsonValue], labels: LabelSet, place: Workplace) -> None:
        self.config = Config.parse(config)
        self.labels = labels
        self.place = place
        self.readers = ThreadPoolExecutor(os.cpu_count())
        self.loading = Lock()

    def __call__(self, rows: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        try:
            scored: ScoredBatch | CascadeError = self._scored(pickle.loads(rows["images"][0]))
        except CascadeError as exc:
            scored = exc
        return {"scored": [packed(scored)]}

    def _scored(self, sources: list[ImageSource] | CascadeError) -> ScoredBatch:
        if isinstance(sources, CascadeError):
            raise sources
        with self.loading:
            self.scorer  # noqa: B018  # loads it
        reading = prepare_in(self.readers, self.scorer, sources, note_digest)
        read = list(chain.from_iterable(share.result() for share in reading))
        scored = score_together(self.scorer, read, self.labels)
        return ScoredBatch(
            paths=[path_of(source) for source in sources],
            errors=scored.errors,
            digests=[each.digest for each in scored.images],
            sizes=[each.size for each in scored.images],
            scores=scored.scores if scored.scores is None or self.config.learn else replace(scored.scores, embeddings=None),
        )

    @cached_property
    def scorer(self) -> Scorer:
        self.place.enter()
        scorer = self.config.build(self.labels, bulk=True).scorer
        scorer.load()
        return scorer


class JudgingWorker:
    """A judge in a worker. The first call prepares the judge, because Ray restarts a lost worker without any call to the new
    worker.
    """

    def __init__(self, spec: str, options: Options, place: Workplace) -> None:
        self.spec = spec
        self.options = options
        self.place = place
        self.preparing = asyncio.Lock()
        self.ready: Judge | None = None

    async def identity(self) -> Mapping[str, JsonValue] | CascadeError:
        """The identity of the prepared judge (`Judge.identity`), or the reason why the judge cannot work."""
        try:
            return dict((await self._prepared()).identity())
        except CascadeError as exc:
            return exc

    async def judge(self, question: Question) -> Verdict | CascadeError:
        """The verdict, or the error if there is no verdict."""
        try:
            return await (await self._prepared()).judge(question)
        except CascadeError as exc:
            return exc

    async def _prepared(self) -> Judge:
        async with self.preparing:
            if self.ready is None:
                self.place.enter()
                judge = load_judge(self.spec, **self.options)
                await judge.prepare()
                self.ready = judge
        return self.ready
