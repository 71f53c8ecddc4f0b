"""The number of requests in flight, the requests per minute, and the time of retries."""

import asyncio
import time
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from tenacity import RetryCallState, wait_none

from cascadevlm.base.errors import PermanentError, RateLimited, TransientError
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.judges.pacing import Paced
from cascadevlm.judges.retry import Retrying, retry_after, wait_as_told
from cascadevlm.testing import FakeJudge, question

QUESTION = question()


class Clock:
    """Simulated time, which passes when all tasks wait: for an event loop and for ``time.monotonic``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 1000.0
        self._select = loop._selector.select  # type: ignore[attr-defined]

    def select(self, timeout: float | None) -> object:
        self.now += (timeout or 0) + 1e-9  # as real time: a limiter that is early by a rounding error asks again at once
        return self._select(0 if timeout is not None else None)

    def time(self) -> float:
        return self.now


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    monkeypatch.setattr(loop._selector, "select", clock.select)  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "time", clock.time)
    monkeypatch.setattr(time, "monotonic", clock.time)
    return clock


class Timed(FakeJudge):
    """Takes one second and records the times of its questions. A function of the number in flight gives the answer."""

    def __init__(self, clock: Clock, *, concurrency: int = 8, most: int = 1000, tokens: int = 0) -> None:
        super().__init__(seconds=1)
        self.clock = clock
        self.concurrency = concurrency
        self.most = most
        self.tokens = tokens
        self.asked: list[float] = []

    def quote(self, question: Question) -> Quote:
        return Quote(tokens=self.tokens)

    async def judge(self, question: Question) -> Verdict:
        self.asked.append(self.clock.now)
        if self._at_once >= self.most:
            await asyncio.sleep(0.05)
            raise RateLimited("too many at once")
        return await super().judge(question)


async def burst(judge: Judge, count: int) -> list[Verdict | BaseException]:
    return await asyncio.gather(*(judge.judge(QUESTION) for _ in range(count)), return_exceptions=True)


async def test_no_more_than_the_concurrency_are_in_flight(clock: Clock) -> None:
    judge = Timed(clock, concurrency=3)
    began = clock.now
    assert all(isinstance(verdict, Verdict) for verdict in await burst(Paced(judge), 12))
    assert judge.most_at_once == 3
    assert clock.now - began == pytest.approx(4, abs=0.1)


async def test_one_burst_of_refusals_halves_once(clock: Clock) -> None:
    judge = Timed(clock, concurrency=8, most=0)
    paced = Paced(judge)
    await burst(paced, 8)
    assert paced.limit == 4
    await asyncio.sleep(0.1)
    await burst(paced, 4)
    assert paced.limit == 2
    for _ in range(3):
        await asyncio.sleep(0.1)
        await burst(paced, 1)
    assert paced.limit == 1
    await asyncio.sleep(0.1)
    judge.most = 1000
    assert isinstance((await burst(paced, 1))[0], Verdict)  # one may always go


async def test_a_round_of_answers_adds_one_up_to_the_concurrency(clock: Clock) -> None:
    judge = Timed(clock, concurrency=5, most=0)
    paced = Paced(judge)
    for _ in range(3):
        await burst(paced, 1)
        await asyncio.sleep(0.1)
    assert paced.limit == 1
    judge.most = 1000
    limits = []
    for _ in range(6):
        await burst(paced, int(paced.limit))
        limits.append(paced.limit)
    assert all(1 / 2 < later - earlier <= 1 for earlier, later in zip([1, *limits], limits[:3], strict=False))
    assert limits[-1] == 5
    judge.most_at_once = 0
    await burst(paced, 20)
    assert judge.most_at_once == 5


async def test_other_failures_slow_nothing_down(clock: Clock) -> None:
    paced = Paced(FakeJudge(reply=TransientError("down")))
    await burst(paced, 20)
    assert paced.limit == 8
    assert paced._in_flight == 0


async def test_it_finds_what_the_provider_takes(clock: Clock) -> None:
    judge = Timed(clock, concurrency=32, most=6)
    patient = Retrying(Paced(judge), attempts=100, seconds=3600, wait=lambda _: 0.2)
    assert all(isinstance(verdict, Verdict) for verdict in await burst(patient, 200))
    refused = len(judge.asked) - len(judge.questions)
    assert len(judge.questions) == 200
    assert refused < 100  # with 32 in flight all the time: thousands


async def test_who_gives_up_waiting_frees_the_place(clock: Clock) -> None:
    judge = Timed(clock, concurrency=1)
    paced = Paced(judge)
    tasks = [asyncio.create_task(paced.judge(QUESTION)) for _ in range(4)]
    await asyncio.sleep(0.5)
    tasks[0].cancel()  # is being answered
    tasks[2].cancel()  # waits
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [task.cancelled() for task in tasks] == [True, False, True, False]
    assert paced._in_flight == 0


async def test_requests_a_minute(clock: Clock) -> None:
    judge = Timed(clock, concurrency=100)
    judge.requests_per_minute = 10
    await burst(Paced(judge), 40)
    check_rate(judge.asked, 1, per_minute=10)
    assert judge.asked[-1] - judge.asked[0] == pytest.approx(234, abs=2)  # one every six seconds


async def test_tokens_a_minute_by_worst_case(clock: Clock) -> None:
    judge = Timed(clock, concurrency=100, tokens=300)
    judge.tokens_per_minute = 3000
    await burst(Paced(judge), 40)
    check_rate(judge.asked, 300, per_minute=3000)
    assert judge.asked[-1] - judge.asked[0] == pytest.approx(234, abs=8)


async def test_a_question_larger_than_a_minutes_tokens_is_asked_all_the_same(clock: Clock) -> None:
    judge = Timed(clock, tokens=9000)
    judge.tokens_per_minute = 3000
    began = asyncio.get_running_loop().time()
    assert all(isinstance(verdict, Verdict) for verdict in await asyncio.wait_for(burst(Paced(judge), 3), 600))
    assert judge.asked[-1] - began == pytest.approx(540, abs=10)  # three minutes' worth each


def check_rate(times: list[float], amount: float, *, per_minute: float) -> None:
    """No period has more questions than the rate allows, plus a tenth of a minute at once and the last question."""
    for i, first in enumerate(times):
        for j, last in enumerate(times[i:], start=1):
            assert j * amount <= per_minute * (0.1 + (last - first) / 60) + amount + 1e-6


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "0"}, 0),
        ({"retry-after-ms": "-10"}, 0),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3),
        ({"retry-after-ms": "soon"}, None),
        ({"retry-after": "0"}, 0),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after": "Mon, 99 Foo 2026 00:00:00 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 -0000"}, 0),
        ({"retry-after": "1e400"}, None),
        ({"retry-after": "Thu, 01 Jan 99999999999 00:00:00 GMT"}, None),
        ({"other": "1"}, None),
    ],
)
def test_what_a_response_says_of_waiting(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5, minutes=30))])
def test_waiting_until_a_date(zone: timezone) -> None:
    seconds = retry_after({"retry-after": format_datetime(datetime.now(zone) + timedelta(seconds=90))})
    assert seconds is not None
    assert 88 < seconds <= 90


async def test_the_wait_is_what_the_response_said(clock: Clock) -> None:
    judge = Timed(clock)
    errors = iter([RateLimited("", retry_after=7), RateLimited("", retry_after=0.25), RateLimited("", retry_after=0)])
    judge.reply = lambda _: next(errors, "ANSWER: A")
    judge.seconds = 0
    await Retrying(judge).judge(QUESTION)
    waits = [later - earlier for earlier, later in zip(judge.asked, judge.asked[1:], strict=False)]
    assert waits == pytest.approx([7, 0.25, 0], abs=0.01)


async def test_without_a_word_the_wait_grows_and_is_not_the_same_for_all(clock: Clock) -> None:
    judge = FakeJudge(reply=TransientError("down"))
    waits: list[list[float]] = []
    for _ in range(50):
        waits.append([])

        def remember(state: RetryCallState) -> float:
            waits[-1].append(wait_as_told(state))
            return 0

        with pytest.raises(TransientError):
            await Retrying(judge, attempts=6, wait=remember).judge(QUESTION)
    by_attempt = [max(column) for column in zip(*waits, strict=True)]
    assert by_attempt[0] <= 1
    assert by_attempt[4] <= 16
    assert by_attempt[4] > 2 * by_attempt[0]
    assert len({round(first, 6) for first, *_ in waits}) > 40


@pytest.mark.parametrize("attempts", [1, 2, 5])
async def test_attempts_end(attempts: int) -> None:
    judge = FakeJudge(reply=TransientError("down"))
    with pytest.raises(TransientError, match="down"):
        await Retrying(judge, attempts=attempts, wait=wait_none()).judge(QUESTION)
    assert len(judge.questions) == attempts


async def test_time_ends_before_a_wait_that_would_be_too_long(clock: Clock) -> None:
    judge = Timed(clock)
    judge.reply = RateLimited("later", retry_after=40)
    began = clock.now
    with pytest.raises(RateLimited):
        await Retrying(judge, attempts=100, seconds=100).judge(QUESTION)
    assert [round(at - began) for at in judge.asked] == [0, 41, 82]
    assert clock.now - began < 100


async def test_waiting_for_a_turn_is_no_reason_to_give_up(clock: Clock) -> None:
    """Sixteen questions at two per minute: the last question is asked after eight minutes, fails once, and waits for the same
    time again.
    """
    judge = Timed(clock, concurrency=16)
    judge.requests_per_minute = 2
    failures = iter([TransientError("once")] * 16)
    judge.reply = lambda _: next(failures, "ANSWER: A")
    assert all(isinstance(verdict, Verdict) for verdict in await burst(Retrying(Paced(judge)), 16))
    assert len(judge.asked) == 32


async def test_a_permanent_error_is_raised_at_once(clock: Clock) -> None:
    judge = FakeJudge(reply=PermanentError("400"))
    began = clock.now
    with pytest.raises(PermanentError):
        await Retrying(judge).judge(QUESTION)
    assert len(judge.questions) == 1
    assert clock.now - began < 0.001
