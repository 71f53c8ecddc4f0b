"""One run of a cascade: batches are scored while earlier images are judged, results come out in input order.

Memory is bounded by the questions in hand, not by the number of images: no batch is read while the judges have all they can
take. Decisions are made in the order of the input whatever the latencies, so that a policy's budget falls on the same images
in every run.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain, compress, islice
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascadevlm.budget import NANODOLLARS, Ledger, Metered
from cascadevlm.cache import Cached, SingleFlight, VerdictStore
from cascadevlm.candidates import CandidateRule, TopK, as_scored
from cascadevlm.decision.drift import Drift
from cascadevlm.decision.shares import Following, Seen, Shares
from cascadevlm.errors import BudgetExhausted, FatalError, ImageError, JudgeError
from cascadevlm.images import ImageSource, is_large, path_of
from cascadevlm.judge import Judge, Repairing
from cascadevlm.labels import Label, LabelSet
from cascadevlm.outage import Reachable
from cascadevlm.pacing import Paced
from cascadevlm.policy import START, Selection, Spending
from cascadevlm.retry import Retrying
from cascadevlm.scorer import Prepared, Scorer, prepared_or_error
from cascadevlm.stage import Stage
from cascadevlm.types import Candidate, Prediction, Scores, Verdict

T = TypeVar("T")

OnFailure = Literal["scorer", "raise", "abstain"]
"""What a prediction is where no judge asked gave an answer: the scorer's label, an error, or no label."""

READ_AHEAD = 2
"""How many batches wait, decoded and preprocessed, while an earlier one is scored and the next one is read."""

OUTPUT_LIMIT = 4096
"""How many predictions may wait for an earlier image to be judged."""


@dataclass(frozen=True)
class _Settled:
    """What came of an image.

    Attributes:
        belief: 1 x C, what is believed of it in the end; None if it could not be read, or the shares of classes are not followed.
    """

    prediction: Prediction
    belief: Scores | None = None


@dataclass(eq=False)
class _Item:
    """One image under way.

    Attributes:
        scores: the scorer's, 1 x C.
        belief: 1 x C, what candidates are chosen by: the scores, less what judges rejected, or fused with what they said.
        fused: whether the belief is what the last judge that was heard said, too.
    """

    path: str
    prepared: Prepared
    scores: Scores
    belief: Scores
    result: asyncio.Future[_Settled]
    fused: bool = False
    candidates: tuple[Candidate, ...] = ()
    reasons: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def current_scores(self) -> Scores:
        """1 x C: the last judge's opinion if it gave one that stands alone, else the belief."""
        verdict = self.verdicts[-1] if self.verdicts else None
        if self.fused or verdict is None or verdict.label is None:
            return self.belief
        opinion = verdict.probabilities or {verdict.label: 1.0}
        probabilities = np.array([[opinion.get(name, 0.0) for name in self.scores.labels.names]])
        with np.errstate(divide="ignore"):
            return replace(self.scores, log_probs=np.log(probabilities).astype(np.float32))

    def hear(self, stage: Stage, verdict: Verdict) -> None:
        """Learn from what a judge said of the candidates; errors and spent budgets say nothing."""
        if verdict.outcome in ("failed", "skipped"):
            return
        if stage.fusion != "judge" and stage.asking is not None:
            self.belief, self.fused = stage.asking.fuse(self.belief, self.candidates, verdict), True
        elif verdict.label is not None:
            self.fused = False
        elif verdict.outcome == "none":
            self.belief = _without(self.belief, {candidate.label.name for candidate in self.candidates})


class _RunningStage:
    """A stage during one run: its judge made dependable, its places, and where its spending stands."""

    def __init__(self, stage: Stage, store: VerdictStore | None, ledger: Ledger, spending: Spending) -> None:
        self.stage = stage
        self.policy = stage.informed_policy
        self.judge = stage.by_votes(dependable(stage.judge, store, ledger))
        self.places = asyncio.Semaphore(self.judge.concurrency)
        self.spending = spending

    def spending_on(self, items: Sequence[_Item], remaining: float) -> Spending:
        """Where it stands before a batch, after which so many more are expected."""
        if not self.policy.by_price:
            return replace(self.spending, remaining=remaining)
        prices = tuple(map(self._price, items, _candidates(self.stage.candidates, items)))
        return replace(self.spending, remaining=remaining, prices=prices)

    def _price(self, item: _Item, candidates: tuple[Candidate, ...]) -> float:
        """Dollars that asking about an image is expected to cost; nothing, if it has gone since it was scored."""
        try:
            question = self.stage.question(item.prepared.unread, candidates)
        except ImageError:
            return 0.0
        return self.stage.by_votes(self.stage.judge).usual_case(question) / NANODOLLARS

    def surplus(self, scores: Scores, items: Sequence[_Item]) -> NDArray[np.floating]:
        """N: by how much asking is worth more than it has to be."""
        return self.policy.surplus(scores, self.spending_on(items, 0))


def dependable(judge: Judge, store: VerdictStore | None, ledger: Ledger) -> Judge:
    """A judge that keeps to the budget and its rates, retries, stops in an outage, repairs, asks identical concurrent questions
    once and, with a store, no question twice."""
    patient = Repairing(Reachable(Retrying(Paced(Metered(judge, ledger)))))
    return Cached(patient, store) if store is not None else SingleFlight(patient)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A place between two batches from which a run can go on as if it had not been left.

    Attributes:
        images: how many came before, readable or not.
        spending: of every stage, where it stood then.
        seen: what the shares of the classes were reckoned from, where they are followed.
    """

    images: int = 0
    spending: tuple[Spending, ...] = ()
    seen: Seen = Seen()


BEGINNING = Checkpoint()

Read: TypeAlias = tuple[str, Prepared | ImageError]
"""The path of an image, or "", and the image or why it cannot be read."""

ReadBatch: TypeAlias = Callable[[Sequence[ImageSource]], Coroutine[None, None, list[Read]]]
"""Reads the images that are scored together."""


class _Batch:
    """Images scored together, on their way through the stages.

    Attributes:
        begin: how many images of the run come before.
        end: how many there are up to its last one.
        results: of all its images, in input order.
        turns: for every stage, set once it has decided on this batch: the next batch's turn.
        spending: of every stage, after it decided on this batch.
    """

    def __init__(self, images: int, stages: int, *, begin: int) -> None:
        loop = asyncio.get_running_loop()
        self.begin, self.end = begin, begin + images
        self.results: list[asyncio.Future[_Settled]] = [loop.create_future() for _ in range(images)]
        self.turns = [asyncio.Event() for _ in range(stages)]
        self.spending: list[Spending] = []


class Run:
    """The state of one run.

    Args:
        start: where an earlier run of the same cascade was left.
        stopping: asked before each batch; once it says so, no further batch is begun.
        drift: looks at scores and predictions.
        shares: of the classes that the scores are calibrated for, if those of the run are to be followed.

    Attributes:
        checkpoint: the end of the last batch whose predictions were all taken.
        stopped: whether batches were left out.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        stages: Sequence[Stage],
        labels: LabelSet,
        on_failure: OnFailure,
        accept: float,
        routing: bool,
        store: VerdictStore | None,
        ledger: Ledger,
        batch_size: int,
        start: Checkpoint = BEGINNING,
        stopping: Callable[[], bool] = lambda: False,
        read: ReadBatch | None = None,
        drift: Drift | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.scorer = scorer
        self.drift = drift
        self.stopping = stopping
        self.stopped = False
        self.read = read or self._prepare_batch
        self.checkpoint = start
        self.following = Following(shares, start.seen, batch_size) if shares else None
        self.total: int | None = None
        spending = start.spending or (START,) * len(stages)
        self.stages = [_RunningStage(stage, store, ledger, before) for stage, before in zip(stages, spending, strict=True)]
        self.labels = labels
        self.on_failure: OnFailure = on_failure
        self.accept = accept
        self.routing = routing
        self.batch_size = batch_size
        self.in_hand = 0
        self.limit = sum(stage.judge.concurrency for stage in stages) or batch_size
        self.room = asyncio.Event()
        self.room.set()
        self.output: asyncio.Queue[_Batch | None] = asyncio.Queue(max(1, OUTPUT_LIMIT // batch_size))
        self.tasks: set[asyncio.Task[object]] = set()
        self.fatal: FatalError | None = None
        self.workers = os.cpu_count() or 1
        self.readers = ThreadPoolExecutor(self.workers, "reading")
        self.scoring = ThreadPoolExecutor(1, "scoring")

    async def predictions(self, sources: Iterable[ImageSource], total: int | None = None) -> AsyncGenerator[Prediction, None]:
        """Classify and yield in input order. ``total`` is how many images the run has, those before its start too; policies that
        keep to a budget want to know it."""
        self.total = total
        seen = Seen()
        async with AsyncExitStack() as stack:
            stack.callback(self.readers.shutdown, wait=False, cancel_futures=True)
            stack.callback(self.scoring.shutdown, wait=False, cancel_futures=True)
            for running in self.stages:
                stack.push_async_callback(running.judge.aclose)
                await running.judge.prepare()
            producer = asyncio.create_task(self._produce(sources))
            stack.push_async_callback(self._close, producer)
            while (batch := await self.output.get()) is not None:
                beliefs = []
                for result in batch.results:
                    settled = await result
                    if self.drift is not None:
                        self.drift.predicted(settled.prediction)
                    if settled.belief is not None:
                        beliefs.append(settled.belief)
                    yield settled.prediction
                if self.following is not None:
                    await self.following.take(beliefs, batch.begin)
                    seen = self.following.seen
                for turn in batch.turns:  # later stages have to decide on a batch of which nothing is left for them, too
                    await turn.wait()
                self.checkpoint = Checkpoint(images=batch.end, spending=tuple(batch.spending), seen=seen)
            await producer

    async def _close(self, producer: asyncio.Task[None]) -> None:
        tasks = [producer, *self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """A task that ends with the run."""
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
        """Batches of images, read ahead. What stands before an error of the sources comes before it."""
        ahead: asyncio.Queue[asyncio.Task[list[Read]] | None] = asyncio.Queue(READ_AHEAD)
        reader = self._begin(self._read_ahead(iter(sources), ahead))
        while (batch := await ahead.get()) is not None:
            yield await batch
        await reader

    async def _read_ahead(self, sources: Iterator[ImageSource], ahead: asyncio.Queue[asyncio.Task[list[Read]] | None]) -> None:
        loop = asyncio.get_running_loop()

        async def take() -> list[ImageSource]:
            return await asyncio.to_thread(lambda: list(islice(sources, self.batch_size)))

        async with _ending(ahead):
            if batch := await take():
                await loop.run_in_executor(self.scoring, self.scorer.load)
            while batch:
                await ahead.put(self._begin(self.read(batch)))
                batch = await take()

    async def _prepare_batch(self, batch: Sequence[ImageSource]) -> list[Read]:
        size = -(-len(batch) // self.workers)
        shares = [batch[start : start + size] for start in range(0, len(batch), size)]
        loop = asyncio.get_running_loop()
        prepared = await asyncio.gather(*(loop.run_in_executor(self.readers, self._prepare, share) for share in shares))
        return list(chain.from_iterable(prepared))

    def _prepare(self, sources: Sequence[ImageSource]) -> list[Read]:
        return [(path_of(source), prepared_or_error(self.scorer, source)) for source in sources]

    async def _score(self, read: Sequence[Read], batch: _Batch) -> list[_Item]:
        """Score a batch; unreadable images get their result here and are left out."""
        readable = []
        for (path, prepared), result in zip(read, batch.results, strict=True):
            if isinstance(prepared, ImageError):
                result.set_result(_Settled(Prediction(path=path, error=str(prepared))))
            else:
                readable.append((path, prepared, result))
        if not readable:
            return []
        scores = await asyncio.get_running_loop().run_in_executor(
            self.scoring, self.scorer.score_prepared, [prepared for _, prepared, _ in readable], self.labels
        )
        if self.drift is not None:
            self.drift.scored(scores)
        if self.following is not None:
            scores = await self.following.adjusted(scores, batch.begin)
        self._take_in_hand([result for _, _, result in readable])
        items = []
        for (path, prepared, result), one in zip(readable, _rows(scores), strict=True):
            prepared.features = None
            items.append(_Item(path=path, prepared=prepared, scores=one, belief=one, result=result))
        return items

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

    async def _escalate(self, items: list[_Item], earlier: Sequence[asyncio.Event], batch: _Batch) -> None:
        """Take a batch through the stages; every image is settled when no further stage asks about it."""
        try:
            if not self.stages:
                _rank(TopK(), items)
            for number, (running, before, turn) in enumerate(zip(self.stages, earlier, batch.turns, strict=True)):
                await before.wait()
                asked, left = self._decide(number, items, batch.end)
                batch.spending.append(running.spending)
                turn.set()
                last = running is self.stages[-1]
                for item in set(items).difference(asked, left):
                    self._settle(item)
                await asyncio.gather(*(self._ask(running, item, last=last) for item in asked))
                items = [item for item in items if not item.result.done()]
            for item in items:
                self._settle(item)
        except Exception as exc:
            for item in items:
                if not item.result.done():
                    item.result.set_exception(exc)
        finally:
            for turn in batch.turns:
                turn.set()

    def _decide(self, number: int, items: list[_Item], end: int) -> tuple[list[_Item], list[_Item]]:
        """Of the batch that ends with image ``end``, those that a stage's policy escalates, and those that it leaves to a later
        stage; all get its reasons, those of the first stage its candidates too."""
        if not items:
            return [], []
        running, scores = self.stages[number], _stacked([item.current_scores() for item in items])
        spending = running.spending_on(items, self._remaining(running.spending.images + len(items), end))
        selected = running.policy.select(scores, spending)
        left = self._better_later(number, scores, items)
        selected = selected & ~left
        for item, reason, elsewhere in zip(items, running.policy.reasons(scores), left, strict=True):
            item.reasons.append(f"{reason}; a later judge is worth more" if elsewhere else reason)
        _rank(
            running.stage.candidates,
            [item for item, chosen in zip(items, selected, strict=True) if chosen or not item.candidates],
        )
        running.spending = replace(
            running.spending,
            images=spending.images + len(items),
            calls=spending.calls + int(selected.sum()),
            dollars=spending.dollars + sum(compress(spending.prices, selected)),
            dollars_for_all=spending.dollars_for_all + sum(spending.prices),
            recent=running.policy.remembered(scores, spending),
        )
        return list(compress(items, selected)), list(compress(items, left))

    def _better_later(self, number: int, scores: Scores, items: Sequence[_Item]) -> Selection:
        """N: whether asking the judge of a later stage is worth more, where that may be chosen."""
        if not self.routing:
            return np.zeros(len(scores), dtype=bool)
        own, *later = [running.surplus(scores, items) for running in self.stages[number:]]
        left: Selection = reduce(np.maximum, later, own) > np.maximum(own, 0.0)
        return left

    def _remaining(self, decided: int, end: int) -> float:
        """How many images are expected to reach a stage after those that have, of the first so many of the run."""
        return 0.0 if self.total is None else max(self.total - end, 0) * decided / end

    async def _ask(self, running: _RunningStage, item: _Item, *, last: bool) -> None:
        verdict = await self._verdict(running, item)
        item.hear(running.stage, verdict)
        seen: set[Label] = set()
        for _ in range(running.stage.widen):
            shown = item.candidates
            seen.update(candidate.label for candidate in shown)
            if verdict.outcome != "none" or not _widened(running.stage.candidates, item, seen):
                break
            wider = await self._verdict(running, item)
            if wider.outcome in ("failed", "skipped"):
                item.candidates = shown
                break
            item.hear(running.stage, wider)
            verdict = replace(wider, usage=verdict.usage + wider.usage)
        item.verdicts.append(verdict)
        if last:
            self._settle(item)

    async def _verdict(self, running: _RunningStage, item: _Item) -> Verdict:
        """What the judge says of an image, among its candidates."""
        stage = running.stage
        async with running.places:
            try:
                if self.fatal is not None:
                    raise self.fatal
                if not item.prepared.decoded:
                    await asyncio.to_thread(lambda: item.prepared.image)
                image = item.prepared.image
                item.candidates = stage.candidates.arrange(item.candidates, image)
                question = replace(stage.question(image, item.candidates), label_set=self.labels)
                if is_large(image):  # encode and hash it beside the event loop, once for all
                    await asyncio.to_thread(running.judge.image_digest, question)
                return await running.judge.judge(question)
            except FatalError as exc:
                self.fatal = exc
                raise
            except BudgetExhausted as exc:
                return Verdict(outcome="skipped", error=str(exc), judge=stage.judge.spec)
            except (JudgeError, ImageError) as exc:  # the image may have gone since it was scored
                return Verdict(outcome="failed", error=str(exc), judge=stage.judge.spec)

    def _settle(self, item: _Item) -> None:
        """Conclude from the verdicts: the last answer counts."""
        answered = next((verdict for verdict in reversed(item.verdicts) if verdict.label is not None), None)
        asked = [verdict for verdict in item.verdicts if verdict.outcome != "skipped"]
        decisive = item.belief if item.fused else item.scores
        best = int(decisive.log_probs[0].argmax())
        prediction = Prediction(
            path=item.path,
            label=decisive.labels[best].name,
            probability=float(decisive.probabilities[0, best]),
            decided_by="fusion" if item.fused else "scorer",
            candidates=item.candidates,
            reasons=tuple(item.reasons),
            verdicts=tuple(item.verdicts),
        )
        if answered is not None and not item.fused:
            probability = answered.probabilities.get(answered.label or "") if answered.probabilities else None
            prediction = replace(prediction, label=answered.label, probability=probability, decided_by="judge")
        elif answered is None and asked:
            chose_none = any(verdict.valid for verdict in asked)
            why = "The judge chose none of the candidates." if chose_none else asked[-1].error
            if self.on_failure == "abstain":
                prediction = _abstained(prediction, why)
            elif self.on_failure == "raise" and not chose_none:
                item.result.set_exception(JudgeError(f"{asked[-1].judge} on {item.path or 'an image'}: {why}"))
                return
        if prediction.probability is not None and prediction.probability < self.accept:
            why = f"{prediction.label!r} has a probability of {prediction.probability:.2f}, below {self.accept:g}."
            prediction = _abstained(prediction, why)
        belief = item.current_scores() if self.following is not None else None
        item.result.set_result(_Settled(prediction, belief))


def _abstained(prediction: Prediction, why: str) -> Prediction:
    return replace(prediction, label=None, probability=None, decided_by=None, error=why)


@asynccontextmanager
async def _ending(queue: asyncio.Queue[T | None]) -> AsyncGenerator[None, None]:
    """Tell who takes from a queue that nothing follows, for an error too; of a task that is cancelled, nobody takes."""
    try:
        yield
    except Exception:
        await queue.put(None)
        raise
    await queue.put(None)


def _seen(result: asyncio.Future[T]) -> None:
    """Keep asyncio from complaining of an error that nobody asked for: another one came before it."""
    if not result.cancelled():
        result.exception()


def _passed() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _stacked(rows: Sequence[Scores]) -> Scores:
    return replace(rows[0], log_probs=np.concatenate([row.log_probs for row in rows]))


def _rows(scores: Scores) -> list[Scores]:
    """Each image's, 1 x C."""
    return [scores.rows(slice(row, row + 1)) for row in range(len(scores))]


def _candidates(rule: CandidateRule, items: Sequence[_Item]) -> list[tuple[Candidate, ...]]:
    """Each image's, by what is believed now."""
    return rule.choose(_stacked([item.belief for item in items]))


def _rank(rule: CandidateRule, items: Sequence[_Item]) -> None:
    """Give each image its candidates by what is believed now, without those that judges rejected; their probabilities and ranks
    are the scorer's."""
    if not items:
        return
    for item, candidates in zip(items, _candidates(rule, items), strict=True):
        if item.belief is not item.scores:
            candidates = tuple(as_scored(item.scores, candidate) for candidate in candidates if candidate.probability > 0)
        item.candidates = candidates


def _widened(rule: CandidateRule, item: _Item, seen: Collection[Label]) -> bool:
    """Give an image further candidates; whether there are any that were not seen."""
    shown = item.candidates
    _rank(rule, [item])
    if all(candidate.label in seen for candidate in item.candidates):
        item.candidates = shown
        return False
    return True


def _without(scores: Scores, rejected: Collection[str]) -> Scores:
    """1 x C, some labels impossible; unchanged, where there would be none left."""
    impossible = np.isin(scores.labels.names, list(rejected)) | (scores.probabilities[0] == 0)
    if impossible.all():
        return scores
    return Scores.from_logits(np.where(impossible, -np.inf, scores.log_probs), scores.labels, scores.fingerprint)
