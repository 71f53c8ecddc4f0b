"""Batch APIs of providers: escalated questions are submitted together, at a discount, and are answered within a day.

The cascade is run repeatedly, stage by stage, until all questions have answers. Each run collects the new questions. They are
then submitted, and the command waits for the results (`cascadevlm.runs.batches.batch_judge`). Only one run at a time may use a
folder.
"""

import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from cascadevlm.base.errors import BackendError, DataError, InputError, JudgeError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import Prediction, Verdict
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.stage import Stage
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, Payload, VerdictStore, default_cache_folder, key_of
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.runs.batches.batch_judge import AtBatchPrice, BatchJudge, Chunk, told_in

BATCHES = "batches"
"""Name of the folder in the folder of a run that contains the state of its batches."""

LONGEST_MINUTES = 24 * 60.0
"""Time within which the providers promise the answers of a batch, in minutes."""

POLL_SECONDS = 30.0
"""Seconds between two checks whether a batch is done."""

WORTH = 0.1
"""If the budget is too small for all questions, the bill of a batch sets money free for the next one. A next batch must have at
least this share of the questions so far: each may take a day.
"""

Classifying: TypeAlias = Callable[[Cascade], AsyncGenerator[Prediction, None]]
"""Classifies the images of a run with a cascade. It is called several times, always for the same images."""


class _Collecting(VerdictStore):
    """A store that does not keep answers of batches, because the last run must report their cost."""

    def __init__(self, store: VerdictStore) -> None:
        self.store = store

    def get(self, key: str) -> Verdict | None:
        return self.store.get(key)

    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        if verdict.usage.requests:
            self.store.put(key, payload, verdict)


def _in_batches(stages: Sequence[Stage], folder: Path, ledger: Ledger, *, owns_folder: bool) -> list[Stage]:
    """The stages. Their hosted judges ask in batches. Equal judges are one judge, which is asked a question once."""
    replaced: list[Stage] = []
    judges: dict[str, BatchJudge] = {}
    for stage in stages:
        if isinstance(stage.judge, SdkJudge):
            name = key_of(dict(stage.judge.identity()))[:16]
            if name not in judges:
                judges[name] = BatchJudge(stage.judge, folder / name, ledger, owns_folder=owns_folder)
            stage = replace(stage, judge=judges[name])
        replaced.append(stage)
    return replaced


async def stream_in_batches(
    cascade: Cascade,
    images: Sequence[ImageSource],
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Prediction]:
    """The same as `Cascade.astream`, but hosted judges are asked through the batch APIs of their providers.

    Args:
        cascade: the cascade.
        images: the images.
        folder: folder for the state of the batches. With the same folder, an interrupted call continues. Default: a folder next
            to the user's cache.
        progress: function that is called with a line of text for each batch.

    Raises: the errors of `answered_in_batches`.
    """

    def classifying(each: Cascade) -> AsyncGenerator[Prediction, None]:
        return each.astream(images)

    state = folder or default_cache_folder() / "batches"
    async with answered_in_batches(cascade, classifying, folder=state, progress=progress) as answered:
        assert answered is not None
        async for prediction in classifying(answered):
            yield prediction


@asynccontextmanager
async def answered_in_batches(
    cascade: Cascade,
    classifying: Classifying,
    *,
    folder: Path,
    owns_folder: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    stopping: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[Cascade | None, None]:
    """A copy of the cascade whose hosted judges have the answers to all questions of a run, from the batch APIs of their
    providers. This costs half the price, and can take a day. None if it was stopped before.

    Other judges are asked once. When predictions are made, the answers of these judges come from the store.

    Args:
        cascade: the cascade.
        classifying: the run.
        folder: folder for the state of the batches. With the same folder, an interrupted call continues.
        owns_folder: true if no other run uses the folder: see `BatchJudge`.
        progress: function that is called with a line of text for each batch.
        stopping: function that is called while the results are waited for. After it returns true, nothing is waited for.

    Raises:
        InputError: if questions depend on answers about other images, because these answers may take a day.
        BackendError: if no judge of the cascade has a batch API.
        FatalError: if a provider refuses a batch.
    """
    require_batches(cascade)
    stages = _in_batches(cascade.stages, folder, cascade.ledger, owns_folder=owns_folder)
    judges = list(dict.fromkeys(stage.judge for stage in stages if isinstance(stage.judge, BatchJudge)))
    store = MemoryStore() if cascade.store is None else cascade.store
    collecting = cascade.altered(
        store=_Collecting(store), on_failure="scorer", calibration=None, follow_shares=False, observers=()
    )
    async with AsyncExitStack() as stack:
        for judge in judges:  # stay connected during all runs
            stack.push_async_callback(judge.aclose)
            stack.callback(judge.release)
            await judge.prepare()
            await judge.take_up()
        for depth, stage in enumerate(stages, start=1):
            if isinstance(stage.judge, BatchJudge):
                await _collect(collecting.altered(stages=stages[:depth]), stage.judge, classifying, progress, stopping)
                stage.judge.closed = all(later.judge is not stage.judge for later in stages[depth:])
        if stopping():
            yield None
            return
        for judge in judges:
            judge.conclude()
        try:
            yield cascade.altered(stages=stages, store=store)
        except JudgeError:  # the run has ended in a failure, which the next run must not find again
            for judge in judges:
                judge.finish(store)
            raise
        for judge in judges:
            judge.finish(store)


def at_batch_prices(cascade: Cascade) -> Cascade:
    """A copy of the cascade for estimates: the quotes of its hosted judges have the prices of batch APIs.

    Raises: the errors of `require_batches`.
    """
    require_batches(cascade)
    stages = [
        replace(stage, judge=AtBatchPrice(stage.judge)) if isinstance(stage.judge, SdkJudge) else stage
        for stage in cascade.stages
    ]
    return cascade.altered(stages=stages)


def answering(
    cascade: Cascade,
    classifying: Classifying,
    folder: Path,
    *,
    told: Callable[[str], None] | None,
    stopping: Callable[[], bool],
) -> AbstractAsyncContextManager[Cascade | None]:
    """The cascade of a run into a folder: `answered_in_batches`, or unchanged if ``told`` is None.

    Args:
        cascade: the cascade.
        classifying: the run.
        folder: the folder of the run.
        told: function that is called with a line of text for each batch. None: batch APIs are not used.
        stopping: function that is called while the results are waited for. After it returns true, nothing is waited for.
    """
    if told is None:
        return nullcontext(cascade)
    return answered_in_batches(cascade, classifying, folder=folder / BATCHES, owns_folder=True, progress=told, stopping=stopping)


def questions_in(folder: Path) -> int:
    """Number of the questions of the run in a folder that are in batches, and whose answers are not read yet."""
    return len(_unread(folder))


def require_no_batches(folder: Path) -> None:
    """Raise DataError if questions of the run in a folder are in batches: to ask them directly would cost them twice."""
    if questions_in(folder):
        raise DataError(
            f"Questions of the run in {str(folder)!r} are in batches of the provider.",
            hint=f"Repeat the command with --batch. To give up the answers, delete {str(folder / BATCHES)!r}.",
        )


def end_batches(folder: Path, ledger: Ledger) -> None:
    """Delete the state of the batches of a finished run. Its provider may charge for questions that the run asked in an earlier
    session and no longer needs: their worst cases count as spent.
    """
    ledger.settle(0, sum(_unread(folder).values()))
    shutil.rmtree(folder / BATCHES, ignore_errors=True)


def _unread(folder: Path) -> dict[str, int]:
    """The worst case in nanodollars of each question whose answer is not read yet, by the key of the question."""
    found: dict[str, int] = {}
    for of_judge in (folder / BATCHES).glob("*"):
        told = told_in(of_judge)
        for path in of_judge.glob("*.json"):
            worst_cases = Chunk.model_validate_json(path.read_bytes()).worst_cases
            found |= {key: worst_case for key, worst_case in worst_cases.items() if key not in told}
    return found


def require_batches(cascade: Cascade) -> None:
    """Refuse a cascade that cannot ask through batch APIs.

    Raises:
        InputError: if questions depend on answers about other images.
        BackendError: if no judge has a batch API, or a judge has none in its mode.
    """
    hosted = [stage.judge for stage in cascade.stages if isinstance(stage.judge, SdkJudge)]
    if not hosted:
        raise BackendError("No judge of this cascade has a batch API.", hint="Use a judge of openai: or anthropic:.")
    for judge in hosted:
        judge.require_batch_api()
    dependent = {
        "routing": cascade.routing,
        "follow_shares": cascade.follow_shares,
        "learn": cascade.learns_from is not None,
        "an audit with a promise": any(stage.audit and stage.audit.agree for stage in cascade.stages),
    }
    for name, wanted in dependent.items():
        if wanted:
            raise InputError(
                f"Batch APIs do not support {name}: judges are asked one after another, each about all images.",
                hint=f"Remove {name}.",
            )


async def _collect(
    cascade: Cascade,
    judge: BatchJudge,
    classifying: Classifying,
    progress: Callable[[str], None],
    stopping: Callable[[], bool],
) -> None:
    """Run the cascade until all questions to the judge that the budget allows are answered.

    Args:
        cascade: the cascade. The stage of the judge is its last stage.
        judge: the judge, which collects the questions.
        classifying: the run.
        progress: function that is called with a line of text for each batch.
        stopping: function that returns true if nothing more shall be collected.
    """
    while not stopping():
        images = escalated = skipped = 0
        judge.freed = False
        async with aclosing(classifying(cascade)) as predictions:
            async for prediction in predictions:
                images += 1
                escalated += prediction.escalated
                skipped += any(verdict.outcome == "skipped" for verdict in prediction.verdicts)
        if stopping():  # the run may have ended early
            return
        judge.release_unasked()
        if small := bool(skipped and judge.submitted) and judge.collected < WORTH * judge.submitted:
            judge.drop_collected()
        await judge.submit()
        if judge.in_flight:
            progress(f"{escalated} of {images} images escalated; {judge.in_flight} questions wait for their batches.")
            await judge.wait(POLL_SECONDS, stopping)
        elif small or not (skipped and judge.freed):
            return
