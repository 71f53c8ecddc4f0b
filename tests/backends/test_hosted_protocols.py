"""What is sent through each protocol, and how answers are read: both providers' own clients against the loopback server."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from pydantic import JsonValue

from cascadevlm import load_prompt
from cascadevlm.budget import Ledger
from cascadevlm.cache import MemoryStore, key_of, question_payload
from cascadevlm.dependable import dependable
from cascadevlm.encoding import encode_image, size_within
from cascadevlm.hosted import HostedJudge
from cascadevlm.judge import Judge
from cascadevlm.testing import JudgeContract, noise, picture, question
from cascadevlm.testing.server import Conversation, Fault, JudgeServer
from cascadevlm.testing.server.conversation import read_request
from cascadevlm.types import Exemplar, Question
from tests.backends.hosted_judges import EITHER, EVERY, Make, cascade, chat, messages, no_waiting, responses

__all__ = ["no_waiting"]


class HostedContract(JudgeContract):
    """Against a server in a thread; the connections of all judges made are closed."""

    make_one: Make
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True)
    async def serve(self) -> AsyncIterator[None]:
        self.made: list[HostedJudge] = []
        with JudgeServer() as self.server:
            yield
            for judge in self.made:
                await judge.disconnect()

    def make(self) -> Judge:
        self.made.append(type(self).make_one(self.server, **self.options))
        return self.made[-1]


class TestChat(HostedContract):
    make_one = staticmethod(chat)


class TestChatUnstructured(HostedContract):
    make_one = staticmethod(chat)
    options: ClassVar[dict[str, object]] = {"structured": False}


class TestChatLogprobs(HostedContract):
    make_one = staticmethod(chat)
    options: ClassVar[dict[str, object]] = {"logprobs": True}


class TestResponses(HostedContract):
    make_one = staticmethod(responses)


class TestDecision(HostedContract):
    make_one = staticmethod(chat)
    options: ClassVar[dict[str, object]] = {"mode": "decision"}


class TestMessagesSchema(HostedContract):
    make_one = staticmethod(messages)


class TestMessagesTool(HostedContract):
    make_one = staticmethod(messages)
    options: ClassVar[dict[str, object]] = {"structured": "tool"}


class TestMessagesPlain(HostedContract):
    make_one = staticmethod(messages)
    options: ClassVar[dict[str, object]] = {"structured": "none"}


def last_body(server: JudgeServer) -> dict[str, JsonValue]:
    return dict(server.requests[-1].body)


def blue(asked: Conversation) -> str:
    """The blue finch, by the name or the key it is offered under."""
    key = next(key for key, name in asked.options.items() if name == "blue finch")
    return asked.say("blue finch" if "blue finch" in asked.choices else key)


WAYS: list[tuple[Make, dict[str, object], bool]] = [
    (chat, {}, False),
    (chat, {"structured": False}, False),
    (chat, {"logprobs": True}, True),
    (chat, {"logprobs": True, "structured": False}, True),
    (chat, {"mode": "decision"}, True),
    (responses, {}, False),
    (responses, {"structured": False}, False),
    (messages, {}, False),
    (messages, {"structured": "tool"}, False),
    (messages, {"structured": "none"}, False),
]


@pytest.mark.parametrize(("make", "options", "has_probabilities"), WAYS)
async def test_the_answer_given_is_the_one_read(make: Make, options: dict[str, object], has_probabilities: bool) -> None:
    async with JudgeServer(answer=blue) as server:
        judge = make(server, **options)
        verdict = await judge.judge(question())
        await judge.disconnect()
    assert (verdict.outcome, verdict.label) == ("answered", "blue finch")
    assert (verdict.usage.input_tokens, verdict.usage.output_tokens, verdict.usage.requests) == (1000, 20, 1)
    assert verdict.usage.dollars == pytest.approx(0.0012)
    assert 0 < verdict.usage.seconds < 10
    if has_probabilities:
        assert verdict.probabilities == pytest.approx({"red finch": 0.05, "blue finch": 0.9, "grey owl": 0.05})
    else:
        assert verdict.probabilities is None


@pytest.mark.parametrize(("make", "options", "has_probabilities"), WAYS)
async def test_none_of_these_is_an_answer(make: Make, options: dict[str, object], has_probabilities: bool) -> None:
    async with JudgeServer(answer=lambda asked: asked.say(asked.choices[-1])) as server:
        judge = make(server, **options)
        verdict = await judge.judge(replace(question(), offer_none=True))
        await judge.disconnect()
    assert (verdict.outcome, verdict.label) == ("none", None)


@EVERY
async def test_what_is_seen_comes_before_the_answer(make: Make) -> None:
    async with JudgeServer(answer=blue) as server:
        judge = make(server)
        verdict = await judge.judge(replace(question(), prompt=load_prompt("select_cot")))
        await judge.disconnect()
    assert (verdict.label, verdict.rationale) == ("blue finch", "As far as can be seen.")
    match read_request(server.requests[0]).schema:
        case {"properties": dict(fields)}:
            assert list(fields) == ["reasoning", "answer"]
        case schema:
            pytest.fail(f"{schema}")


@pytest.mark.parametrize("make", [chat, responses])
async def test_whether_schemas_are_understood_is_found_out_once(make: Make) -> None:
    for understands, requests in ((False, [2, 1, 1]), (True, [1, 1, 1])):
        async with JudgeServer(structured=understands) as server:
            judge = make(server, structured=None)
            seen = []
            for seed in range(3):
                before = len(server.requests)
                assert (await judge.judge(question(image=noise(seed)))).outcome == "answered"
                seen.append(len(server.requests) - before)
            await judge.disconnect()
        assert seen == requests
        assert (read_request(server.requests[-1]).schema is not None) == understands


async def test_a_bad_question_is_not_taken_for_a_server_without_schemas() -> None:
    async with JudgeServer(faults=[Fault("bad_request")] * 2) as server:
        judge = chat(server, structured=None)
        (first,) = await cascade(judge).aclassify([noise(1)])
        (second,) = await cascade(judge).aclassify([noise(2)])
    assert [p.verdict and p.verdict.outcome for p in (first, second)] == ["failed", "answered"]
    assert [read_request(request).schema is not None for request in server.requests] == [True, False, True]


def fewshot() -> Question:
    base = question()
    exemplars = tuple(Exemplar(image=noise(seed), label=label) for seed, label in enumerate(base.labels))
    return replace(base, prompt=load_prompt("select_fewshot"), exemplars=exemplars)


@EVERY
async def test_exemplars_are_shown_in_order_before_the_image(make: Make) -> None:
    asked = fewshot()
    async with JudgeServer() as server:
        judge = make(server)
        await judge.judge(asked)
        await judge.disconnect()
    received = read_request(server.requests[0])
    shown = [judge.encoded(exemplar) for exemplar in asked.exemplars] + [judge.encoded(asked)]
    assert received.images == [image.data for image in shown]
    text = "".join(received.texts)
    assert text.index("red finch") < text.index("blue finch") < text.index("grey owl")


@EVERY
async def test_what_is_sent_is_what_the_key_is_of(make: Make) -> None:
    asked = question(image=noise(7, (300, 300)))
    async with JudgeServer() as server:
        judge = make(server)
        await judge.judge(asked)
        await judge.disconnect()
    (sent,) = read_request(server.requests[0]).images
    assert sent == judge.encoded(asked).data
    assert question_payload(judge, asked)["image"] == judge.encoded(asked).digest
    other = replace(asked, image=noise(8, (300, 300)), encoded={})
    assert key_of(question_payload(judge, other)) != key_of(question_payload(judge, asked))


@EITHER
@pytest.mark.usefixtures("no_waiting")
async def test_an_image_is_encoded_and_hashed_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked about: retries, repair, the key, the worst case."""
    import hashlib

    counts = {"encoded": 0, "hashed": 0}

    def encode(*args: object) -> object:
        counts["encoded"] += 1
        return encode_image(*args)  # type: ignore[arg-type]

    def sha256(data: bytes) -> object:
        counts["hashed"] += 1
        return hashlib.sha256(data)

    monkeypatch.setattr("cascadevlm.hosted.encode_image", encode)
    monkeypatch.setattr("cascadevlm.encoding.hashlib", SimpleNamespace(sha256=sha256))
    faults = [Fault("server_error"), Fault("reset"), Fault("wrong_label"), Fault("unavailable")]
    async with JudgeServer(faults=faults) as server:
        judge = dependable(make(server), MemoryStore(), Ledger())
        await judge.prepare()
        asked = question()
        first, again = await judge.judge(asked), await judge.judge(asked)
        await judge.aclose()
    assert len(server.requests) == 5
    assert (first.outcome, again.usage.cached) == ("answered", True)
    assert counts == {"encoded": 1, "hashed": 1}


def sizes() -> Iterator[tuple[Image.Image, str, tuple[int, int]]]:
    """An image, the format it is sent in, and the longest sides for OpenAI and for Anthropic."""
    yield picture(size=(256, 256)), "PNG", (256, 256)
    yield picture(size=(257, 256)), "JPEG", (257, 257)
    yield picture(size=(3000, 1000)), "JPEG", (2048, 1568)
    yield picture(size=(1, 5000)), "PNG", (2048, 1568)
    yield picture(size=(1600, 1200)), "JPEG", (1600, 1568)


@EITHER
@pytest.mark.parametrize(("image", "kind", "longest"), [*sizes()])
async def test_images_are_shrunk_to_what_the_provider_takes(
    make: Make, image: Image.Image, kind: str, longest: tuple[int, int]
) -> None:
    async with JudgeServer() as server:
        judge = make(server)
        await judge.judge(question(image=image))
        await judge.disconnect()
    (sent,) = read_request(server.requests[0]).images
    received = Image.open(io.BytesIO(sent))
    assert received.format == kind
    assert max(received.size) == longest[make is messages]
    scale = max(received.size) / max(image.size)
    assert received.size == tuple(max(1, round(side * scale)) for side in image.size)
    assert f"image/{kind.lower()}" in str(server.requests[0].body)
    assert size_within(image.size, judge.limits) == received.size


def test_a_usual_price_is_told_by_the_size_alone() -> None:
    from cascadevlm_backends.openai import OpenAIJudge

    judge = OpenAIJudge("gpt-4o")
    small, large = (question(image=picture(size=size)) for size in ((200, 200), (3000, 3000)))
    tokens = judge.price.image and judge.price.image.tokens(2048, 2048) - judge.price.image.tokens(200, 200)
    assert tokens
    assert judge.usual_case(large) - judge.usual_case(small) == pytest.approx(tokens * judge.price.input * 1000, abs=1)
    assert small.encoded == large.encoded == {}


def test_bytes_are_limited_too() -> None:
    limits = messages(SimpleNamespace(anthropic_url="http://localhost"), structured="none").limits  # type: ignore[arg-type]
    small = encode_image(noise(1, (256, 256)), replace(limits, max_bytes=20_000))
    assert len(small.data) <= 20_000
    assert (small.width, small.height) == Image.open(io.BytesIO(small.data)).size
    assert small.width < 256


async def test_what_is_asked_of_chat_completions() -> None:
    headers = {"x-project": "birds"}
    options = {"detail": "low", "temperature": 0.25, "max_tokens": 77, "reasoning_effort": "high", "organization": "org-1"}
    async with JudgeServer() as server:
        judge = chat(server, headers=headers, **options)
        await judge.judge(question())
        await judge.disconnect()
    body, received = last_body(server), server.requests[0].headers
    wanted = {"temperature": 0.25, "max_tokens": 77, "reasoning_effort": "high", "model": "gpt-4o"}
    assert {name: body.get(name) for name in wanted} == wanted
    assert "'detail': 'low'" in str(body)
    assert (received["x-project"], received["openai-organization"]) == ("birds", "org-1")
    assert body["response_format"]["json_schema"]["strict"] is True  # type: ignore[index,call-overload]


async def test_what_is_asked_of_responses() -> None:
    async with JudgeServer() as server:
        judge = responses(server, detail="high", temperature=0.5, max_tokens=88, reasoning_effort="low")
        await judge.judge(question())
        await judge.disconnect()
    body = last_body(server)
    wanted = {"temperature": 0.5, "max_output_tokens": 88, "reasoning": {"effort": "low"}, "store": False}
    assert {name: body.get(name) for name in wanted} == wanted
    assert "'detail': 'high'" in str(body)


@pytest.mark.parametrize(
    ("thinking", "sent", "max_tokens"),
    [
        (2048, {"type": "enabled", "budget_tokens": 2048}, 2048),
        ("adaptive", {"type": "adaptive"}, 0),
        ("disabled", {"type": "disabled"}, 0),
        ("between_tools", {"type": "between_tools"}, 0),
        (None, None, 0),
    ],
)
async def test_thinking_as_claude_takes_it(thinking: object, sent: object, max_tokens: int) -> None:
    async with JudgeServer() as server:
        judge = messages(server, thinking=thinking, effort="medium", headers={"x-project": "birds"}, temperature=0.5)
        await judge.judge(question())
        await judge.disconnect()
    body = last_body(server)
    assert body.get("thinking") == sent
    longest_name = len("blue finch") // 4  # an answer has to have room for it
    assert body["max_tokens"] == max_tokens + question().prompt.max_tokens + longest_name
    assert body["output_config"]["effort"] == "medium"  # type: ignore[index,call-overload]
    assert body["temperature"] == 0.5
    assert server.requests[0].headers["x-project"] == "birds"


@pytest.mark.parametrize("cache_prompt", [True, False])
async def test_the_last_exemplar_marks_what_the_provider_may_keep(cache_prompt: bool) -> None:
    async with JudgeServer() as server:
        judge = messages(server, cache_prompt=cache_prompt)
        await judge.judge(fewshot())
        await judge.judge(question())
        await judge.disconnect()
    few, plain = (str(request.body) for request in server.requests)
    images = few.split("'type': 'image'")[1:]
    assert ["'cache_control': {'type': 'ephemeral'}" in image for image in images] == [False, False, cache_prompt, False]
    assert "cache_control" not in plain


async def test_with_nothing_said_nothing_is_sent() -> None:
    async with JudgeServer() as server:
        for make in (chat, responses, messages):
            judge = make(server)
            await judge.judge(question())
            await judge.disconnect()
            body = last_body(server)
            assert not {"temperature", "reasoning_effort", "reasoning", "thinking", "logprobs"} & set(body)
            assert "effort" not in str(body.get("output_config"))


async def test_an_endpoint_that_takes_no_notice_of_the_schema_is_not_given_it_again() -> None:
    async with JudgeServer(answer="ANSWER: B") as server:
        judge = chat(server, structured=None)
        verdicts = await asyncio.gather(*(judge.judge(question(image=noise(seed))) for seed in range(8)))
        await judge.disconnect()
    assert [verdict.outcome for verdict in verdicts] == ["answered"] * 8
    assert sorted("response_format" in request.body for request in server.requests) == [False] * 7 + [True]
