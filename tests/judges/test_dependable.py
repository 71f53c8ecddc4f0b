"""Judges between runs: their rates, their open questions, and the time when they are closed."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cascadevlm import Cascade, Prediction, Stage, load_prompt
from cascadevlm.base.errors import BackendError
from cascadevlm.base.types import NANODOLLARS, Question, Verdict
from cascadevlm.judges.base import Judge, Quote, WrapperJudge
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.testing import FakeJudge, FakeScorer, noise

LABELS = ["red finch", "blue finch", "grey owl"]
SELECT = load_prompt("select")


class Timed(FakeJudge):
    """Accepts twenty requests per second, and records their times."""

    requests_per_minute = 1200.0

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    async def judge(self, question: Question) -> Verdict:
        self.asked.append(time.monotonic())
        return await super().judge(question)

    def assert_paced(self, count: int) -> None:
        assert len(self.asked) == count
        assert self.asked[-1] - self.asked[0] > 0.045 * (count - 1)


def cascade(*judges: Judge, **options: object) -> Cascade:
    stages = [Stage(judge=judge, prompt=SELECT) for judge in judges]
    return Cascade(FakeScorer(), stages, labels=LABELS, **options)  # type: ignore[arg-type]


def test_a_rate_holds_over_runs_one_after_another() -> None:
    judge = Timed()
    classifier = cascade(judge)
    for number in range(8):
        classifier.classify(noise(number))
    judge.assert_paced(8)


async def test_a_rate_holds_over_runs_at_the_same_time() -> None:
    judge = Timed()
    classifier = cascade(judge)
    await asyncio.gather(*(classifier.aclassify([noise(10 * run + number) for number in range(4)]) for run in range(3)))
    judge.assert_paced(12)


def test_a_rate_holds_over_the_stages_of_one_judge() -> None:
    judge = Timed()
    classifier = cascade(judge, judge)
    classifier.stages = (classifier.stages[0], replace(classifier.stages[1], prompt=load_prompt("select_cot")))
    classifier.classify([noise(number) for number in range(5)])
    judge.assert_paced(10)


def test_threads_that_ask_the_same_ask_it_once() -> None:
    judge = FakeJudge(seconds=0.2, dollars=0.01)
    classifier = cascade(judge, store=MemoryStore())
    with ThreadPoolExecutor(10) as pool:
        predictions = list(pool.map(lambda _: classifier.classify(noise(1)), range(10)))
    assert len(judge.questions) == 1
    assert sum(each.cost.dollars for each in predictions) == pytest.approx(classifier.ledger.spent_dollars) == 0.01


def test_one_event_loop_after_another_and_at_once() -> None:
    judge = FakeJudge(seconds=0.01)
    judge.requests_per_minute = 60_000.0
    classifier = cascade(judge)

    def asked(seed: int) -> list[Prediction]:
        return asyncio.run(classifier.aclassify([noise(seed + number) for number in range(4)]))

    with ThreadPoolExecutor(3) as pool:
        for predictions in [asked(0), asked(10), classifier.classify([noise(20)]), *pool.map(asked, (30, 40, 50))]:
            assert {each.verdict and each.verdict.outcome for each in predictions} == {"answered"}


class Kept(FakeJudge):
    """Records its calls. It must be prepared before it is asked."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__(seconds=0.01)
        self.broken = broken
        self.done: list[str] = []

    async def prepare(self) -> None:
        self.done.append("prepare")
        await asyncio.sleep(0.01)
        if self.broken:
            raise BackendError("It needs a key.")

    async def aclose(self) -> None:
        self.done.append("aclose")

    async def judge(self, question: Question) -> Verdict:
        assert self.done[-1] == "prepare"
        return await super().judge(question)


async def test_a_judge_is_made_ready_by_the_first_run_and_let_go_of_by_the_last() -> None:
    judge = Kept()
    classifier = cascade(judge, judge)
    await asyncio.gather(*(classifier.aclassify([noise(number) for number in range(run + 1)]) for run in range(4)))
    assert judge.done == ["prepare", "aclose"]
    await classifier.aclassify(noise(9))
    assert judge.done == ["prepare", "aclose"] * 2


async def test_a_judge_that_cannot_work_is_let_go_of_by_all() -> None:
    judge = Kept(broken=True)
    classifier = cascade(judge)
    failures = await asyncio.gather(*(classifier.aclassify(noise(run)) for run in range(2)), return_exceptions=True)
    assert [str(failure) for failure in failures] == ["It needs a key."] * 2
    assert judge.done == ["prepare", "aclose"] * 2


def test_another_ledger_or_store_holds_from_the_next_run_on() -> None:
    judge = FakeJudge(dollars=0.01)
    classifier = cascade(judge)
    classifier.classify(noise(1))
    classifier.ledger, classifier.store = Ledger(1), MemoryStore()
    classifier.classify([noise(1), noise(1)])
    classifier.classify(noise(1))
    assert classifier.ledger.spent_dollars == 0.01
    assert len(judge.questions) == 2


class Replaying(FakeJudge):
    replays = True


class AskingElsewhere(WrapperJudge):
    """Asks a judge that costs money if the wrapped judge has no answer."""

    costs_money = True

    def __init__(self, wrapped: Judge) -> None:
        super().__init__(wrapped)
        self.paid = FakeJudge(dollars=0.01)

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=NANODOLLARS // 100)

    async def judge(self, question: Question) -> Verdict:
        return await self.paid.judge(question)


def test_what_is_around_a_judge_that_replays_is_paid_for_and_kept() -> None:
    judge, store, ledger = AskingElsewhere(Replaying()), MemoryStore(), Ledger(0.02)
    predictions = cascade(judge, store=store, ledger=ledger).classify([noise(number) for number in range(5)])
    assert [prediction.verdict.outcome for prediction in predictions if prediction.verdict].count("answered") == 2
    assert (len(judge.paid.questions), len(store.verdicts)) == (2, 2)
    assert ledger.spent_dollars == pytest.approx(0.02)
