"""Checks before the first question: keys, prices, the switch against paid endpoints, connections and event loops."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import NoReturn

import anthropic
import httpx2
import openai
import pytest

from cascadevlm import Cascade, load_judge
from cascadevlm.base.errors import BackendError, FatalError, PermanentError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import NANODOLLARS, Usage
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.hosted.base import FIXED_TOKENS, input_bytes
from cascadevlm.judges.hosted.connection import LOCAL_ONLY
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.judges.pricing import FREE, find_price
from cascadevlm.testing import noise, question
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge
from tests.backends.hosted_judges import BILL, EITHER, EVERY, USAGE, Make, cascade, chat, images, no_waiting
from tests.server import Fault, JudgeServer, Received

__all__ = ["no_waiting"]

SPECS = ["openai:gpt-4o", "anthropic:claude-sonnet-5"]
BOTH = pytest.mark.parametrize("spec", SPECS)
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


def load(spec: str, **options: object) -> SdkJudge:
    judge = load_judge(spec, **options)  # type: ignore[arg-type]
    assert isinstance(judge, SdkJudge)
    return judge


def no_images() -> Iterator[ImageSource]:
    """Must not be read."""
    pytest.fail("an image was read before the run was known to be possible")
    yield noise(1)


class Trap:
    """A trap for every connection out of this process: attempts are recorded, and none succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[object] = []
        for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            monkeypatch.setattr(place, name, self._spring)
        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", self._spring)

    def _spring(self, *args: object, **_: object) -> NoReturn:
        self.tried.append(args)
        raise OSError("the trap")


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Trap:
    return Trap(monkeypatch)


@BOTH
def test_a_constructor_opens_nothing_and_needs_no_key(spec: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS[spec.partition(":")[0]], raising=False)
    judge = load(spec)
    assert judge.spec == spec
    assert dict(judge.identity())["judge"] == spec
    assert judge.quote(question()).worst_case > 0
    assert trap.tried == []


@BOTH
@pytest.mark.parametrize("variable", [None, "MY_KEY"])
def test_a_missing_key_is_said_before_any_image_is_read(
    spec: str, variable: str | None, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = variable or KEYS[spec.partition(":")[0]]
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(LOCAL_ONLY)
    judge = load(spec, **({"api_key_env": variable} if variable else {}))
    with pytest.raises(BackendError) as caught:
        cascade(judge).classify(no_images())
    assert str(caught.value) == f"{spec!r} needs a key. Set the environment variable {name}."
    assert trap.tried == []


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("openai:gpt-99", {}),
        ("anthropic:claude-99", {}),
        ("openai:gpt-4o", {"base_url": "https://example.org/v1"}),  # another's endpoint, another's prices
        ("anthropic:claude-sonnet-5", {"base_url": "https://api.anthropic.com.example.org"}),
    ],
)
def test_an_unknown_price_is_an_error_before_the_run(spec: str, options: dict[str, object], trap: Trap) -> None:
    with pytest.raises(BackendError, match=r"The price of .* is unknown\. Give options") as caught:
        cascade(load(spec, **options)).classify(no_images())
    assert (httpx2.URL(str(options["base_url"])).host in str(caught.value)) if options else True
    assert trap.tried == []


@pytest.mark.parametrize(
    ("price", "wrong"),
    [
        ({"input": -1}, "'input'"),
        ({"inptu": 1}, "'inptu'"),
        ({"image": {"rule": "cubes"}}, "'image'"),
        ({"batch_discount": 3}, "'batch_discount'"),
        ({"output": "much"}, "'output'"),
        (2.5, "2.5"),
    ],
)
@BOTH
def test_a_wrong_price_names_what_is_wrong(spec: str, price: object, wrong: str) -> None:
    with pytest.raises(BackendError) as caught:
        cascade(load(spec, price=price)).classify(no_images())
    assert wrong in str(caught.value)
    assert spec in str(caught.value)


@pytest.mark.parametrize("missing", ["input", "output"])
def test_a_price_of_ones_own_is_whole_where_the_table_has_none(missing: str) -> None:
    price = {"input": 1, "output": 2}
    assert load("openai:gpt-99", price=price).price.output == 2
    del price[missing]
    with pytest.raises(BackendError, match=missing):
        _ = load("openai:gpt-99", price=price).price


@BOTH
def test_a_price_of_ones_own_is_on_top_of_the_table(spec: str) -> None:
    provider, _, model = spec.partition(":")
    known, usage = find_price(provider, model), Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    assert known is not None
    mine = load(spec, price={"output": 1}).price
    assert (mine.input, mine.image) == (known.input, known.image)
    assert mine.output == 1
    assert mine.nanodollars(usage) == (known.input + 1) * NANODOLLARS < known.nanodollars(usage)


GEMINI = "https://generativelanguage.googleapis.com/v1beta/openai/"


def test_gemini_has_its_price_at_its_own_address() -> None:
    judge = load("openai:gemini-2.5-flash", base_url=GEMINI, api_key_env="GEMINI_API_KEY")
    assert judge.price == find_price("google", "gemini-2.5-flash")
    large = question(image=noise(1, (1024, 1024)))
    assert judge.most_tokens(large)[0] - input_bytes(large) == 2304 + FIXED_TOKENS
    for model, url in (("gemini-2.5-flash", "https://generativelanguage.googleapis.com.example.org"), ("gpt-4o", GEMINI)):
        with pytest.raises(BackendError, match="unknown"):
            _ = load(f"openai:{model}", base_url=url).price
    with pytest.raises(BackendError, match="unknown"):
        _ = load("openai:gemini-2.5-flash").price  # OpenAI does not have this model


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:80/v1"])
@BOTH
def test_this_machine_is_free_and_needs_no_key(spec: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS[spec.partition(":")[0]], raising=False)
    judge = load(spec, base_url=url)
    assert judge.price is FREE
    assert judge.quote(question()).worst_case == 0
    assert judge.api_key()


@pytest.mark.parametrize("url", ["http://localhost.example.org", "http://10.0.0.1", "http://127.0.0.1.nip.io"])
def test_what_only_looks_like_this_machine_is_not(url: str) -> None:
    with pytest.raises(BackendError, match="unknown"):
        _ = load("openai:gpt-4o", base_url=url).price


@EVERY
async def test_the_bill_follows_the_price(make: Make) -> None:
    spent = []
    async with JudgeServer(usage=USAGE) as server:
        for price in ({"input": 1, "output": 10}, {"input": 2, "output": 10}, 0, None):
            ledger = Ledger()
            (prediction,) = await cascade(make(server, price=price), ledger=ledger).aclassify([noise(1)])
            spent.append(ledger._spent)
            assert prediction.cost.dollars == pytest.approx(ledger.spent_dollars)
            assert prediction.cost.input_tokens == 300
    assert spent == [BILL, BILL + 300_000, 0, 0]


@EVERY
async def test_money_that_is_gone_stops_requests(make: Make) -> None:
    async with JudgeServer(usage=USAGE) as server:
        judge = make(server, concurrency=3)
        ledger = Ledger(5 * judge.quote(question()).worst_case / NANODOLLARS)
        predictions = await cascade(judge, ledger=ledger).aclassify(images(40))
    outcomes = [prediction.verdict.outcome for prediction in predictions if prediction.verdict]
    assert set(outcomes) == {"answered", "skipped"}
    assert outcomes.count("answered") == len(server.requests) > 5
    assert ledger.cap is not None
    assert ledger._spent == len(server.requests) * BILL <= ledger.cap
    assert ledger.cap - ledger._spent < 2 * judge.quote(question()).worst_case  # no more was left unused than a question may cost


def own_clients() -> list[SdkJudge]:
    elsewhere = "https://example.org/v1"
    gpt = [openai.AsyncOpenAI(api_key="k", base_url=url, max_retries=0) for url in (elsewhere, None)]
    claude = [anthropic.AsyncAnthropic(api_key="k", base_url=url, max_retries=0) for url in (elsewhere, None)]
    return [
        OpenAIJudge("gpt-4o", price=0, client=gpt[0]),
        AnthropicJudge("claude-sonnet-5", price=0, client=claude[0]),
        OpenAIJudge("gpt-4o", client=gpt[1]),
        AnthropicJudge("claude-sonnet-5", client=claude[1]),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.usefixtures("no_waiting")
def test_the_switch_keeps_everybody_on_this_machine(number: int, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS.values():
        monkeypatch.setenv(name, "k")
    own_client = own_clients()[number]
    without = load(SPECS[number % 2], **({"base_url": "https://example.org/v1", "price": 0} if number < 2 else {}))
    for judge in (own_client, without):
        with pytest.raises(BackendError, match=f"is not on this machine, and {LOCAL_ONLY} is set"):
            cascade(judge).classify(no_images())
        assert trap.tried == []
        monkeypatch.delenv(LOCAL_ONLY)  # the trap is one: without the switch it springs
        with pytest.raises(FatalError, match="the trap"):
            cascade(judge).classify([noise(1)])
        assert trap.tried
        trap.tried.clear()
        monkeypatch.setenv(LOCAL_ONLY, "1")


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_client_of_ones_own_is_used_and_left_open(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport answers in place of OpenAI, so the provider's own prices and parameters are used."""
    monkeypatch.delenv(LOCAL_ONLY)
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(400, json={"error": {"message": "no", "type": "invalid_request_error"}})

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as transport:
        client = openai.AsyncOpenAI(api_key="mine", http_client=transport, max_retries=0)
        judge = OpenAIJudge("gpt-4o", api=api, client=client, structured=True)  # type: ignore[arg-type]
        assert judge.price is find_price("openai", "gpt-4o")
        for _ in range(2):
            (prediction,) = await cascade(judge).aclassify([noise(1)])
            assert prediction.verdict is not None
            assert prediction.verdict.outcome == "failed"
        assert not transport.is_closed
    assert [request.url.host for request in sent] == ["api.openai.com"] * 2
    assert sent[0].headers["authorization"] == "Bearer mine"
    assert ("max_completion_tokens" in sent[0].content.decode()) == (api == "chat")


@EITHER
def test_one_event_loop_after_another(make: Make) -> None:
    with JudgeServer() as server:
        asking: Cascade = cascade(make(server))
        for seed in range(3):
            predictions = asyncio.run(asking.aclassify([noise(seed), noise(seed + 10)]))
            assert [prediction.decided_by for prediction in predictions] == ["judge"] * 2
        assert asking.classify(noise(99)).decided_by == "judge"
        assert len(server.requests) == 7


@EITHER
async def test_two_runs_at_once_share_the_connections(make: Make) -> None:
    """The run that ends first does not close the connections of the other run."""
    async with JudgeServer(latency=0.01) as server:
        asking = cascade(make(server, concurrency=2))
        short, long = await asyncio.gather(asking.aclassify(images(1)), asking.aclassify(images(12)[2:]))
        assert [prediction.decided_by for prediction in (*short, *long)] == ["judge"] * 11
        judge = asking.stages[0].judge
        assert isinstance(judge, SdkJudge)
        assert judge._connections.pop() is None


@EVERY
async def test_the_worst_case_of_an_unknown_model_is_that_of_tiles(make: Make) -> None:
    """LLaVA-NeXT needs 2,880 tokens for the smallest image. A model with a published rule needs the number of the rule."""
    async with JudgeServer() as server:
        rule = {"rule": "patches", "size": 16, "multiplier": 1, "most": 100}
        unknown, known = (make(server, price={"input": 1, "output": 1, "image": image}) for image in (None, rule))
        assert unknown.most_tokens(question())[0] - known.most_tokens(question())[0] > 2800


async def test_the_default_of_detail_is_left_out() -> None:
    """Some servers refuse unknown parameters."""

    def refuse(received: Received) -> Fault | None:
        return Fault("bad_request") if '"detail"' in json.dumps(received.body) else None

    async with JudgeServer(refuse=refuse) as server:
        plain, low = chat(server), chat(server, detail="low")
        assert (await plain.judge(question())).outcome == "answered"
        with pytest.raises(PermanentError):
            await low.judge(question())
        for judge in (plain, low):
            await judge.disconnect()
