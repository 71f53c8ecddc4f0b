"""The ledger: concurrent questions, retries, repair questions and failures never exceed the limit."""

import asyncio
import json
import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tenacity import wait_none

from cascadevlm import Cascade, Stage, load_prompt
from cascadevlm.base.errors import (
    BudgetExhausted,
    CascadeError,
    DataError,
    FatalError,
    PermanentError,
    RateLimited,
    TransientError,
)
from cascadevlm.base.types import NANODOLLARS, Question, Usage, Verdict
from cascadevlm.judges.base import Judge, Quote, before_sending, verdict_from_text
from cascadevlm.judges.budget import DurableLedger, Ledger, Metered
from cascadevlm.judges.retry import Retrying
from cascadevlm.judges.voting import Repairing
from cascadevlm.testing import FakeJudge, FakeScorer, noise, question

SCHEDULES = 10_000
QUESTION = question()


class Till:
    """The amounts that providers really charged, in nanodollars, reported by the judges. Checks that no limit is exceeded."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.billed = 0
        self.most_committed = 0
        self.requests = 0
        self.waited = 0
        self._lock = threading.Lock()

    def bill(self, nanodollars: int) -> None:
        with self._lock:
            self.billed += nanodollars

    def look(self) -> None:
        with self.ledger._lock:
            committed = self.ledger._spent + self.ledger._reserved
        assert self.ledger.cap is not None
        assert committed <= self.ledger.cap
        assert self.ledger._reserved >= 0
        with self._lock:
            self.most_committed = max(self.most_committed, committed)
            self.requests += 1
            self.waited += bool(self.ledger._waiting)


class Gambler(Judge):
    """Answers, fails or gives an unreadable answer after a random time, and costs a random amount up to its worst case."""

    concurrency = 64

    def __init__(self, till: Till, worst: int, rng: random.Random, *, pause: float = 0) -> None:
        self.spec = "fake:gambler"
        self.till = till
        self.worst = worst
        self.rng = rng
        self.pause = pause

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=self.worst)

    async def judge(self, question: Question) -> Verdict:
        roll = self.rng.random
        try:
            for _ in range(int(roll() * 4)):
                self.till.look()
                await asyncio.sleep(self.pause)
        except asyncio.CancelledError:
            self.till.bill(self.worst)  # what is not known is counted as the most it can be
            raise
        self.till.look()
        fate = roll()
        if fate < 0.10:
            raise RateLimited("later")
        if fate < 0.20:
            raise TransientError("down")
        if fate < 0.25:
            self.till.bill(self.worst)
            raise TransientError("broke off", may_be_billed=True)
        if fate < 0.28:
            raise PermanentError("no")
        if fate < 0.30:
            raise FatalError("no key")
        spent = self.worst if fate < 0.5 else int(roll() * self.worst)
        self.till.bill(spent)
        usage = Usage(dollars=spent / NANODOLLARS, requests=1)
        return verdict_from_text("a sparrow" if fate > 0.9 else "ANSWER: A", question, judge=self.spec, usage=usage)


class Priced(FakeJudge):
    """Costs 100 nanodollars, and at most ``worst``."""

    def __init__(self, worst: int, *, reply: str | Exception = "ANSWER: A", seconds: float = 0) -> None:
        super().__init__(reply=reply, dollars=100 / NANODOLLARS, seconds=seconds)
        self.worst = worst

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=self.worst)


def careful(judge: Judge, ledger: Ledger) -> Judge:
    return Repairing(Retrying(Metered(judge, ledger), attempts=3, wait=wait_none()))


async def questions(judge: Judge, count: int, rng: random.Random) -> list[Verdict | BaseException]:
    """Ask this number of questions at the same time. Some callers stop waiting."""
    tasks = [asyncio.create_task(judge.judge(QUESTION)) for _ in range(count)]
    for task in tasks:
        if rng.random() < 0.1:
            await asyncio.sleep(0)
            task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def check_settled(till: Till, outcomes: list[Verdict | BaseException]) -> None:
    ledger = till.ledger
    assert ledger.cap is not None
    assert not [o for o in outcomes if isinstance(o, BaseException) and not isinstance(o, CascadeError | asyncio.CancelledError)]
    assert (ledger._reserved, ledger._waiting) == (0, [])
    assert till.billed == ledger._spent <= ledger.cap


async def one_schedule(seed: int) -> tuple[Till, list[Verdict | BaseException]]:
    rng = random.Random(seed)
    ledger = Ledger(rng.choice([0, 1e-9, 5e-6, 1e-3]) * rng.random())
    till = Till(ledger)
    worst = [int((ledger.cap or 0) * rng.choice([0, 0.05, 0.2, 0.6, 1, 1.1])) + 1 for _ in range(rng.randrange(1, 4))]
    judges = [careful(Gambler(till, most, rng), ledger) for most in worst]
    asked = await asyncio.gather(*(questions(judge, rng.randrange(1, 7), rng) for judge in judges))
    return till, [outcome for outcomes in asked for outcome in outcomes]


def test_no_schedule_overdraws_the_ledger() -> None:
    """Several judges share a ledger. Reservations never exceed the limit, and at the end, all billed amounts are counted."""

    async def run() -> dict[str, int]:
        seen = dict.fromkeys(["schedules", "requests", "answered", "exhausted", "cancelled", "waited", "filled"], 0)
        for seed in range(SCHEDULES):
            till, outcomes = await one_schedule(seed)
            check_settled(till, outcomes)
            seen["schedules"] += 1
            seen["requests"] += till.requests
            seen["answered"] += sum(isinstance(outcome, Verdict) for outcome in outcomes)
            seen["exhausted"] += sum(isinstance(outcome, BudgetExhausted) for outcome in outcomes)
            seen["cancelled"] += sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            seen["waited"] += till.waited > 0
            seen["filled"] += till.most_committed == till.ledger.cap
        return seen

    seen = asyncio.run(run())
    assert seen.pop("schedules") == SCHEDULES
    assert min(seen.values()) > SCHEDULES / 20, seen  # none of the fates is a rarity


def test_threads_share_a_ledger() -> None:
    """Four event loops, each in a thread, share one limit. The amounts are so large that they must wait for each other."""
    ledger = Ledger(2e-2)
    till = Till(ledger)

    def work(seed: int) -> list[Verdict | BaseException]:
        rng = random.Random(seed)

        async def rounds() -> list[Verdict | BaseException]:
            judge = careful(Gambler(till, 300_000, rng, pause=0.001), ledger)
            return [outcome for _ in range(20) for outcome in await questions(judge, 10, rng)]

        return asyncio.run(asyncio.wait_for(rounds(), 20))

    with ThreadPoolExecutor(4) as pool:
        outcomes = [outcome for outcomes in pool.map(work, range(4)) for outcome in outcomes]
    assert len(outcomes) == 800
    check_settled(till, outcomes)
    assert till.waited > 10
    assert sum(isinstance(outcome, Verdict) for outcome in outcomes) > 20
    assert sum(isinstance(outcome, BudgetExhausted) for outcome in outcomes) > 100


async def test_who_waits_is_woken_when_money_comes_back() -> None:
    ledger = Ledger(1e-6)
    await ledger.reserve(1000)
    waiting = [asyncio.create_task(ledger.reserve(amount)) for amount in (600, 400, 500)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    ledger.settle(1000, 0)
    await asyncio.wait_for(asyncio.gather(*waiting[:2]), 1)
    assert not waiting[2].done()
    ledger.settle(600, 600)
    ledger.settle(400, 100)
    with pytest.raises(BudgetExhausted, match=r"\$0\.0000 left"):
        await asyncio.wait_for(waiting[2], 1)
    assert (ledger.spent_dollars, ledger.reserved_dollars) == (700e-9, 0)


async def test_money_that_comes_back_in_another_loop_wakes_too() -> None:
    ledger = Ledger(1e-6)
    await ledger.reserve(1000)
    waiting = asyncio.create_task(ledger.reserve(900))
    await asyncio.sleep(0)
    await asyncio.to_thread(ledger.settle, 1000, 100)
    await asyncio.wait_for(waiting, 1)
    assert ledger._reserved == 900


def test_a_waiter_whose_loop_is_gone_does_not_stop_the_others() -> None:
    ledger = Ledger(1e-6)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ledger.reserve(500), 0.01)

    asyncio.run(ledger.reserve(1000))
    asyncio.run(give_up())
    ledger.settle(1000, 0)
    ledger.reserve_now(1000)


async def test_who_gives_up_waiting_leaves_nothing_locked() -> None:
    ledger = Ledger(1e-6)
    judge = Metered(Priced(600, seconds=0.03), ledger)
    first, second, third = (asyncio.create_task(judge.judge(QUESTION)) for _ in range(3))
    await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert second.cancelled()
    assert (first.result().label, third.result().label) == ("red finch", "red finch")
    assert (ledger._spent, ledger._reserved, ledger._waiting) == (200, 0, [])


async def test_a_request_that_is_given_up_counts_as_the_worst_case() -> None:
    ledger = Ledger(1e-6)
    task = asyncio.create_task(Metered(Priced(600, seconds=1), ledger).judge(QUESTION))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert (ledger._spent, ledger._reserved) == (600, 0)


@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (RateLimited("later"), 0),
        (PermanentError("no"), 0),
        (TransientError("down"), 0),
        (TransientError("broke off", may_be_billed=True), 600),
        (ValueError("a bug"), 600),
    ],
)
async def test_what_a_failure_costs(error: Exception, spent: int) -> None:
    ledger = Ledger(1e-6)
    with pytest.raises(type(error)):
        await Metered(Priced(600, reply=error), ledger).judge(QUESTION)
    assert (ledger._spent, ledger._reserved) == (spent, 0)


@pytest.mark.parametrize("dollars", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
async def test_a_bill_that_cannot_be_true_counts_as_the_worst_case(dollars: float) -> None:
    ledger = Ledger(1e-6)
    await Metered(FakeJudge(dollars=dollars), ledger).judge(QUESTION)
    judge = Priced(600)
    judge.dollars = dollars
    await Metered(judge, ledger).judge(QUESTION)
    assert (ledger._spent, ledger._reserved) == (600, 0)


@pytest.mark.parametrize(("reserved", "spent"), [(0, -5), (-5, 0), (0, 0.5)])
def test_no_line_of_a_ledger_lets_it_fall(reserved: int, spent: float, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [{"reserved": 0, "spent": 900}, {"reserved": reserved, "spent": spent}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 2, is damaged"):
        DurableLedger(1, path)


async def test_a_question_given_up_before_it_is_sent_costs_nothing() -> None:
    class Queueing(Priced):
        turn = asyncio.Lock()

        async def judge(self, question: Question) -> Verdict:
            with before_sending():
                await self.turn.acquire()
            try:
                return await super().judge(question)
            finally:
                self.turn.release()

    ledger, judge = Ledger(1e-5), Queueing(600, seconds=0.05)
    tasks = [asyncio.create_task(Metered(judge, ledger).judge(QUESTION)) for _ in range(5)]
    await asyncio.sleep(0.01)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [False] + [True] * 4
    assert (ledger._spent, ledger._reserved, len(judge.questions)) == (100, 0, 1)


async def test_what_a_question_that_is_given_up_costs_is_heard_for_a_moment() -> None:
    ledger = Ledger(1e-6)
    task = asyncio.create_task(Metered(Priced(600, seconds=0.05), ledger).judge(QUESTION))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (ledger._spent, ledger._reserved) == (100, 0)


def test_reserving_now_does_not_wait() -> None:
    ledger = Ledger(1e-6)
    ledger.reserve_now(700)
    with pytest.raises(BudgetExhausted):
        ledger.reserve_now(301)
    ledger.reserve_now(300)
    assert ledger.reserved_dollars == 1e-6


async def test_nobody_waits_for_a_standing_promise() -> None:
    ledger = Ledger(1e-6)
    ledger.reserve_now(700)
    await ledger.reserve(200)
    waiting = asyncio.create_task(ledger.reserve(300))
    await asyncio.sleep(0.01)
    assert not waiting.done()  # what is in flight may come back
    ledger.settle(200, 0)
    await asyncio.wait_for(waiting, 1)
    with pytest.raises(BudgetExhausted, match=r"\$0\.0000 left"):
        await asyncio.wait_for(ledger.reserve(301), 1)
    ledger.settle(700, 100, standing=True)
    await asyncio.wait_for(ledger.reserve(600), 1)
    assert (ledger._spent, ledger._reserved) == (100, 900)


async def test_without_a_cap_nothing_is_refused_and_all_is_counted() -> None:
    ledger = Ledger()
    judge = Metered(Priced(10**15), ledger)
    await asyncio.gather(*(judge.judge(QUESTION) for _ in range(10)))
    assert (ledger._spent, ledger._reserved) == (1000, 0)


BLACK = (0, 0, 0)
SCORER = FakeScorer(table={BLACK: [0, 1, 0.5]})


def cascade(judge: Judge, ledger: Ledger) -> Cascade:
    stage = Stage(judge=judge, prompt=load_prompt("select"))
    return Cascade(SCORER, [stage], labels=["red finch", "blue finch", "grey owl"], ledger=ledger, batch_size=4)


def images(count: int) -> Iterator[Image.Image]:
    """Images that all differ, and that are all black for the scorer."""
    for seed in range(count):
        image = noise(seed, (9, 9))
        image.putpixel((0, 0), BLACK)
        yield image


def test_when_the_money_is_gone_the_run_ends_with_the_scorers_answers() -> None:
    judge, ledger = Priced(100, reply="ANSWER: grey owl"), Ledger(700e-9)
    predictions = cascade(judge, ledger).classify(images(20))
    assert [(p.label, p.decided_by) for p in predictions].count(("grey owl", "judge")) == 7
    skipped = [p for p in predictions if p.decided_by == "scorer"]
    assert len(skipped) == 13
    for prediction in skipped:
        assert prediction.verdict is not None
        assert prediction.verdict.outcome == "skipped"
        assert "budget" in prediction.verdict.error
        assert (prediction.label, prediction.error, prediction.cost.dollars) == ("blue finch", "", 0)
    assert ledger.spent_dollars == 700e-9
    assert len(judge.questions) == 7


def test_a_judge_that_costs_nothing_is_never_blocked() -> None:
    ledger = Ledger(0)
    predictions = cascade(FakeJudge(reply="ANSWER: grey owl"), ledger).classify(images(20))
    assert [(p.label, p.decided_by) for p in predictions] == [("grey owl", "judge")] * 20
    priced = cascade(Priced(100, reply="ANSWER: grey owl"), ledger).classify(images(3))
    assert [p.decided_by for p in priced] == ["scorer"] * 3
    assert ledger.spent_dollars == 0
