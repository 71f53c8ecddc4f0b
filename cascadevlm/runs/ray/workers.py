"""What runs in the workers of a cluster: reading and scoring, in batches; judging, question by question.

Errors of ours travel as values: Ray would make long texts of them, or ask again.
"""

import asyncio
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, CascadeError, ImageError
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Verdict
from cascadevlm.config.config import Config, Options
from cascadevlm.config.loading import load_judge
from cascadevlm.judges.base import Judge
from cascadevlm.runs.inputs import Named, after
from cascadevlm.scorers.base import Prepared, Scorer, prepared_or_error, scored_or_errors
from cascadevlm.scorers.kept import note_file_digest

SAME_FILES = "Every machine of the cluster needs the working directory and the images under the same paths."


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a worker takes over from the process that runs the command.

    Attributes:
        folder: the working directory.
        threads: of numerical libraries, as ``OMP_NUM_THREADS`` says it.
    """

    folder: str
    threads: str

    def enter(self) -> None:
        """Called in a worker before it loads anything.

        Raises:
            BackendError: if it has no such directory.
        """
        os.environ["OMP_NUM_THREADS"] = self.threads
        try:
            os.chdir(self.folder)
        except OSError as exc:
            raise BackendError(f"A worker cannot use the directory {self.folder!r}: {exc.strerror}.", hint=SAME_FILES) from exc


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """A batch of N images as a worker read and scored it.

    Attributes:
        paths: N; "" of images that are no files.
        errors: N; None of the n that could be read.
        digests: n, of their files; "" of images that are no files.
        log_probs: n x C; None where n is 0.
        fingerprint: the scorer's.
    """

    paths: Sequence[str]
    errors: Sequence[ImageError | None]
    digests: Sequence[str]
    log_probs: NDArray[np.float32] | None
    fingerprint: str


def list_images(
    rows: Mapping[str, Sequence[int]], images: Iterable[Named], batch_size: int, place: Workplace
) -> Iterator[dict[str, list[bytes]]]:
    """The images from a given one on, a batch a row."""
    try:
        place.enter()
        sources = (source for _, source in after(images, int(rows["item"][0])))
        while batch := list(islice(sources, batch_size)):
            yield {"images": [pickle.dumps(batch)]}
    except CascadeError as exc:
        yield {"images": [pickle.dumps(exc)]}


class ScoringWorker:
    """Reads and scores batches. May be called from several threads: a batch is read while another one is scored."""

    def __init__(self, config: Mapping[str, JsonValue], labels: LabelSet, place: Workplace) -> None:
        self.config = config
        self.labels = labels
        self.place = place
        self.readers = ThreadPoolExecutor(os.cpu_count())
        self.loading = Lock()
        self.scoring = Lock()

    def __call__(self, rows: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        try:
            scored: ScoredBatch | CascadeError = self._scored(pickle.loads(rows["images"][0]))
        except CascadeError as exc:
            scored = exc
        return {"scored": [pickle.dumps(scored)]}

    def _scored(self, sources: list[ImageSource] | CascadeError) -> ScoredBatch:
        if isinstance(sources, CascadeError):
            raise sources
        with self.loading:
            self.scorer  # noqa: B018  # loads it
        read = list(self.readers.map(lambda source: prepared_or_error(self.scorer, source, note_file_digest), sources))
        prepared = [each for each in read if isinstance(each, Prepared)]
        with self.scoring:
            scores, errors = scored_or_errors(self.scorer, prepared, self.labels) if prepared else (None, [])
        unscored = iter(errors)
        return ScoredBatch(
            paths=[path_of(source) for source in sources],
            errors=[each if isinstance(each, ImageError) else next(unscored) for each in read],
            digests=[each.file_digest for each, error in zip(prepared, errors, strict=True) if error is None],
            log_probs=scores.log_probs if scores else None,
            fingerprint=scores.fingerprint if scores else "",
        )

    @cached_property
    def scorer(self) -> Scorer:
        self.place.enter()
        scorer = Config.parse(self.config).build(self.labels, bulk=True).scorer
        scorer.load()
        return scorer


class JudgingWorker:
    """A judge, made ready by the first call: a worker that was lost begins anew without being told."""

    def __init__(self, spec: str, options: Options, place: Workplace) -> None:
        self.spec = spec
        self.options = options
        self.place = place
        self.preparing = asyncio.Lock()
        self.ready: Judge | None = None

    async def identity(self) -> Mapping[str, JsonValue] | CascadeError:
        """The judge's `Judge.identity`, once it is ready."""
        try:
            return dict((await self._prepared()).identity())
        except CascadeError as exc:
            return exc

    async def judge(self, question: Question) -> Verdict | CascadeError:
        """What the judge says."""
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
