"""Unusual runs: stopped early, without money, without space on the disk, with options that make no sense."""

import asyncio
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascadevlm import Cascade, Label, LabelSet, Scores, Stage, load_judge, load_prompt
from cascadevlm.base.errors import BackendError, BudgetExhausted, FatalError, JudgeError
from cascadevlm.base.types import Exemplar, Question, Verdict
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, Payload
from cascadevlm.judges.hosted.replies import Reply
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.judges.support import SupportSet
from cascadevlm.judges.voting import Repairing
from cascadevlm.policies.rules import Always
from cascadevlm.testing import FakeJudge, FakeScorer, noise, picture, question

NAMES = ["ant", "bee", "cicada"]
SELECT = load_prompt("select")


class Closing(FakeJudge):
    """Remembers that it was closed."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True


def test_a_fatal_error_behind_thousands_of_results_ends_the_run() -> None:
    """The results of images without a question fill the queue, while the image with a question fails."""
    ask_first_only = np.zeros(32, dtype=bool)
    ask_first_only[0] = True
    asked = iter([ask_first_only])

    def policy(scores: Scores) -> "np.typing.NDArray[np.bool_]":
        return next(asked, np.zeros(len(scores), dtype=bool))

    judge = FakeJudge(reply=FatalError("wrong key"), seconds=4)
    image = picture(size=(2, 2))
    cascade = Cascade(
        FakeScorer(table={(200, 30, 30): [1, 0, 0]}), [Stage(judge=judge, prompt=SELECT, policy=policy)], labels=NAMES
    )
    with pytest.raises(FatalError):
        asyncio.run(asyncio.wait_for(consume(cascade, [image] * 8000), timeout=60))


async def consume(cascade: Cascade, images: list[Image.Image]) -> None:
    async for _ in cascade.astream(images):
        pass


def test_leaving_a_stream_early_closes_the_run_before_it_returns() -> None:
    judge = Closing(seconds=0.01)
    cascade = Cascade(FakeScorer(), [Stage(judge=judge, prompt=SELECT)], labels=NAMES)
    stream: Iterator[object] = cascade.stream(noise(seed) for seed in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert judge.closed


def test_a_class_without_reference_images_is_shown_without() -> None:
    owl = Label(name="owl")
    support = SupportSet({"owl": (Exemplar(image=noise(1), label=owl),)})
    judge = FakeJudge()
    stage = Stage(judge=judge, prompt=load_prompt("select_fewshot"), support=support)
    (prediction,) = Cascade(FakeScorer(), [stage], labels=NAMES).classify([noise(2)])
    assert prediction.decided_by == "judge"


def test_a_later_judge_that_chooses_none_does_not_undo_an_answer() -> None:
    stages = [
        Stage(judge=FakeJudge("first", reply="ANSWER: B"), prompt=SELECT),
        Stage(judge=FakeJudge("second", reply="ANSWER: none of these"), prompt=SELECT, offer_none=True, policy=Always()),
    ]
    (prediction,) = Cascade(FakeScorer(), stages, labels=NAMES).classify([noise(1)])
    assert prediction.label == prediction.candidates[1].label.name
    assert prediction.decided_by == "judge"


@pytest.mark.parametrize("error", [BudgetExhausted("no money"), JudgeError("down")])
async def test_a_repair_that_fails_keeps_what_the_first_answer_cost(error: JudgeError) -> None:
    judge = FakeJudge(reply=["A sparrow, I think.", error], dollars=0.01)
    verdict = await Repairing(judge).judge(question())
    assert (verdict.outcome, verdict.usage.dollars) == ("unparsed", 0.01)


async def test_a_paid_endpoint_that_tells_no_usage_is_billed_the_worst_case() -> None:
    asked = question()
    judge = load_judge("openai:x", base_url="http://localhost:9", price={"input": 1, "output": 2})
    assert isinstance(judge, SdkJudge)
    dollars = judge.read(Reply(text="ANSWER: A", usage=None), asked).usage.dollars
    assert dollars * 1e9 == pytest.approx(judge.quote(asked).worst_case)
    free = load_judge("openai:x", base_url="http://localhost:9")
    assert isinstance(free, SdkJudge)
    assert free.read(Reply(text="ANSWER: A", usage=None), asked).usage.dollars == 0


async def test_what_costs_nothing_is_never_blocked() -> None:
    ledger = Ledger(0.01)
    ledger.settle(0, 20_000_000)
    await ledger.reserve(0)
    with pytest.raises(BudgetExhausted):
        await ledger.reserve(1)


class FullDisk(MemoryStore):
    def put(self, key: str, payload: Payload, verdict: Verdict) -> None:
        raise sqlite3.OperationalError("database or disk is full")


def test_an_answer_that_cannot_be_kept_counts_all_the_same() -> None:
    cascade = Cascade(FakeScorer(), [Stage(judge=FakeJudge(), prompt=SELECT)], labels=NAMES, store=FullDisk())
    with pytest.warns(RuntimeWarning, match="disk is full"):
        (prediction,) = cascade.classify([noise(1)])
    assert prediction.decided_by == "judge"


def test_a_cache_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    from cascadevlm.judges.cache import DiskStore

    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be used"):
        DiskStore(tmp_path / "file").get("key")


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Scores(log_probs=np.array([[np.nan, 0]], dtype=np.float32), labels=LabelSet.of(["a", "b"]), fingerprint="x")


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        ("openai:gpt-4o", {"concurrency": 0}, "option 'concurrency'"),
        ("openai:gpt-4o", {"mode": "decisons"}, "'answer' or 'decision'"),
        ("openai:gpt-4o", {"detail": "hi"}, "option 'detail'"),
        ("openai:gpt-4o", {"requests_per_minute": 0}, "option 'requests_per_minute'"),
        ("anthropic:claude-sonnet-5-5", {"thinking": "on"}, "option 'thinking'"),
        ("hf_chat:aviary", {"batch_size": "many"}, "option 'batch_size'"),
        ("openai:gpt-4o", {"spec": "x"}, "no option 'spec'"),
    ],
)
def test_options_are_checked_before_anything_runs(spec: str, options: dict[str, str | int], sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        load_judge(spec, **options)


def test_an_address_without_a_scheme_is_refused() -> None:
    judge = load_judge("openai:llava", base_url="localhost:8000/v1")
    with pytest.raises(BackendError, match="not an address"):
        asyncio.run(judge.prepare())


async def test_text_of_a_repair_is_bounded() -> None:
    lengths: list[int] = []

    def huge(asked: Question) -> str:
        lengths.append(len(asked.rejected or ""))
        return "x" * 100_000 if len(lengths) == 1 else "ANSWER: A"

    await Repairing(FakeJudge(reply=huge)).judge(replace(question(), offer_none=False))
    assert lengths == [0, 4000]
