"""Batches through the real SDKs, against the loopback server: money, interruptions, rows of every kind."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import JsonValue

from cascadevlm import Cascade, Prediction, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import BackendError, FatalError, InputError, JudgeError, PermanentError, TransientError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.types import NANODOLLARS, Question
from cascadevlm.cascade.item import OnFailure
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, MemoryStore, VerdictStore
from cascadevlm.judges.hosted.sdk import BatchLimits, SdkJudge
from cascadevlm.runs.batches import batch
from cascadevlm.runs.batches.batch import stream_in_batches
from cascadevlm.runs.batches.batch_judge import MOST_ATTEMPTS, BatchJudge, Chunk
from cascadevlm.testing import FakeJudge, FakeScorer, noise, question
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge
from tests.server import Conversation, Fault, JudgeServer

Provider = Literal["openai", "anthropic"]
PROVIDERS: tuple[Provider, ...] = ("openai", "anthropic")

LABELS = ["red bird", "blue bird", "grey bird", "green bird"]
SELECT = load_prompt("select")
PRICE = {"input": 2.5, "output": 10, "batch_discount": 0.5}
BILL = 1000 * 2_500 + 20 * 10_000
"""Cost of an answer of the server outside batches, in nanodollars."""

ALL = "entropy > 0"
IMAGES = [noise(seed) for seed in range(30)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)


both = pytest.mark.parametrize("provider", PROVIDERS)


def hosted(server: JudgeServer, provider: Provider, **options: object) -> SdkJudge:
    options = {"price": PRICE, **options}
    if provider == "openai":
        return OpenAIJudge("gpt-4o", base_url=server.openai_url, **options)  # type: ignore[arg-type]
    return AnthropicJudge("claude-opus-5-5", base_url=server.anthropic_url, **options)  # type: ignore[arg-type]


def by_image(asked: Conversation) -> str:
    """An answer that depends only on the image."""
    return asked.say(asked.choices[sum(asked.images[-1]) % len(asked.choices)])


@dataclass
class Bench:
    """A server, and the state that all runs with it share. Every `cascade` is equal to the cascade of a new process."""

    server: JudgeServer
    provider: Provider
    folder: Path
    store: VerdictStore | None
    ledger: Ledger

    def cascade(self, policy: str = "entropy > 0.3", *, judge: Judge | None = None, on_failure: OnFailure = "scorer") -> Cascade:
        judge = judge or hosted(self.server, self.provider)
        self.ledger = Ledger(None if self.ledger.cap is None else self.ledger.cap / NANODOLLARS)
        stage = Stage(judge=judge, prompt=SELECT, policy=parse_policy(policy))
        return Cascade(FakeScorer(), [stage], labels=LABELS, store=self.store, ledger=self.ledger, on_failure=on_failure)

    async def run(self, cascade: Cascade | None = None, images: Sequence[Image.Image] = IMAGES) -> list[Prediction]:
        cascade = cascade or self.cascade(ALL)
        return [prediction async for prediction in stream_in_batches(cascade, images, folder=self.folder)]

    @property
    def rows(self) -> list[str]:
        """The custom_ids of all rows of all batches."""
        return [row.custom_id for batch in self.server.batches for row in batch.rows]

    @property
    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def assert_settled(self, predictions: Sequence[Prediction]) -> None:
        """No reservation is left, the spent amount equals the reported amount, and no state is left."""
        assert self.ledger.reserved_dollars == 0
        assert self.ledger.spent_dollars == pytest.approx(sum(each.cost.dollars for each in predictions), abs=1e-12)
        assert self.files == []
        assert self.server.requests == []


@asynccontextmanager
async def bench(
    provider: Provider,
    folder: Path,
    *,
    dollars: float | None = None,
    store: VerdictStore | None = None,
    answer: Callable[[Conversation], str] = by_image,
    faults: Sequence[Fault | None] | Callable[[int], Fault | None] = (),
    polls: int = 1,
    **options: bool,
) -> AsyncIterator[Bench]:
    async with JudgeServer(answer=answer, faults=faults, batch_polls=polls, **options) as server:  # type: ignore[arg-type]
        yield Bench(server, provider, folder, store, Ledger(dollars))


def outcomes(predictions: Sequence[Prediction]) -> Counter[str]:
    return Counter(prediction.verdict.outcome for prediction in predictions if prediction.verdict)


# The whole way


@both
@pytest.mark.parametrize("keep", ["memory", "disk", "nothing"])
async def test_the_same_as_asking_directly_at_half_the_price(provider: Provider, keep: str, tmp_path: Path) -> None:
    async with bench(provider, tmp_path / "state") as one:
        direct = await one.cascade().aclassify(IMAGES)
        assert {v.error for p in direct for v in p.verdicts} == {""}
        paid, requests = one.ledger.spent_dollars, len(one.server.requests)
        one.server.requests.clear()
        stores: dict[str, VerdictStore] = {"memory": MemoryStore(), "disk": DiskStore(tmp_path / "store")}
        one.store = stores.get(keep)
        batched = await one.run(one.cascade())
        one.assert_settled(batched)
        assert [(p.label, p.decided_by, p.candidates, p.reasons) for p in batched] == [
            (p.label, p.decided_by, p.candidates, p.reasons) for p in direct
        ]
        assert [(v.outcome, v.label, v.text, v.error) for p in batched for v in p.verdicts] == [
            (v.outcome, v.label, v.text, v.error) for p in direct for v in p.verdicts
        ]
        assert 10 < requests < 30
        assert paid == pytest.approx(requests * BILL / NANODOLLARS)
        assert one.ledger.spent_dollars == pytest.approx(paid / 2)
        assert [len(batch.rows) for batch in one.server.batches] == [requests]
        if one.store is not None:
            assert len(one.store) == requests if isinstance(one.store, DiskStore) else True
            again = await one.run(one.cascade())
            assert [p.label for p in again] == [p.label for p in direct]
            assert len(one.server.batches) == 1
            assert (one.ledger.spent_dollars, one.server.requests) == (0, [])
            assert sum(p.cost.saved_dollars for p in again) == pytest.approx(paid / 2)


@both
async def test_chunks_keep_to_the_limits(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(provider, tmp_path) as one:
        judge = hosted(one.server, provider)
        monkeypatch.setattr(type(judge), "batch_limits", BatchLimits(requests=7, bytes=10_000_000))
        predictions = await one.run(one.cascade(ALL, judge=judge))
        assert outcomes(predictions) == {"answered": 30}
        assert [len(batch.rows) for batch in one.server.batches] == [7, 7, 7, 7, 2]
        one.assert_settled(predictions)
        assert len(set(one.rows)) == 30

        sent: list[int] = []
        submit = type(judge).submit_batch

        async def measured(self: SdkJudge, rows: Path, token: str) -> str:
            sent.append(rows.stat().st_size)
            return await submit(self, rows, token)

        monkeypatch.setattr(type(judge), "submit_batch", measured)
        monkeypatch.setattr(type(judge), "batch_limits", BatchLimits(requests=1000, bytes=30_000))
        one.server.batches.clear()
        assert outcomes(await one.run(one.cascade(ALL))) == {"answered": 30}
        assert len(sent) == len(one.server.batches) > 3
        assert max(sent) <= 30_000
        assert sum(len(batch.rows) for batch in one.server.batches) == 30

        monkeypatch.setattr(type(judge), "batch_limits", BatchLimits(requests=1000, bytes=100))
        refused = await one.run(one.cascade(ALL), IMAGES[:2])
        assert outcomes(refused) == {"failed": 2}
        assert "bytes; a whole batch may have" in refused[0].verdicts[0].error
        one.assert_settled(refused)


def test_limits_of_the_direct_api_do_not_hold(tmp_path: Path) -> None:
    judge = OpenAIJudge("gpt-4o", base_url="http://127.0.0.1:1/v1", price=PRICE, requests_per_minute=1, tokens_per_minute=9)
    wrapped = BatchJudge(judge, tmp_path, Ledger())
    assert (wrapped.requests_per_minute, wrapped.tokens_per_minute) == (None, None)


# Interrupted and resumed


class Killed(BaseException):
    """Stands for a signal that ends the process."""


async def killed(run: Bench, cascade: Cascade | None = None) -> None:
    with pytest.raises(Killed):
        await run.run(cascade)
    assert run.ledger.reserved_dollars == 0


def kill_in(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    *,
    after: bool = False,
    times: int = 1,
    error: type[BaseException] = Killed,
) -> None:
    """Interrupt an asynchronous method this number of times, before or after its work."""
    original = getattr(owner, method)
    left = times

    async def breaking(*args: object) -> object:
        nonlocal left
        dying, left = left > 0, left - 1
        if dying and not after:
            raise error("broken off")
        result = await original(*args)
        if dying:
            raise error("broken off")
        return result

    monkeypatch.setattr(owner, method, breaking)


BREAKS = {
    "collected, not submitted": (BatchJudge, "submit", False),
    "submitting, not accepted": (SdkJudge, "submit_batch", False),
    "accepted, id not saved": (SdkJudge, "submit_batch", True),
    "submitted": (BatchJudge, "submit", True),
    "polling": (SdkJudge, "batch_results", True),
    "results there": (BatchJudge, "wait", True),
}


@both
@pytest.mark.parametrize("point", BREAKS)
@pytest.mark.parametrize("kept", [True, False])
async def test_a_run_that_was_killed_goes_on(
    provider: Provider, point: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path, store=MemoryStore() if kept else None) as one:
        owner, method, after = BREAKS[point]
        owner = type(hosted(one.server, provider)) if owner is SdkJudge else owner
        kill_in(monkeypatch, owner, method, after=after)
        await killed(one)
        predictions = await one.run()
        assert outcomes(predictions) == {"answered": 30}
        assert len(one.server.batches) == 1
        assert len(set(one.rows)) == len(one.rows) == 30
        one.assert_settled(predictions)
        assert one.ledger.spent_dollars == pytest.approx(30 * BILL / 2 / NANODOLLARS)


@both
@pytest.mark.parametrize("after", [True, False])
async def test_a_connection_lost_while_submitting(
    provider: Provider, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path) as one:
        monkeypatch.setattr("cascadevlm.judges.retry._BACKOFF", lambda state: 0.0)
        kill_in(monkeypatch, type(hosted(one.server, provider)), "submit_batch", after=after, times=2, error=TransientError)
        one.assert_settled(await one.run())
        assert len(one.rows) == 30


@both
@pytest.mark.parametrize("method", ["submit_batch", "batch_results"])
async def test_a_transfer_that_never_ends_is_given_up_and_tried_again(
    provider: Provider, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request reaches the provider, but its answer never arrives."""
    async with bench(provider, tmp_path) as one:
        monkeypatch.setattr("cascadevlm.judges.retry._BACKOFF", lambda state: 0.0)
        monkeypatch.setattr("cascadevlm.runs.batches.batch_judge.TRANSFER_SECONDS", 2.0)
        owner, calls = type(hosted(one.server, provider)), count()
        original = getattr(owner, method)

        async def hanging(self: SdkJudge, *given: object) -> object:
            result = await original(self, *given)
            if next(calls) == 0:
                await asyncio.sleep(60)
            return result

        monkeypatch.setattr(owner, method, hanging)
        one.assert_settled(await one.run())
        assert (len(one.server.batches), len(one.rows)) == (1, 30)


@both
async def test_batches_of_one_size_are_told_apart(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three equal batches is accepted, but its id is lost."""
    async with bench(provider, tmp_path) as one:
        owner = type(hosted(one.server, provider))
        monkeypatch.setattr(owner, "batch_limits", BatchLimits(requests=10, bytes=10_000_000))
        original = owner.submit_batch

        async def second_dies(self: SdkJudge, rows: Path, token: str) -> str:
            batch_id = await original(self, rows, token)
            if len(one.server.batches) == 2:
                raise Killed
            return batch_id

        monkeypatch.setattr(owner, "submit_batch", second_dies)
        await killed(one)
        monkeypatch.setattr(owner, "submit_batch", original)
        one.assert_settled(await one.run())
        assert len(one.server.batches) == 3
        assert len(set(one.rows)) == len(one.rows) == 30


@both
async def test_killed_again_and_again(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt at every second save of a state file, so that every run makes some progress."""
    async with bench(provider, tmp_path, store=MemoryStore(), answer=unparsed_at_first) as one:
        saves, save = 0, BatchJudge._save

        def dying(self: BatchJudge, chunk: Chunk) -> None:
            nonlocal saves
            saves += 1
            save(self, chunk)
            if saves % 2:
                raise Killed

        monkeypatch.setattr(BatchJudge, "_save", dying)
        deaths = 0
        while deaths < 20:
            try:
                predictions = await one.run()
                break
            except Killed:
                deaths += 1
        assert deaths == saves // 2 >= 3
        assert len(set(one.rows)) == len(one.rows) == 60
        one.assert_settled(predictions)


@both
@pytest.mark.parametrize("kept", [True, False])
async def test_leaving_in_the_middle_of_the_predictions(provider: Provider, kept: bool, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, store=MemoryStore() if kept else None) as one:
        stream = stream_in_batches(one.cascade(ALL), IMAGES, folder=one.folder)
        for _ in range(5):
            await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert one.files
        assert one.ledger.reserved_dollars == 0
        one.assert_settled(predictions := await one.run())
        assert outcomes(predictions) == {"answered": 30}
        assert len(one.rows) == 30


@both
async def test_cancelled_while_waiting(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, polls=10**6) as one:
        task = asyncio.create_task(one.run())
        while not one.server.batches or one.server.batches[0].polls < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.ledger.reserved_dollars == 0
        one.server.batch_polls = 0
        one.assert_settled(await one.run())
        assert len(one.rows) == 30


@both
async def test_answers_to_another_runs_questions_are_kept_for_it(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is killed while its batch is open. The second run has some of the same images, and other images."""
    async with bench(provider, tmp_path) as one:
        kill_in(monkeypatch, BatchJudge, "wait", times=1)
        await killed(one)
        second = await one.run(images=[*IMAGES[20:], noise(100)])
        assert outcomes(second) == {"answered": 11}
        assert one.ledger.reserved_dollars == 0
        assert len(one.files) == 1
        third = await one.run(images=[noise(101)])
        assert outcomes(third) == {"answered": 1}
        assert one.ledger.spent_dollars == pytest.approx(BILL / 2 / NANODOLLARS)
        first = await one.run(images=IMAGES[:20])
        one.assert_settled(first)
        assert [len(batch.rows) for batch in one.server.batches] == [30, 1, 1]


# Rows


@both
async def test_rows_without_an_answer_are_asked_again(provider: Provider, tmp_path: Path) -> None:
    faults = [Fault("expired"), Fault("server_error"), None, Fault("rate_limit"), *[None] * 26, Fault("overloaded")]
    async with bench(provider, tmp_path, faults=faults) as one:
        predictions = await one.run()
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"answered": 30}
        assert [len(batch.rows) for batch in one.server.batches] == [30, 3, 1]
        assert one.ledger.spent_dollars == pytest.approx(30 * BILL / 2 / NANODOLLARS)


@both
async def test_a_batch_that_expires(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, batch_expires=True) as one:
        predictions = await one.run()
        one.assert_settled(predictions)
        assert [len(batch.rows) for batch in one.server.batches] == [30, 15, 8]
        assert outcomes(predictions) == {"answered": 15 + 7 + 4, "failed": 4}


@both
async def test_a_row_that_keeps_failing_is_given_up(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, faults=[Fault("server_error")] * 3, store=MemoryStore()) as one:
        (prediction,) = predictions = await one.run(images=IMAGES[:1])
        one.assert_settled(predictions)
        assert prediction.verdict is not None
        assert (prediction.verdict.outcome, prediction.decided_by) == ("failed", "scorer")
        assert "The server had an error." in prediction.verdict.error
        assert len(one.server.batches) == MOST_ATTEMPTS
        assert one.ledger.spent_dollars == 0
        assert outcomes(await one.run(images=IMAGES[:1])) == {"answered": 1}


@both
@pytest.mark.parametrize("on_failure", ["scorer", "raise", "abstain"])
async def test_a_question_that_is_refused_is_asked_once(provider: Provider, on_failure: OnFailure, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, faults=[None, Fault("bad_request")], store=MemoryStore()) as one:
        cascade = one.cascade(ALL, on_failure=on_failure)
        if on_failure == "raise":
            with pytest.raises(JudgeError, match="Invalid request"):
                await one.run(cascade)
        else:
            predictions = await one.run(cascade)
            one.assert_settled(predictions)
            assert outcomes(predictions) == {"answered": 29, "failed": 1}
            (failed,) = (p for p in predictions if p.verdicts[0].outcome == "failed")
            assert "Invalid request" in failed.verdicts[0].error
            assert failed.decided_by == ("scorer" if on_failure == "scorer" else None)
        assert len(one.rows) == 30
        assert outcomes(await one.run(one.cascade(ALL))) == {"answered": 30}
        assert [len(batch.rows) for batch in one.server.batches] == [30, 1]


@both
@pytest.mark.parametrize("kind", ["unauthorized", "quota", "not_found"])
async def test_rows_that_would_stop_a_direct_run(provider: Provider, kind: str, tmp_path: Path) -> None:
    """If all rows have such an error, the run stops. If only some have one, they fail. The next run does not find them again."""
    async with bench(provider, tmp_path, faults=[Fault(kind)] * 2) as one:  # type: ignore[arg-type]
        with pytest.raises(FatalError):
            await one.run(images=IMAGES[:2])
        assert one.ledger.reserved_dollars == 0
        one.server._faults = iter([Fault(kind)])  # type: ignore[arg-type]
        predictions = await one.run(images=IMAGES[:2])
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"failed": 1, "answered": 1}
        assert outcomes(await one.run(images=IMAGES[:2])) == {"answered": 2}


@both
async def test_refusals_and_answers_cut_off_are_verdicts(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, faults=[Fault("refusal"), Fault("length"), Fault("empty")]) as one:
        predictions = await one.run(images=IMAGES[:4])
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"refused": 1, "failed": 1, "unparsed": 1, "answered": 1}
        assert len(one.server.batches) == 1
        assert one.ledger.spent_dollars > 3 * BILL / 2 / NANODOLLARS


def unparsed_at_first(asked: Conversation) -> str:
    return "A bird, surely." if len(asked.texts) < 4 else by_image(asked)


@both
async def test_an_answer_that_names_no_candidate_is_asked_about_in_a_second_batch(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, faults=[Fault("wrong_label")] * 2 + [None] * 28 + [Fault("wrong_label")]) as one:
        predictions = await one.run()
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"answered": 29, "unparsed": 1}
        assert [len(batch.rows) for batch in one.server.batches] == [30, 2]
        assert Counter(p.cost.requests for p in predictions) == {2: 2, 1: 28}
        assert one.ledger.spent_dollars == pytest.approx(32 * BILL / 2 / NANODOLLARS)


@both
async def test_the_same_image_twice_is_asked_once(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, faults=[Fault("refusal")]) as one:
        predictions = await one.run(images=[*IMAGES[:2], *IMAGES[:2], *IMAGES[:2]] * 10)
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"answered": 30, "refused": 30}
        assert len(one.rows) == 2


@both
async def test_a_row_that_cannot_be_read_counts_as_paid(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path) as one:
        judge = hosted(one.server, provider)

        def unreadable(self: SdkJudge, row: object, question: object) -> None:
            raise KeyError("choices")

        monkeypatch.setattr(type(judge), "of_batch_row", unreadable)
        predictions = await one.run(images=IMAGES[:2])
        assert outcomes(predictions) == {"failed": 2}
        assert one.ledger.reserved_dollars == 0
        assert one.ledger.spent_dollars > 2 * BILL / 2 / NANODOLLARS / 10
        assert len(one.rows) == 2
        assert one.files == []


@both
@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 100}, {"input_tokens": None}, {"input_tokens": -5, "output_tokens": -5}, None]
)
async def test_an_answer_with_a_usage_that_cannot_be_true_is_kept_and_costs_the_most(
    provider: Provider, usage: object, tmp_path: Path
) -> None:
    async with bench(provider, tmp_path) as one:
        one.server.altered = lambda reply: {**reply, "usage": usage}
        predictions = await one.run(one.cascade(ALL), images=IMAGES[:2])
        assert outcomes(predictions) == {"answered": 2}
        spent = one.ledger._spent
        assert spent == 2 * worst(one)


@both
async def test_a_row_without_a_message_counts_as_paid(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path) as one:
        one.server.altered = lambda reply: {**reply, "content": [None], "choices": [{"message": None, "finish_reason": "stop"}]}
        predictions = await one.run(one.cascade(ALL), images=IMAGES[:2])
        assert outcomes(predictions) in ({"failed": 2}, {"unparsed": 2})
        assert one.ledger._spent > 0
        assert one.ledger._reserved == 0


# Budget


def worst(one: Bench) -> int:
    """Maximum cost of a question in a batch, in nanodollars."""
    seen: list[int] = []

    class Asking(FakeJudge):
        async def judge(self, question):  # type: ignore[no-untyped-def]
            seen.append(hosted(one.server, one.provider).quote(question, batch=True).worst_case)
            return await super().judge(question)

    one.cascade(ALL, judge=Asking()).classify(IMAGES)
    return max(seen)


@both
async def test_a_cap_leaves_the_rest_to_the_scorer(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path) as one:
        one.server.usage = (10, 1)  # cheap at once: later rounds have nearly all of the money again
        single = worst(one)
        one.ledger = Ledger(single * 10.5 / NANODOLLARS)
        predictions = await one.run()
        one.assert_settled(predictions)
        sizes = [len(batch.rows) for batch in one.server.batches]
        assert sizes[0] in (10, 11)
        assert len(sizes) > 2
        assert outcomes(predictions) == {"answered": 30}
        assert one.ledger.spent_dollars <= single * 10.5 / NANODOLLARS


@both
async def test_a_cap_is_never_exceeded(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path) as one:
        single = worst(one)
        cap = single * 4.5 / NANODOLLARS
        one.server.usage = (int(single / 2_500 * 2 * 0.4), 0)  # bills of 0.4 worst cases
        one.ledger = Ledger(cap)
        predictions = await one.run()
        one.assert_settled(predictions)
        counts = outcomes(predictions)
        assert counts["answered"] + counts["skipped"] == 30
        assert 8 <= counts["answered"] <= 11
        assert 0.4 * 8 * single / NANODOLLARS < one.ledger.spent_dollars <= cap
        skipped = next(p for p in predictions if p.verdicts[0].outcome == "skipped")
        assert skipped.decided_by == "scorer"
        assert "budget" in skipped.verdicts[0].error


@both
async def test_without_any_money_no_batch_is_made(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path, dollars=0.0) as one:
        predictions = await one.run()
        one.assert_settled(predictions)
        assert outcomes(predictions) == {"skipped": 30}
        assert one.server.batches == []


@both
async def test_a_run_taken_up_with_less_money(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(provider, tmp_path, store=MemoryStore()) as one:
        kill_in(monkeypatch, BatchJudge, "wait")
        await killed(one)
        one.ledger = Ledger(10 * BILL / 2 / NANODOLLARS)
        predictions = await asyncio.wait_for(one.run(), 30)
        assert outcomes(predictions) == {"answered": 30}  # they were paid for before
        one.assert_settled(predictions)
        assert len(one.rows) == 30


@pytest.mark.parametrize("batched_first", [True, False])
async def test_a_paid_judge_without_batches_does_not_wait_for_bills(batched_first: bool, tmp_path: Path) -> None:
    """There is money for one answer per image and three more answers. The costs of images that are not read yet are not
    released.
    """
    bill = BILL // 2

    class Paid(FakeJudge):
        def quote(self, question: Question) -> Quote:
            return Quote(worst_case=bill)

    images = [noise(seed, (8, 8)) for seed in range(100)]
    async with bench("openai", tmp_path) as one:
        cascade = one.cascade("always")
        paid = Stage(judge=Paid("paid", dollars=bill / NANODOLLARS), prompt=SELECT)
        stages = [*cascade.stages, paid] if batched_first else [paid, *cascade.stages]
        cap = 103 * bill / NANODOLLARS
        one.ledger = Ledger(cap)
        predictions = await asyncio.wait_for(one.run(cascade.altered(stages=stages, ledger=one.ledger), images), 60)
        answered = Counter(verdict.stage for each in predictions for verdict in each.verdicts if verdict.outcome == "answered")
        assert answered.total() >= 95
        assert one.ledger.spent_dollars == pytest.approx(answered.total() * bill / NANODOLLARS)
        assert one.ledger.spent_dollars <= cap
        assert one.ledger.reserved_dollars == 0


# Batches refused


@both
async def test_a_batch_refused_as_a_whole_stops_the_run_and_not_the_next(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path) as one:
        owner = type(hosted(one.server, provider))
        results = owner.batch_results

        async def refused(self: SdkJudge, batch_id: str) -> None:
            raise PermanentError(f"{self.spec} refused batch {batch_id}: The token limit is reached.")

        monkeypatch.setattr(owner, "batch_results", refused)
        with pytest.raises(FatalError, match=r"^\w+:\S+ refused batch \w+: The token limit is reached\.$"):
            await one.run()
        assert one.ledger.reserved_dollars == 0
        assert one.files == []
        monkeypatch.setattr(owner, "batch_results", results)
        one.assert_settled(await one.run())
        assert len(one.server.batches) == 2


async def test_openai_says_why_a_batch_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openai.types import Batch as OpenAIBatch

    async with bench("openai", tmp_path) as one:
        from openai.resources.batches import AsyncBatches

        retrieve = AsyncBatches.retrieve

        async def failed(self: AsyncBatches, batch_id: str) -> OpenAIBatch:
            batch = await retrieve(self, batch_id)
            shown = {
                **batch.to_dict(),
                "status": "failed",
                "errors": {"object": "list", "data": [{"message": "Too many tokens."}]},
            }
            return OpenAIBatch.model_validate(shown)

        monkeypatch.setattr(AsyncBatches, "retrieve", failed)
        with pytest.raises(FatalError, match=r"openai:gpt-4o refused batch batch_\w+: Too many tokens\."):
            await one.run()
        assert one.files == []


@both
async def test_a_batch_that_is_gone_says_which_file_to_delete(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path) as one:
        kill_in(monkeypatch, BatchJudge, "wait")
        await killed(one)
        (state,) = one.files
        batches = list(one.server.batches)
        one.server.batches.clear()
        with pytest.raises(FatalError, match="cannot be fetched") as caught:
            await one.run()
        assert str(state) in str(caught.value)
        one.server.batches.extend(batches)
        one.assert_settled(await one.run())
        assert len(one.rows) == 30


@both
async def test_a_submission_refused_stops_the_run_and_not_the_next(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(provider, tmp_path) as one:
        owner = type(hosted(one.server, provider))
        kill_in(monkeypatch, owner, "submit_batch", error=PermanentError)
        with pytest.raises(PermanentError, match="broken off"):
            await one.run()
        assert one.ledger.reserved_dollars == 0
        one.assert_settled(await one.run())


# Which cascades


async def test_local_judges_have_no_batches(tmp_path: Path) -> None:
    cascade = Cascade(FakeScorer(), [Stage(judge=FakeJudge(), prompt=SELECT)], labels=LABELS)
    with pytest.raises(BackendError, match=r"No judge of this cascade has a batch API. Use a judge of openai: or anthropic:"):
        async for _ in stream_in_batches(cascade, IMAGES, folder=tmp_path):
            pass


@pytest.mark.parametrize(("attribute", "name"), [("routing", "routing"), ("follow_shares",) * 2, ("learns_from", "learn")])
async def test_what_depends_on_other_images_is_not_asked_in_batches(attribute: str, name: str, tmp_path: Path) -> None:
    async with bench("openai", tmp_path) as one:
        cascade = one.cascade()
        setattr(cascade, attribute, True)
        with pytest.raises(InputError, match=f"Batch APIs do not support {name}"):
            await one.run(cascade)


@both
async def test_votes_come_in_batches_too(provider: Provider, tmp_path: Path) -> None:
    async with bench(provider, tmp_path / "state") as one:
        told = []
        for run in (lambda cascade: cascade.aclassify(IMAGES), one.run):
            cascade = one.cascade(ALL)
            cascade.stages = (replace(cascade.stages[0], votes=2),)
            told.append([(each.label, each.verdicts[0].probabilities) for each in await run(cascade)])
        assert told[0] == told[1]


async def test_decisions_have_no_batches(tmp_path: Path) -> None:
    async with bench("openai", tmp_path) as one:
        judge = OpenAIJudge("gpt-4o", base_url=one.server.openai_url, price=PRICE, mode="decision")
        with pytest.raises(BackendError, match="has no batch API in mode 'decision'"):
            await one.run(one.cascade(ALL, judge=judge))
        assert one.files == []
        assert one.ledger.reserved_dollars == 0


@both
@pytest.mark.parametrize("kept", [True, False])
async def test_a_local_stage_before_a_hosted_one(provider: Provider, kept: bool, tmp_path: Path) -> None:
    """The hosted judge is asked if the local judge gave no answer. The local judge is asked once."""
    async with bench(provider, tmp_path, store=MemoryStore() if kept else None) as one:

        def stages(local: FakeJudge) -> list[Stage]:
            first = Stage(judge=local, prompt=SELECT, policy=parse_policy("entropy > 0.3"))
            return [first, Stage(judge=hosted(one.server, provider), prompt=SELECT, policy=parse_policy("entropy > 0.6"))]

        def local() -> FakeJudge:
            return FakeJudge(
                reply=lambda asked: "ANSWER: A" if int(pixel_digest(asked.image), 16) % 2 else "What?", dollars=0.001
            )

        direct = await Cascade(FakeScorer(), stages(local()), labels=LABELS).aclassify(IMAGES)
        hosted_calls = len(one.server.requests)
        one.server.requests.clear()
        asked = local()
        cascade = Cascade(FakeScorer(), stages(asked), labels=LABELS, store=one.store)
        batched = await one.run(cascade)
        assert [(p.label, p.decided_by, [v.outcome for v in p.verdicts]) for p in batched] == [
            (p.label, p.decided_by, [v.outcome for v in p.verdicts]) for p in direct
        ]
        assert 3 < hosted_calls < 20
        assert len(one.rows) == hosted_calls
        assert one.server.requests == []
        answered = sum(p.verdicts[0].outcome == "answered" for p in batched if p.verdicts)
        assert sum(q.rejected is None and int(pixel_digest(q.image), 16) % 2 for q in asked.questions) == answered
        assert cascade.ledger.reserved_dollars == 0
        assert one.files == []


@both
async def test_a_second_hosted_stage_waits_for_the_first(provider: Provider, tmp_path: Path) -> None:
    """If the second judge were asked before the first judge answers, it would be asked about all uncertain images."""
    async with bench(provider, tmp_path, store=MemoryStore(), faults=[Fault("refusal")] * 3) as one:

        def cascade() -> Cascade:
            judges = [hosted(one.server, provider), hosted(one.server, provider, max_tokens=500)]
            stages = [Stage(judge=judge, prompt=SELECT, policy=parse_policy("entropy > 0.3")) for judge in judges]
            return Cascade(FakeScorer(), stages, labels=LABELS, store=one.store)

        running = cascade()
        predictions = await one.run(running)
        first, second = one.server.batches
        assert (len(first.rows) > 10, len(second.rows)) == (True, 3)
        assert Counter(len(p.verdicts) for p in predictions)[2] == 3
        assert running.ledger.spent_dollars == pytest.approx(sum(p.cost.dollars for p in predictions))
        assert running.ledger.reserved_dollars == 0
        assert one.files == []


async def test_one_judge_in_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench("openai", tmp_path, store=MemoryStore(), faults=[Fault("refusal")] * 3) as one:
        kill_in(monkeypatch, BatchJudge, "wait")

        async def run() -> list[Prediction]:
            judge = hosted(one.server, "openai")
            stages = [
                Stage(judge=judge, prompt=load_prompt(name), policy=parse_policy("entropy > 0.3"))
                for name in ("select", "select_cot")
            ]
            cascade = Cascade(FakeScorer(), stages, labels=LABELS, store=one.store, ledger=Ledger(1))
            predictions = await one.run(cascade)
            assert cascade.ledger.reserved_dollars == 0
            return predictions

        with pytest.raises(Killed):
            await run()
        assert Counter(len(p.verdicts) for p in await run())[2] == 3
        assert len(one.server.batches) == 2
        assert one.files == []


async def test_a_policy_that_spends_goes_by_the_batch_price(tmp_path: Path) -> None:
    async with bench("openai", tmp_path) as one:
        judge = hosted(one.server, "openai")
        batched = BatchJudge(judge, tmp_path, Ledger())
        asked: list[tuple[int, int]] = []

        class Asking(FakeJudge):
            async def judge(self, question):  # type: ignore[no-untyped-def]
                asked.append((judge.quote(question).usual_case, batched.quote(question).usual_case))
                return await super().judge(question)

        one.cascade(ALL, judge=Asking()).classify(IMAGES[:1])
        ((direct, batch),) = asked
        assert batch == round(direct / 2)


@both
async def test_no_key_is_kept_in_the_state(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(provider, tmp_path) as one:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
        kill_in(monkeypatch, BatchJudge, "wait", after=True)
        await killed(one)
        (state,) = one.files
        assert len(json.loads(state.read_bytes())["results"]) == 30
        assert b"sk-secret" not in state.read_bytes()


# Whatever comes


KINDS = ("expired", "server_error", "bad_request", "refusal", "wrong_label", "length", "empty")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    faults=st.lists(st.none() | st.sampled_from(KINDS), max_size=24),
    worst_cases=st.none() | st.floats(0, 12),
    deaths=st.sets(st.integers(0, 6), max_size=2),
    kept=st.booleans(),
    provider=st.sampled_from(PROVIDERS),
)
@example(faults=[], worst_cases=2.875, deaths={4}, kept=False, provider="openai")  # worst cases above the cap, bills not
def test_whatever_becomes_of_the_rows(
    faults: list[str | None],
    worst_cases: float | None,
    deaths: set[int],
    kept: bool,
    provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rows of every kind, a spending limit, and runs that are killed at saved states: the results are verdicts or typed
    failures, within the limit.
    """
    images = IMAGES[:8]
    saves, save = -1, BatchJudge._save

    def dying(self: BatchJudge, chunk: Chunk) -> None:
        nonlocal saves
        saves += 1
        save(self, chunk)
        if saves in deaths:
            raise Killed

    async def go() -> None:
        planned = [Fault(kind) if kind else None for kind in faults]  # type: ignore[arg-type]
        folder = tmp_path_factory.mktemp("state")
        async with bench(provider, folder, faults=planned, store=MemoryStore() if kept else None, polls=0) as one:
            cap = None if worst_cases is None else worst(one) * worst_cases / NANODOLLARS
            one.ledger = Ledger(cap)
            while True:
                try:
                    predictions = await one.run(images=images)
                    break
                except Killed:
                    assert one.ledger.reserved_dollars == 0
            assert one.ledger.reserved_dollars == 0
            assert one.files == []
            assert one.server.requests == []
            assert all(p.verdict is not None and (p.label is not None) for p in predictions)
            assert cap is None or one.ledger.spent_dollars <= cap + 1e-9
            assert "skipped" not in outcomes(predictions) or cap is not None
            assert max(Counter(one.rows).values(), default=0) <= MOST_ATTEMPTS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchJudge, "_save", dying)
        asyncio.run(go())


@both
async def test_a_batch_whose_id_got_lost_is_known_from_a_strangers(provider: Provider, tmp_path: Path) -> None:
    """OpenAI's batches contain our token. Among Anthropic's batches, the newest batch of the right size after the right time is
    used.
    """
    async with JudgeServer() as server:
        judge = hosted(server, provider)
        asked = question()
        ids: dict[str, str] = {}
        before, since, after = (
            "2020-01-01T00:00:00.000000+00:00",
            "2021-01-01T00:00:00.000000+00:00",
            "2999-01-01T00:00:00.000000+00:00",
        )
        for name, count in (("old", 2), ("mine", 2), ("stranger", 3), ("another", 1)):
            rows = tmp_path / f"{name}.jsonl"
            rows.write_text("".join(f"{json.dumps(judge.batch_row(f'{name}{number}', asked))}\n" for number in range(count)))
            ids[name] = await judge.submit_batch(rows, f"{since}/{count}/{name}")
            server.batches[-1].created = datetime.fromisoformat(before if name == "old" else since)
        server.batches.append(replace(server.batches[-1], id="stranger's", rows=[*server.batches[-1].rows] * 5, metadata=None))
        found = [
            await judge.find_batch(f"{since}/{count}/{name}") for name, count in (("mine", 2), ("stranger", 3), ("another", 1))
        ]
        assert found == [ids["mine"], ids["stranger"], ids["another"]]
        assert await judge.find_batch(f"{since}/7/never") is None
        assert await judge.find_batch(f"{after}/2/lost") is None
        await judge.disconnect()


async def test_a_batch_that_is_known_is_not_taken_for_one_of_the_same_size_that_was_never_submitted(tmp_path: Path) -> None:
    async with JudgeServer() as server:
        judge = BatchJudge(hosted(server, "anthropic"), tmp_path, Ledger())
        rows = tmp_path / "rows.jsonl"
        rows.write_text(f"{json.dumps(judge.hosted.batch_row('key', question()))}\n")
        token = "2021-01-01T00:00:00.000000+00:00/1/"
        known = Chunk(name="known", token=f"{token}known", batch_id=await judge.hosted.submit_batch(rows, f"{token}known"))
        lost = Chunk(name="lost", token=f"{token}lost")
        judge.chunks = [known, lost]
        assert await judge._find(lost) is None
        judge.chunks = [lost]
        assert await judge._find(lost) == known.batch_id
        await judge.hosted.disconnect()


@both
async def test_a_row_with_a_filters_error_is_a_refusal(provider: Provider, tmp_path: Path) -> None:
    error: JsonValue = {
        "type": "invalid_request_error",
        "code": "content_filter",
        "message": "Blocked by content filtering policy.",
    }
    flagged = Fault("body", status=400, body={"type": "error", "error": error})
    async with bench(provider, tmp_path, faults=[flagged]) as one:
        predictions = await one.run()
    assert outcomes(predictions) == {"answered": len(IMAGES) - 1, "refused": 1}
    (refused,) = (p.verdict for p in predictions if p.verdict and p.verdict.outcome == "refused")
    assert "content filtering policy" in refused.error
    assert one.ledger._spent == (len(IMAGES) - 1) * BILL // 2


async def test_rows_with_content_in_parts_are_read(tmp_path: Path) -> None:
    message: JsonValue = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER: B"}]}
    usage: JsonValue = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    parts = Fault("body", body={"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": usage})
    async with bench("openai", tmp_path, faults=[parts]) as one:
        assert outcomes(await one.run()) == {"answered": len(IMAGES)}
