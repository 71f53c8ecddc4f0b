"""Requests and answers of each protocol, with the clients of both providers and the loopback server."""

import asyncio
import io
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from pydantic import JsonValue

from cascadevlm import load_prompt
from cascadevlm.base.encoding import encode_image, size_within
from cascadevlm.base.errors import FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.base.types import Exemplar, Question, Verdict
from cascadevlm.judges import prompt
from cascadevlm.judges.base import Judge
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, key_of, question_payload
from cascadevlm.judges.dependable import dependable
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.testing import JudgeContract, noise, picture, question
from tests.backends.hosted_judges import BILL, EITHER, EVERY, USAGE, Make, cascade, chat, messages, no_waiting, responses
from tests.server import Conversation, Fault, JudgeServer, Received
from tests.server.conversation import read_request

__all__ = ["no_waiting"]


class HostedContract(JudgeContract):
    """A server in a thread. The connections of all judges are closed at the end."""

    make_one: Make
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True)
    async def serve(self) -> AsyncIterator[None]:
        self.made: list[SdkJudge] = []
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
    """The blue finch, by its name or its key in the question."""
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
async def test_an_image_is_encoded_and_hashed_once_and_a_question_rendered_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key, the quote, every request and the check of its usage share these values. A repair question is a separate
    question.
    """
    import hashlib

    counts = {"encoded": 0, "hashed": 0, "filled": 0, "lettered": 0}
    fill, schemes = prompt._fill, prompt._key_schemes

    def filled(*args: object) -> object:
        counts["filled"] += 1
        return fill(*args)  # type: ignore[arg-type]

    def lettered(length: int) -> object:
        counts["lettered"] += 1
        return schemes(length)

    def encode(*args: object) -> object:
        counts["encoded"] += 1
        return encode_image(*args)  # type: ignore[arg-type]

    def sha256(data: bytes) -> object:
        counts["hashed"] += 1
        return hashlib.sha256(data)

    monkeypatch.setattr(prompt, "_fill", filled)
    monkeypatch.setattr(prompt, "_key_schemes", lettered)
    monkeypatch.setattr("cascadevlm.judges.hosted.base.encode_image", encode)
    monkeypatch.setattr("cascadevlm.base.encoding.hashlib", SimpleNamespace(sha256=sha256))
    faults = [Fault("server_error"), Fault("reset"), Fault("wrong_label"), Fault("unavailable")]
    async with JudgeServer(faults=faults) as server:
        judge = dependable(make(server), MemoryStore(), Ledger())
        await judge.prepare()
        asked = question()
        first, again = await judge.judge(asked), await judge.judge(asked)
        await judge.aclose()
    assert len(server.requests) == 5
    assert (first.outcome, again.usage.cached) == ("answered", True)
    assert counts == {"encoded": 1, "hashed": 1, "filled": 3, "lettered": 2}  # the repair shows the question again


def sizes() -> Iterator[tuple[Image.Image, str, tuple[int, int]]]:
    """An image, the format in which it is sent, and the longest sides for OpenAI and for Anthropic."""
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
    more = judge.quote(large).usual_case - judge.quote(small).usual_case
    assert more == pytest.approx(tokens * judge.price.input * 1000, abs=1)
    assert small.encoded == large.encoded == {}


def test_bytes_are_limited_too() -> None:
    limits = messages(SimpleNamespace(anthropic_url="http://localhost"), structured="none").limits  # type: ignore[arg-type]
    small = encode_image(noise(1, (256, 256)), replace(limits, max_bytes=20_000))
    assert len(small.data) <= 20_000
    assert (small.width, small.height) == Image.open(io.BytesIO(small.data)).size
    assert small.width < 256


async def test_what_is_asked_of_chat_completions() -> None:
    headers = {"x-project": "birds"}
    options = {"detail": "low", "temperature": 0.25, "max_tokens": 77, "reasoning_effort": "high"}
    async with JudgeServer() as server:
        judge = chat(server, headers=headers, **options)
        await judge.judge(question())
        await judge.disconnect()
    body, received = last_body(server), server.requests[0].headers
    wanted = {"temperature": 0.25, "max_tokens": 77, "reasoning_effort": "high", "model": "gpt-4o"}
    assert {name: body.get(name) for name in wanted} == wanted
    assert "'detail': 'low'" in str(body)
    assert received["x-project"] == "birds"
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


def completion(choice: dict[str, JsonValue], **fields: JsonValue) -> Fault:
    """A chat completion in the form of another server."""
    usage: JsonValue = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choice = {"index": 0, "finish_reason": "stop", **choice}
    return Fault("body", body={"id": "r", "object": "chat.completion", "choices": [choice], "usage": usage, **fields})


def said(content: JsonValue, **fields: JsonValue) -> Fault:
    return completion({"message": {"role": "assistant", "content": content, **fields}})


async def asked_once(fault: Fault, **options: object) -> Verdict:
    async with JudgeServer(faults=[fault]) as server:
        judge = chat(server, **{"structured": False, **options})
        try:
            return await judge.judge(question())
        finally:
            await judge.disconnect()


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ([{"type": "text", "text": "ANSWER: B"}], "blue finch"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "ANSWER: A"}]}, {"type": "text", "text": "ANSWER: B"}],
            "blue finch",
        ),
        ([{"type": "text", "text": "It is blue."}, {"type": "text", "text": "ANSWER: B"}], "blue finch"),
        ([{"type": "reasoning", "text": "ANSWER: A\nno, wait"}, {"type": "output_text", "text": "B"}], "blue finch"),
        (["ANSWER:", " B"], "blue finch"),
        ([{"type": "thinking", "thinking": "ANSWER: A\nno, wait"}], None),
        ([{"type": "audio", "id": "x"}, 7, None], None),
        ([], None),
        ({"text": "B"}, None),
    ],
)
async def test_content_in_parts(content: JsonValue, label: str | None) -> None:
    verdict = await asked_once(said(content))
    assert (verdict.outcome, verdict.label) == ("answered" if label else "unparsed", label)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("thoughts", "label"),
    [
        ("It is blue.\n\nANSWER: B", "blue finch"),
        ('It is blue.\n{"answer": "B"}\n', "blue finch"),
        ("Perhaps\nANSWER: B\nno, the bars rule that out.", None),
        ("I think\nblue finch", None),
        ("ANSWER: B or C", None),
    ],
)
async def test_an_answer_that_a_server_took_for_thoughts(field: str, thoughts: str, label: str | None) -> None:
    for content in (None, "", "\n"):
        verdict = await asked_once(said(content, **{field: thoughts}))
        assert (verdict.outcome, verdict.label) == ("answered" if label else "unparsed", label)
        assert label or "thoughts" in verdict.error or verdict.text
    assert (await asked_once(said("ANSWER: C", **{field: thoughts}))).label == "grey owl"
    assert (await asked_once(said(""))).error == "The answer is empty."


async def test_thoughts_of_claude_are_no_answer() -> None:
    thinking: JsonValue = {"type": "thinking", "thinking": "ANSWER: A\nno", "signature": "s"}
    usage: JsonValue = {"input_tokens": 10, "output_tokens": 5}
    for content, outcome in (
        ([thinking, {"type": "text", "text": "ANSWER: B"}], "answered"),
        ([None, {"type": "text", "text": "ANSWER: B"}], "answered"),
        ([thinking], "unparsed"),
        ("B", "answered"),
    ):
        body: JsonValue = {"type": "message", "role": "assistant", "content": content, "stop_reason": "end_turn", "usage": usage}  # type: ignore[dict-item]
        async with JudgeServer(faults=[Fault("body", body=body)]) as server:
            judge = messages(server)
            verdict = await judge.judge(question())
            await judge.disconnect()
        assert (verdict.outcome, verdict.label) == (outcome, "blue finch" if outcome == "answered" else None)


@pytest.mark.parametrize("choice", [{"message": {"content": ""}}, {"message": None}])
async def test_an_answer_that_ended_in_an_error_may_be_asked_again(choice: dict[str, JsonValue]) -> None:
    errors: list[JsonValue] = [
        {"code": 502, "message": "Provider returned error"},
        {"code": "rate_limit_exceeded", "message": "Provider busy"},
    ]
    for error in errors:
        with pytest.raises(JudgeError, match="Provider ") as caught:
            await asked_once(completion({**choice, "finish_reason": "error", "error": error}))
        assert (caught.value.retryable, caught.value.may_be_billed) == (True, False)
        with pytest.raises(JudgeError, match="Provider ") as caught:
            await asked_once(completion({**choice, "finish_reason": None, "error": error}))
        assert (caught.value.retryable, caught.value.may_be_billed) == (True, False)
    with pytest.raises(FatalError, match="No credits"):
        await asked_once(completion({**choice, "finish_reason": "error", "error": {"code": 402, "message": "No credits"}}))


async def test_a_failed_response_is_judged_by_its_error() -> None:
    for code, kind in (
        ("server_error", TransientError),
        ("rate_limit_exceeded", RateLimited),
        ("insufficient_quota", FatalError),
    ):
        body: JsonValue = {"id": "r", "status": "failed", "error": {"code": code, "message": "Something."}, "output": []}
        async with JudgeServer(faults=[Fault("body", body=body)]) as server:
            judge = responses(server)
            with pytest.raises(kind, match=r"Something\."):
                await judge.judge(question())
            await judge.disconnect()


def refusing(status: int, message: str, *names: str) -> Callable[[Received], Fault | None]:
    """Refuses requests that have one of the parameters."""
    fault = Fault("body", status=status, body={"error": {"message": message, "type": "invalid_request_error"}})
    return lambda received: fault if set(names) & set(received.body) else None


LIMIT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
NEWER = "Unrecognized request argument supplied: max_completion_tokens"
SCHEMA = "response_format json_schema is not supported"
OUTPUT = "output_config.format: this model does not support structured outputs"


def both(received: Received) -> Fault | None:
    return refusing(400, LIMIT, "max_tokens")(received) or refusing(500, SCHEMA, "response_format")(received)


@pytest.mark.parametrize(
    ("make", "refuse", "refused"),
    [
        (chat, refusing(400, LIMIT, "max_tokens"), 1),
        (chat, refusing(422, LIMIT, "max_tokens"), 1),
        (chat, refusing(500, SCHEMA, "response_format"), 1),
        (chat, refusing(400, "no", "response_format"), 1),
        (chat, refusing(400, "`max_tokens` is deprecated, use `max_completion_tokens`", "max_tokens"), 1),
        (chat, refusing(404, "No endpoints found that can handle the requested parameters.", "response_format"), 1),
        (chat, refusing(400, "The model 'x' is not available for structured outputs", "response_format"), 1),
        (chat, refusing(403, "Structured outputs are not enabled for your account", "response_format"), 1),
        (chat, both, 2),
        (responses, refusing(400, "Unknown parameter: 'text.format'", "text"), 1),
        (messages, refusing(400, OUTPUT, "output_config"), 1),
        (messages, refusing(500, "structured outputs: not implemented", "output_config"), 1),
        (messages, refusing(400, "'x' does not support output format.", "output_config"), 1),
    ],
)
async def test_what_an_endpoint_does_not_take_is_found_out_once(
    make: Make, refuse: Callable[[Received], Fault | None], refused: int
) -> None:
    ledger = Ledger()
    async with JudgeServer(refuse=refuse, usage=USAGE, latency=0.01) as server:
        judge = make(server, **({} if make is messages else {"structured": None}))
        predictions = await cascade(judge, ledger=ledger).aclassify([noise(seed) for seed in range(24)])
    assert [p.verdict and p.verdict.outcome for p in predictions] == ["answered"] * 24
    assert len(server.requests) == 24 + refused
    assert ledger._spent == 24 * BILL


async def test_the_older_name_of_the_limit_is_found_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascadevlm.judges.hosted.base.HostedJudge.is_own_endpoint", True)
    async with JudgeServer(refuse=refusing(400, NEWER, "max_completion_tokens")) as server:
        judge = chat(server, price=0)
        assert (await judge.judge(question())).outcome == "answered"
        await judge.disconnect()
    assert ["max_tokens" in request.body for request in server.requests] == [False, True]


async def test_a_schema_asked_for_is_not_left_out() -> None:
    async with JudgeServer(refuse=refusing(400, SCHEMA, "response_format")) as server:
        judge = chat(server, structured=True)
        with pytest.raises(PermanentError, match="not supported"):
            await judge.judge(question())
        await judge.disconnect()
    assert len(server.requests) == 1


async def test_a_schema_that_works_is_left_out_only_where_it_must_be() -> None:
    too_long = Fault("body", status=400, body={"error": {"message": "Invalid schema: the enum is too long"}})
    async with JudgeServer(faults=[None, too_long]) as server:
        judge = chat(server, structured=None)
        for seed in range(3):
            assert (await judge.judge(question(image=noise(seed)))).outcome == "answered"
        await judge.disconnect()
    assert [read_request(request).schema is not None for request in server.requests] == [True, True, False, True]


async def test_two_parameters_that_are_both_refused_are_tried_once_each() -> None:
    async with JudgeServer(refuse=refusing(400, LIMIT, "max_tokens", "max_completion_tokens")) as server:
        judge = chat(server)
        with pytest.raises(PermanentError, match="max_tokens"):
            await judge.judge(question())
        await judge.disconnect()
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "first", [Fault("empty"), Fault("length"), Fault("refusal"), Fault("server_error"), said(None, reasoning="x")]
)
@pytest.mark.usefixtures("no_waiting")
async def test_a_first_answer_that_tells_nothing_does_not_hold_up_the_others(first: Fault) -> None:
    """Such an answer does not show whether the endpoint accepts schemas."""
    async with JudgeServer(faults=[first], latency=0.05) as server:
        judge = chat(server, structured=None)
        await cascade(judge).aclassify([noise(seed) for seed in range(24)])
    assert server.most_at_once > 8
    assert all("response_format" in request.body for request in server.requests)


@EITHER
async def test_a_first_question_that_hangs_does_not_hold_up_the_others_for_long(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascadevlm.judges.hosted.base.FIRST_ALONE_SECONDS", 0.05)
    async with JudgeServer(faults=[Fault("slow", seconds=30)]) as server:
        judge = make(server)
        first = asyncio.create_task(judge.judge(question()))
        await asyncio.sleep(0.01)
        others = [judge.judge(question(image=noise(seed))) for seed in range(8)]
        verdicts = await asyncio.wait_for(asyncio.gather(*others), 10)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await judge.disconnect()
    assert [verdict.outcome for verdict in verdicts] == ["answered"] * 8


def test_a_first_question_given_up_holds_up_no_later_event_loop() -> None:
    with JudgeServer(faults=[Fault("slow", seconds=30)]) as server:
        judge = chat(server, structured=None)

        async def give_up() -> None:
            first = asyncio.create_task(judge.judge(question()))
            while not server.requests:
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await judge.disconnect()

        async def ask() -> list[Verdict]:
            verdicts = await asyncio.gather(*(judge.judge(question(image=noise(seed))) for seed in range(4)))
            await judge.disconnect()
            return verdicts

        asyncio.run(give_up())
        for _ in range(2):
            assert [verdict.outcome for verdict in asyncio.run(asyncio.wait_for(ask(), 10))] == ["answered"] * 4


@pytest.mark.parametrize(("first", "at_once"), [(None, 4), (Fault("unauthorized"), 3)])
async def test_questions_wait_until_one_was_answered_and_then_no_more(first: Fault | None, at_once: int) -> None:
    """After a wrong key, the next question is again treated as the first question."""
    async with JudgeServer(faults=[first], latency=0.2) as server:
        judge = chat(server)
        await asyncio.gather(judge.judge(question()), return_exceptions=True)
        verdicts = await asyncio.gather(*(judge.judge(question(image=noise(seed))) for seed in range(4)))
        await judge.disconnect()
    assert [verdict.outcome for verdict in verdicts] == ["answered"] * 4
    assert server.most_at_once == at_once


async def test_a_question_does_not_wait_for_another_event_loops_first() -> None:
    other = asyncio.new_event_loop()
    async with JudgeServer() as server:
        judge = chat(server)
        judge._first = other.create_future()
        assert (await asyncio.wait_for(judge.judge(question()), 10)).outcome == "answered"
        await judge.disconnect()
    other.close()


KEYS = [("A", 0.05), ("B", 0.9), ("C", 0.05)]


def tokens(*texts: str, alternatives: Sequence[tuple[str, float]] = KEYS) -> list[JsonValue]:
    """Every token has the same alternatives, so that only the position decides."""
    top: list[JsonValue] = [{"token": text, "logprob": math.log(chance), "bytes": None} for text, chance in alternatives]
    return [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top} for text in texts]


@pytest.mark.parametrize(
    ("texts", "has_probabilities"),
    [
        (("ANSWER", ":", " B"), True),
        (("**", "ANSWER", ":", "**", " B", ")", " blue", " finch"), True),
        (('{"', "answer", '":', ' "', "B", '"}'), True),
        (('{"', "answer", '":', ' "', 'B"}'), False),
        (('{"', "answer", '":"B', '"}'), False),
        (("ANSWER", ":", " blue", " finch"), False),
        (("The", " B", " is", " it", ".", "\n", "ANSWER", ":", " blue", " finch"), False),
        (("<think>", "ANSWER", ":", " A", "</think>", "B"), True),
        (("B",), True),
        (("B", " or", " C"), False),
        (('{"answer": "', "B", '"}', "\n", "No", " answer", " A", "."), False),
    ],
)
async def test_probabilities_are_of_the_token_that_is_the_answer(texts: tuple[str, ...], has_probabilities: bool) -> None:
    content = tokens(*texts)
    choice: dict[str, JsonValue] = {"message": {"role": "assistant", "content": "".join(texts)}, "logprobs": {"content": content}}
    verdict = await asked_once(completion(choice), logprobs=True)
    assert verdict.outcome == "answered" or not has_probabilities
    expected = {"red finch": 0.05, "blue finch": 0.9, "grey owl": 0.05}
    assert verdict.probabilities == (pytest.approx(expected) if has_probabilities else None)


async def test_tokens_of_thoughts_that_the_text_is_without() -> None:
    content = tokens("A", "?", " answer", ":", "A", "</think>", "ANSWER", ":", " B")
    choice: dict[str, JsonValue] = {"message": {"content": "ANSWER: B"}, "logprobs": {"content": content}}
    assert (await asked_once(completion(choice), logprobs=True)).probabilities is not None


@pytest.mark.parametrize(
    "logprobs",
    [
        "none",
        {"content": [{"token": None, "logprob": 0}]},
        {"content": [{"token": "B", "logprob": 0, "top_logprobs": None}]},
        {"content": [{"token": "B", "logprob": 0, "top_logprobs": [{"token": "B", "logprob": "-inf"}]}]},
        {"content": [{"token": "B", "logprob": 0, "top_logprobs": [{"token": "B", "logprob": 9999}]}]},
    ],
)
async def test_an_answer_counts_whatever_its_probabilities(logprobs: JsonValue) -> None:
    choice: dict[str, JsonValue] = {"message": {"content": "B"}, "logprobs": logprobs}
    verdict = await asked_once(completion(choice), logprobs=True)
    assert (verdict.label, verdict.probabilities) == ("blue finch", None)


async def test_keys_of_several_letters_have_no_probabilities() -> None:
    """Each key may be two tokens, and the first token may be the key of another option."""
    names = [f"bird number {number}" for number in range(30)]
    async with JudgeServer(answer="ANSWER: AB") as server:
        judge = chat(server, logprobs=True, structured=False)
        verdict = await judge.judge(question(names))
        await judge.disconnect()
    assert (verdict.label, verdict.probabilities) == (names[27], None)


async def test_the_last_key_is_the_one_whose_probabilities_count() -> None:
    """Every key in the answer has its own alternatives."""
    async with JudgeServer(answer=lambda asked: 'C or A?\n{"answer": "B"}') as server:
        judge = chat(server, logprobs=True, structured=False)
        verdict = await judge.judge(question())
        await judge.disconnect()
    assert verdict.probabilities == pytest.approx({"red finch": 0.05, "blue finch": 0.9, "grey owl": 0.05})


@EVERY
async def test_tokens_from_the_providers_cache_are_told(make: Make) -> None:
    async with JudgeServer(usage=(1000, 20), cached=600) as server:
        judge = make(server)
        usage = (await judge.judge(question())).usage
        await judge.disconnect()
    assert (usage.input_tokens, usage.cached_input_tokens, usage.output_tokens) == (1000, 600, 20)


async def test_reasoning_items_of_responses_are_no_answer() -> None:
    reasoning: JsonValue = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "ANSWER: A\nno"}]}
    answer: JsonValue = {
        "type": "message",
        "id": "m",
        "content": [{"type": "output_text", "text": "ANSWER: B", "annotations": []}],
    }
    bare: JsonValue = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "ANSWER: A\nno"}], "summary": None}
    as_text: JsonValue = {"type": "message", "content": "ANSWER: B"}
    for output, label in (
        ([reasoning, answer], "blue finch"),
        ([bare, as_text], "blue finch"),
        ([None, answer], "blue finch"),
        ([reasoning], None),
        ([bare], None),
    ):
        body: JsonValue = {"id": "r", "status": "completed", "output": output}
        async with JudgeServer(faults=[Fault("body", body=body)]) as server:
            judge = responses(server)
            verdict = await judge.judge(question())
            await judge.disconnect()
        assert verdict.label == label
        assert label or "only thoughts" in verdict.error


async def test_a_decision_that_is_an_error_is_judged_by_it() -> None:
    fault = Fault("body", body={"error": {"code": 402, "message": "No credits"}})
    with pytest.raises(FatalError, match="No credits"):
        await asked_once(fault, mode="decision")
