"""Costs of hosted judges: possible and impossible reports, requests that were not sent, and requests that are not billed."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.judges.budget import Ledger, Metered
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.testing import question
from tests.backends.hosted_judges import BILL, EITHER, EVERY, USAGE, Make, cascade, chat, images, messages, no_waiting, responses
from tests.server import Fault, JudgeServer

__all__ = ["no_waiting"]

Json = Mapping[str, object]
QUESTION = question()

KEYS = {
    chat: ("prompt_tokens", "completion_tokens", "prompt_tokens_details"),
    responses: ("input_tokens", "output_tokens", "input_tokens_details"),
    messages: ("input_tokens", "output_tokens", ""),
}


def reporting(usage: object) -> Callable[[Json], Json]:
    return lambda reply: {**reply, "usage": usage}


def said(make: Make, into: object, out: object, *, cached: object = 0, written: object = 0) -> dict[str, object]:
    """A usage in the form of the protocol."""
    input_key, output_key, details = KEYS[make]
    if details:
        return {input_key: into, output_key: out, details: {"cached_tokens": cached, "cache_write_tokens": written}}
    return {input_key: into, output_key: out, "cache_read_input_tokens": cached, "cache_creation_input_tokens": written}


def without(usage: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in usage.items() if name != key}


COUNTS: st.SearchStrategy[object] = st.one_of(
    st.integers(-10, 400),
    st.sampled_from([None, True, "12", 1.5, float(10**300), -(10**12), 10**12, 10**400, [], {}]),
    st.floats(allow_nan=False, allow_infinity=False),
)
ANY_JSON = st.recursive(st.none() | st.booleans() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


@st.composite
def usages(draw: st.DrawFn, make: Make) -> object:
    usage = said(make, draw(COUNTS), draw(COUNTS), cached=draw(COUNTS), written=draw(COUNTS))
    left_out = draw(st.sets(st.sampled_from(sorted(usage)), max_size=2))
    return draw(st.just({name: value for name, value in usage.items() if name not in left_out}) | ANY_JSON)


class Till:
    """A server, judges that ask it, and an event loop for both."""

    def __init__(self, server: JudgeServer, runner: asyncio.Runner) -> None:
        self.server = server
        self.run = runner.run
        self.judges: dict[tuple[Make, str], SdkJudge] = {}

    def judge(self, make: Make, **options: object) -> SdkJudge:
        return self.judges.setdefault((make, repr(options)), make(self.server, **options))


@pytest.fixture(scope="module")
def till() -> Iterator[Till]:
    with JudgeServer(usage=USAGE) as server, asyncio.Runner() as runner:
        till = Till(server, runner)
        yield till
        for judge in till.judges.values():
            runner.run(judge.disconnect())


@EVERY
@given(st.data())
def test_no_report_lets_the_ledger_fall_or_pass_the_cap(till: Till, make: Make, data: st.DataObject) -> None:
    judge = till.judge(make)
    worst = judge.quote(QUESTION).worst_case
    ledger = Ledger(data.draw(st.integers(1, 4)) * worst / NANODOLLARS)
    assert ledger.cap is not None
    for usage in data.draw(st.lists(usages(make), min_size=1, max_size=4)):
        till.server.altered = reporting(usage)
        before = ledger._spent
        with suppress(BudgetExhausted):
            verdict = till.run(Metered(judge, ledger).judge(QUESTION))
            assert verdict.outcome == "answered"
            assert verdict.usage.dollars * NANODOLLARS == pytest.approx(ledger._spent - before)
            assert min(verdict.usage.input_tokens, verdict.usage.output_tokens) >= 0
            assert ledger._spent > before
        assert before <= ledger._spent <= ledger.cap
        assert ledger._reserved == 0


@EVERY
@given(st.integers(1, 300), st.integers(0, 20), st.data())
def test_a_truthful_report_is_the_bill(till: Till, make: Make, into: int, out: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, into))
    written = data.draw(st.integers(0, into - cached))
    price = {"input": 1, "output": 10, "cached_input": 0.1, "cache_write": 1.25}
    fresh = into - cached - written
    told = said(make, into if KEYS[make][2] else fresh, out, cached=cached, written=written)
    till.server.altered, ledger = reporting(told), Ledger()
    verdict = till.run(Metered(till.judge(make, price=price), ledger).judge(QUESTION))
    assert ledger._spent == 1000 * fresh + 100 * cached + 1250 * written + 10_000 * out
    assert (verdict.usage.input_tokens, verdict.usage.cached_input_tokens) == (into, cached)
    assert (verdict.usage.cache_write_tokens, verdict.usage.output_tokens) == (written, out)


UNTRUE: Mapping[str, Callable[[Make], object]] = {
    "negative input": lambda make: said(make, -500_000, 20),
    "negative output": lambda make: said(make, 100, -1),
    "more cached than read": lambda make: said(make, 100 if make is not messages else -1, 20, cached=5_000_000),
    "negative cached": lambda make: said(make, 100, 20, cached=-7),
    "fractional": lambda make: said(make, 100.5, 20),
    "null": lambda make: said(make, None, 20),
    "missing output": lambda make: without(said(make, 100, 20), KEYS[make][1]),
    "text": lambda make: said(make, "100", "20"),
    "absurd": lambda make: said(make, 10**12, 20),
    "nothing": lambda make: said(make, 0, 0),
    "no usage": lambda make: None,
    "a list": lambda make: [1, 2],
}


@EVERY
@pytest.mark.parametrize("kind", UNTRUE)
def test_what_cannot_be_true_counts_as_the_worst_case(till: Till, make: Make, kind: str) -> None:
    till.server.altered, ledger = reporting(UNTRUE[kind](make)), Ledger()
    judge = till.judge(make)
    assert till.run(Metered(judge, ledger).judge(QUESTION)).outcome == "answered"
    assert ledger._spent == judge.quote(QUESTION).worst_case
    free = till.run(Metered(till.judge(make, price=0), ledger).judge(QUESTION))
    assert (free.outcome, free.usage.dollars) == ("answered", 0)
    assert 0 <= free.usage.input_tokens < 1_000_000


UPSTREAM: Json = {"id": "g1", "error": {"message": "Upstream error: temporarily overloaded", "code": 502}}


@EVERY
@pytest.mark.usefixtures("no_waiting")
async def test_an_error_in_a_body_of_status_200_is_not_booked(make: Make) -> None:
    async with JudgeServer(usage=USAGE, altered=lambda reply: UPSTREAM) as server:
        ledger = Ledger(1)
        (prediction,) = await cascade(make(server), ledger=ledger).aclassify(images(1))
    assert prediction.verdict is not None
    assert prediction.verdict.outcome == "failed"
    assert (ledger._spent, ledger._reserved) == (0, 0)


async def test_an_answer_without_a_message_is_paid_for_once() -> None:
    """One reservation covers the search for the right form. After a request that may be billed, no second form is tried."""

    def silenced(reply: Json) -> Json:
        return {**reply, "choices": [{"index": 0, "finish_reason": "stop", "message": None}]}

    async with JudgeServer(usage=USAGE, altered=silenced) as server:
        judge, ledger = chat(server, structured=None), Ledger()
        with suppress(JudgeError):
            await Metered(judge, ledger).judge(QUESTION)
        assert len(server.requests) == 1
        assert ledger._spent >= BILL
        await judge.disconnect()


@pytest.mark.parametrize("structured", [None, True])
async def test_a_wrong_key_costs_nothing_however_many_questions_were_on_their_way(structured: bool | None) -> None:
    """Neither the questions that waited for the first question, nor the questions that were in flight at the same time."""
    async with JudgeServer(usage=USAGE, latency=0.06, faults=lambda _: Fault("unauthorized")) as server:
        ledger = Ledger(1)
        for seed in range(3):
            with pytest.raises(FatalError):
                await cascade(chat(server, structured=structured), ledger=ledger).aclassify(images(12)[seed:])
    assert len(server.requests) in (3, 4, 5, 6)
    assert (ledger._spent, ledger._reserved) == (0, 0)


@EITHER
async def test_a_wrong_key_leaves_the_money_for_the_right_one(make: Make) -> None:
    wrong = True
    async with JudgeServer(usage=USAGE, faults=lambda _: Fault("unauthorized") if wrong else None) as server:
        judge = make(server)
        ledger = Ledger(12 * judge.quote(QUESTION).worst_case / NANODOLLARS)
        for _ in range(3):
            with pytest.raises(FatalError):
                await cascade(judge, ledger=ledger).aclassify(images(12))
        wrong = False
        predictions = await cascade(judge, ledger=ledger).aclassify(images(12))
    assert [prediction.decided_by for prediction in predictions] == ["judge"] * 12
    assert ledger._spent == 12 * BILL


@EVERY
async def test_the_worst_case_holds_the_names_of_a_schema(make: Make) -> None:
    """Names are sent twice: in the question and in the schema."""
    asked = question([f"{letter * 400} finch" for letter in "abcdefghijkl"])
    async with JudgeServer(usage=USAGE) as server:
        judge = make(server)
        await judge.judge(asked)
        await judge.disconnect()
        (received,) = server.requests
    sent = len(json.dumps(received.body).encode()) - len(judge.encoded(asked).base64)
    assert sent > 2 * 12 * 400
    assert judge.most_tokens(asked)[0] >= sent


@EVERY
async def test_the_worst_case_holds_the_names_of_a_schema_in_ascii(make: Make) -> None:
    """An endpoint may read the schema with escape sequences in place of letters: six bytes instead of two."""
    names = [letter * 400 for letter in "éèêëàâäôöùûü"]
    async with JudgeServer() as server:
        most, _ = make(server).most_tokens(question(names))
    assert most >= sum(len(name.encode()) + len(json.dumps(name)) for name in names)


async def test_thoughts_that_only_the_total_counts_are_paid_for() -> None:
    """Gemini's endpoint for OpenAI's protocol reports completion tokens without thoughts, and total tokens with thoughts."""
    usage: JsonValue = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 340}
    message: JsonValue = {"role": "assistant", "content": "ANSWER: red finch"}
    body: JsonValue = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "usage": usage,
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
    async with JudgeServer(faults=[Fault("body", body=body)]) as server:
        judge = chat(server, structured=False)
        verdict = await judge.judge(question())
        await judge.disconnect()
    assert (verdict.usage.input_tokens, verdict.usage.output_tokens) == (300, 40)
    assert verdict.usage.dollars * NANODOLLARS == pytest.approx(300 * 1_000 + 40 * 10_000)
