"""One run of a cascade: batches are scored while earlier images are judged, and predictions come in input order.

Memory depends on the number of open questions, not on the number of images: no further batch is scored while the judges have as
many questions as they can take. Decisions are made in input order and do not depend on latencies. So a policy's budget is spent
on the same images in every run.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, compress, islice
from typing import Annotated, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf

from cascadevlm.base.errors import ImageError, JudgeError
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.candidates import TopK
from cascadevlm.cascade.drift import Drift
from cascadevlm.cascade.item import Item, OnFailure, current, rank
from cascadevlm.cascade.learner import Learner
from cascadevlm.cascade.observer import Observer
from cascadevlm.cascade.running_stage import RunningStage
from cascadevlm.cascade.stage import Stage
from cascadevlm.decision.auditing import Watch, Watched
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.distinct import keys_of
from cascadevlm.decision.learning import Learned
from cascadevlm.decision.shares import Following, Seen, Shares
from cascadevlm.decision.teaching import Transduced
from cascadevlm.judges.dependable import DependableJudges
from cascadevlm.policies.base import START, Selection, Spending
from cascadevlm.scorers.base import Prepared, Scorer, load_once, prepare_in, score_together
from cascadevlm.scorers.kept import note_digest

T = TypeVar("T")

READ_AHEAD = 2
"""Number of batches that wait, decoded and preprocessed, while an earlier batch is scored and the next one is read."""

OUTPUT_LIMIT = 4096
"""Number of predictions that may wait until an earlier image is judged."""


@dataclass(frozen=True)
class _Settled:
    """The result of one image.

    Attributes:
        belief: `(C,)` probabilities after all verdicts, except the answer to a question of an audit; None if the image cannot be
            read, or if the run neither learns nor follows the shares of the classes.
    """

    prediction: Prediction
    belief: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A position between two batches at which a run can continue as if it had not stopped.

    Attributes:
        images: number of images before this position, readable or not.
        spending: the state of every stage's spending at this position.
        seen: sums from which the shares of the classes were estimated; empty if the shares are not followed.
        watched: what the audit has found, if there is an audit with a promise.
        learned: what the run has learned, if it learns; the place is then the beginning of a period. It is no part of the JSON.
    """

    images: int = 0
    spending: tuple[Spending, ...] = ()
    seen: Seen = Seen()
    watched: Watched = Watched()
    learned: Annotated[InstanceOf[Learned] | None, Field(exclude=True)] = None


BEGINNING = Checkpoint()

Read: TypeAlias = tuple[str, Prepared | ImageError]
"""The path of an image ("" if it is not a file), and the image or the error of reading it."""

ReadBatch: TypeAlias = Callable[[Sequence[ImageSource]], Coroutine[None, None, list[Read]]]
"""Reads the images of one batch."""


class _Batch:
    """Images that are scored together and pass through the stages together.

    Attributes:
        begin: number of images before this batch.
        end: number of images up to the end of this batch.
        results: the results of all images, in input order.
        scores: `(n, C)` the scores that decisions on the n readable images are made with; None if n is 0.
        awaited: the results of the images that are not settled.
        turns: one event per stage. It is set when the stage has decided on this batch, so that it can decide on the next batch.
        spending: the state of every stage's spending after the decisions on this batch.
    """

    def __init__(self, images: int, stages: int, *, begin: int) -> None:
        loop = asyncio.get_running_loop()
        self.begin, self.end = begin, begin + images
        self.results: list[asyncio.Future[_Settled]] = [loop.create_future() for _ in range(images)]
        self.scores: Scores | None = None
        self.awaited: dict[Item, asyncio.Future[_Settled]] = {}
        self.turns = [asyncio.Event() for _ in range(stages)]
        self.spending: list[Spending] = []


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that a run gets from its `Cascade`.

    Attributes:
        judges: the judges of all runs of the cascade.
        read: the object that reads the images in place of the scorer; None if the scorer reads them.
        observers: observers of the run.
        drift: observer of the calibrated scores, which do not contain what the run learned; None if drift is not looked for.
        shares: shares of the classes for which the scores are calibrated; None if the shares of the run are not followed.
        learns_from: the calibration whose labelled images a run that learns starts from; its scorer gives the scores without the
            calibration. None if the run does not learn.
        unlabelled: what all images of the run taught before the run; None if they were not looked at before.
    """

    scorer: Scorer
    stages: Sequence[Stage]
    labels: LabelSet
    on_failure: OnFailure
    accept: float
    routing: bool
    batch_size: int
    judges: DependableJudges
    read: ReadBatch | None = None
    observers: Sequence[Observer] = ()
    drift: Drift | None = None
    shares: Shares | None = None
    learns_from: Calibration | None = None
    unlabelled: Transduced | None = None


class Run:
    """The state of one run.

    Args:
        settings: the settings from the cascade.
        start: the checkpoint at which an earlier run of the same cascade stopped.
        stopping: function that is called before each batch. After it returns true, no further batch is started.

    Attributes:
        checkpoint: the end of the last batch whose predictions were all yielded. If the run learns, it is the beginning of the
            period of that batch.
        stopped: true if the run ended early because of ``stopping``.
    """

    def __init__(self, settings: Settings, start: Checkpoint = BEGINNING, stopping: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self.stopping = stopping
        self.stopped = False
        self.checkpoint = start
        self.following = Following(settings.shares, start.seen, settings.batch_size) if settings.shares else None
        self.learner = (
            None
            if settings.learns_from is None
            else Learner(settings.learns_from, settings.batch_size, settings.stages, start.learned, settings.unlabelled)
        )
        audits = [stage.audit for stage in settings.stages if stage.audit is not None and stage.audit.agree is not None]
        self.watch = Watch(audits[0], start.watched, settings.batch_size) if len(audits) == len(settings.stages) == 1 else None
        self.total: int | None = None
        self.stages: list[RunningStage] = []
        self.in_hand = 0
        self.limit = sum(stage.judge.concurrency for stage in settings.stages) or settings.batch_size
        self.room = asyncio.Event()
        self.room.set()
        self.output: asyncio.Queue[_Batch | None] = asyncio.Queue(max(1, OUTPUT_LIMIT // settings.batch_size))
        self.tasks: set[asyncio.Task[object]] = set()
        self.readers = ThreadPoolExecutor(os.cpu_count(), "reading")
        self.scoring = ThreadPoolExecutor(1, "scoring")
        self.taking = ThreadPoolExecutor(1, "taking")  # a source may block, which must not delay another run

    async def predictions(self, sources: Iterable[ImageSource], total: int | None = None) -> AsyncGenerator[Prediction, None]:
        """Classify, and yield predictions in input order.

        Args:
            sources: the images from the start of this run on.
            total: number of images of the whole run, for policies with limits; None if it is not known.
        """
        self.total = total
        seen, watched, here = Seen(), Watched(), self.checkpoint
        observers = self.settings.observers if self.settings.drift is None else [*self.settings.observers, self.settings.drift]
        async with AsyncExitStack() as stack:
            stack.callback(self.readers.shutdown, wait=False, cancel_futures=True)
            stack.callback(self.scoring.shutdown, wait=False, cancel_futures=True)
            stack.callback(self.taking.shutdown, wait=False, cancel_futures=True)
            spending = self.checkpoint.spending or (START,) * len(self.settings.stages)
            for number, (stage, before) in enumerate(zip(self.settings.stages, spending, strict=True)):
                judge = await stack.enter_async_context(self.settings.judges.of(stage.judge))
                for observer in self.settings.observers:
                    observer.ready(number, stage.judge)
                running = RunningStage(
                    number, stage, judge, self.settings.labels, self.readers, before, observers=self.settings.observers
                )
                self.stages.append(running)
            producer = asyncio.create_task(self._produce(sources))
            stack.push_async_callback(self._close, producer)
            while (batch := await self.output.get()) is not None:
                beliefs, judged, differing = [], [], []
                for number, result in enumerate(batch.results, start=batch.begin):
                    settled = await result
                    for observer in observers:
                        observer.predicted(number, settled.prediction)
                    if settled.belief is not None:
                        beliefs.append(settled.belief)
                        judged.append(settled.prediction.answered and not settled.prediction.audited)
                    if settled.prediction.candidates:
                        differing.append(settled.prediction.differing)
                    yield settled.prediction
                if self.following is not None:
                    await self.following.take(beliefs, batch.begin)
                    seen = self.following.seen
                if self.learner is not None:
                    await self.learner.take(batch.scores, beliefs, judged, batch.begin)
                    if self.learner.learned.images == batch.begin:
                        self.checkpoint = replace(here, learned=self.learner.learned)
                if self.watch is not None:
                    await self.watch.take(differing)
                    watched = self.watch.watched
                for turn in batch.turns:  # a later stage decides on every batch, even if no image is left for it
                    await turn.wait()
                here = Checkpoint(images=batch.end, spending=tuple(batch.spending), seen=seen, watched=watched)
                if self.learner is None:
                    self.checkpoint = here
            await producer

    async def _close(self, producer: asyncio.Task[None]) -> None:
        tasks = [producer, *self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """Start a task that ends when the run ends."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(_seen)
        return task

    async def _produce(self, sources: Iterable[ImageSource]) -> None:
        earlier, begin = [_passed() for _ in self.stages], self.checkpoint.images
        async with _ending(self.output), aclosing(self._reading(sources)) as reading:
            async for read in reading:
                await self.room.wait()
                if self.stopping():
                    self.stopped = True
                    break
                batch = _Batch(len(read), len(self.stages), begin=begin)
                items = await self._score(read, batch)
                self._begin(self._escalate(items, earlier, batch))
                earlier, begin = batch.turns, batch.end
                await self.output.put(batch)

    async def _reading(self, sources: Iterable[ImageSource]) -> AsyncGenerator[list[Read], None]:
        """Batches of images, read ahead. If the sources raise an error, the batches before it come first."""
        ahead: asyncio.Queue[asyncio.Task[list[Read]] | None] = asyncio.Queue(READ_AHEAD)
        reader = self._begin(self._read_ahead(iter(sources), ahead))
        while (batch := await ahead.get()) is not None:
            yield await batch
        await reader

    async def _read_ahead(self, sources: Iterator[ImageSource], ahead: asyncio.Queue[asyncio.Task[list[Read]] | None]) -> None:
        loop = asyncio.get_running_loop()

        async def take() -> list[ImageSource]:
            return await loop.run_in_executor(self.taking, lambda: list(islice(sources, self.settings.batch_size)))

        read = self.settings.read or self._prepare_batch
        async with _ending(ahead):
            if batch := await take():
                await loop.run_in_executor(self.scoring, load_once, self.settings.scorer)
            while batch:
                await ahead.put(self._begin(read(batch)))
                batch = await take()

    async def _prepare_batch(self, batch: Sequence[ImageSource]) -> list[Read]:
        seen = [observer.prepared for observer in self.settings.observers]
        if self.learner is not None:
            seen.append(note_digest)
        reading = prepare_in(self.readers, self.settings.scorer, batch, *seen)
        prepared = chain.from_iterable(await asyncio.gather(*map(asyncio.wrap_future, reading)))
        return list(zip(map(path_of, batch), prepared, strict=True))

    async def _score(self, read: Sequence[Read], batch: _Batch) -> list[Item]:
        """Score a batch. Images that cannot be read or scored get their result here and are left out."""
        images = [prepared for _, prepared in read]
        scorer, labels = self.settings.scorer, self.settings.labels
        scored = await asyncio.get_running_loop().run_in_executor(self.scoring, score_together, scorer, images, labels)
        left = []
        for number, ((path, _), error, result) in enumerate(zip(read, scored.errors, batch.results, strict=True), batch.begin):
            if error is None:
                left.append((number, path, result))
            else:
                result.set_result(_Settled(Prediction(path=path, error=str(error))))
        if (scores := scored.scores) is None:
            return []
        numbers = [number for number, _, _ in left]
        calibrated = scores
        if self.learner is not None:
            calibrated, keys = self.learner.calibration.calibrated(scores), keys_of(each.digest for each in scored.images)
            scores = await self.learner.adapted(scores, batch.begin, keys)
        if self.settings.drift is not None:
            self.settings.drift.scored(numbers, scored.images, calibrated)
        for observer in self.settings.observers:
            observer.scored(numbers, scored.images, scores)
        if self.following is not None:
            scores = await self.following.adjusted(scores, batch.begin)
        batch.scores = scores
        self._take_in_hand([result for _, _, result in left])
        for row, ((number, path, result), prepared) in enumerate(zip(left, scored.images, strict=True)):
            prepared.features = None
            batch.awaited[Item(number=number, path=path, prepared=prepared, chunk=scores, row=row)] = result
        return list(batch.awaited)

    def _take_in_hand(self, results: Sequence[asyncio.Future[_Settled]]) -> None:
        def settled(result: asyncio.Future[_Settled]) -> None:
            _seen(result)
            self.in_hand -= 1
            if self.in_hand < self.limit:
                self.room.set()

        self.in_hand += len(results)
        if self.in_hand >= self.limit:
            self.room.clear()
        for result in results:
            result.add_done_callback(settled)

    async def _escalate(self, items: list[Item], earlier: Sequence[asyncio.Event], batch: _Batch) -> None:
        """Pass a batch through the stages. An image is settled when no further stage asks about it."""
        try:
            if not self.stages:
                rank(TopK(), items)
            for running, before, turn in zip(self.stages, earlier, batch.turns, strict=True):
                await before.wait()
                asked, left = await self._decide(running, items, batch.end)
                batch.spending.append(running.spending)
                turn.set()
                for item in set(items).difference(asked, left):
                    self._settle(item, batch)
                await _together(self._ask(running, item, batch) for item in asked)
                items = [item for item in items if item in batch.awaited]
            for item in items:
                self._settle(item, batch)
        except Exception as exc:
            for result in batch.awaited.values():
                result.set_exception(exc)
        finally:
            for turn in batch.turns:
                turn.set()

    async def _decide(self, running: RunningStage, items: list[Item], end: int) -> tuple[list[Item], list[Item]]:
        """The images that a stage's policy escalates, and the images that it leaves to a later stage.

        Args:
            running: the stage.
            items: images of one batch.
            end: number of images up to the end of the batch.
        """
        if not items:
            return [], []
        scores = current(items)
        prices = await running.prices(items)
        left = await self._better_later(running, items, scores, prices)
        first = running.spending.images
        remaining = self._remaining(first + len(items), end)
        distrusted = np.zeros(len(items), dtype=bool)
        if self.watch is not None:
            distrusted = await self.watch.escalated(first, first + len(items))
        asked = running.decide(
            items, scores, prices, left=left, remaining=remaining, distrusted=distrusted, accept=self.settings.accept
        )
        return asked, list(compress(items, left))

    async def _better_later(
        self, running: RunningStage, items: Sequence[Item], scores: Scores, prices: tuple[float, ...]
    ) -> Selection:
        """``(n,)`` booleans: a question to the judge of a later stage is worth more. All are false without routing."""
        if not self.settings.routing:
            return np.zeros(len(scores), dtype=bool)
        own = running.surplus(scores, prices)
        later = [each.surplus(scores, await each.prices(items)) for each in self.stages[running.number + 1 :]]
        left: Selection = reduce(np.maximum, later, own) > np.maximum(own, 0.0)
        return left

    def _remaining(self, decided: int, end: int) -> float | None:
        """Expected number of images that will still reach a stage; None if the number of images is unknown.

        Args:
            decided: number of images that have reached the stage.
            end: number of images up to the last of these.
        """
        return None if self.total is None else max(self.total - end, 0) * decided / end

    async def _ask(self, running: RunningStage, item: Item, batch: _Batch) -> None:
        await running.ask(item)
        if running is self.stages[-1]:
            self._settle(item, batch)

    def _settle(self, item: Item, batch: _Batch) -> None:
        result = batch.awaited.pop(item)
        try:
            prediction = item.concluded(self.settings.on_failure, self.settings.accept)
        except JudgeError as exc:
            result.set_exception(exc)
        else:
            for observer in self.settings.observers:
                observer.believed(item.number, item.probabilities())
            belief = None
            if self.following is not None or self.learner is not None:  # they learn nothing from an audit: see `Watch`
                belief = item.chunk.probabilities[item.row] if prediction.audited else item.probabilities()
            result.set_result(_Settled(prediction, belief))


async def _together(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all coroutines at the same time. The first error cancels the others, because nobody would read their answers."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


@asynccontextmanager
async def _ending(queue: asyncio.Queue[T | None]) -> AsyncGenerator[None, None]:
    """Put the end mark into a queue when the block ends, also after an error. After a cancellation, nobody reads the queue."""
    try:
        yield
    except Exception:
        await queue.put(None)
        raise
    await queue.put(None)


def _seen(result: asyncio.Future[T]) -> None:
    """Keep asyncio from warning about an error that nobody fetched because another error came first."""
    if not result.cancelled():
        result.exception()


def _passed() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
