"""Responses of the loopback server, read by the providers' own clients."""

import asyncio
import base64
import io
import json
from collections.abc import Awaitable
from email.utils import formatdate
from functools import cached_property
from types import SimpleNamespace
from typing import Self

import anthropic
import openai
import pytest
from anthropic.types import Message, MessageParam
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from anthropic.types.messages import MessageBatch
from openai.types import Batch, Decision
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from openai.types.responses import Response, ResponseInputParam
from pydantic import JsonValue

from cascadevlm.testing import noise
from tests.server import Conversation, Fault, FaultKind, JudgeServer, Received

OPTIONS = "Which one is shown?\nA) red finch\nB) blue finch\nC) none of these\nANSWER: letter or name"
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "answer": {"type": "string", "enum": ["red finch", "blue finch"]}},
    "required": ["reasoning", "answer"],
    "additionalProperties": False,
}


def encoded() -> str:
    buffer = io.BytesIO()
    noise(1).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = encoded()
URL = f"data:image/png;base64,{IMAGE}"
CHAT: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": OPTIONS}]}
]
INPUT: ResponseInputParam = [
    {
        "role": "user",
        "content": [{"type": "input_image", "image_url": URL, "detail": "auto"}, {"type": "input_text", "text": OPTIONS}],
    }
]
MESSAGES: list[MessageParam] = [
    {
        "role": "user",
        "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}},
            {"type": "text", "text": OPTIONS},
        ],
    }
]


class Clients:
    """A client of each provider, and one simple question through each endpoint."""

    def __init__(self, server: JudgeServer, *, timeout: float = 30) -> None:
        self.server = server
        self.timeout = timeout

    @cached_property
    def openai(self) -> openai.AsyncOpenAI:
        url = self.server.openai_url
        return openai.AsyncOpenAI(
            base_url=url,
            api_key="k",
            max_retries=0,
            timeout=self.timeout,
            http_client=openai.DefaultAioHttpClient(),
            _strict_response_validation=True,
        )

    @cached_property
    def anthropic(self) -> anthropic.AsyncAnthropic:
        url = self.server.anthropic_url
        return anthropic.AsyncAnthropic(
            base_url=url,
            api_key="k",
            max_retries=0,
            timeout=self.timeout,
            http_client=anthropic.DefaultAioHttpClient(),
            _strict_response_validation=True,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for made in vars(self).keys() & {"openai", "anthropic"}:
            await getattr(self, made).close()

    async def chat(self) -> ChatCompletion:
        return await self.openai.chat.completions.create(model="m", messages=CHAT)

    async def responses(self) -> Response:
        return await self.openai.responses.create(model="m", input=INPUT)

    async def messages(self) -> Message:
        return await self.anthropic.messages.create(model="m", max_tokens=99, messages=MESSAGES)

    async def decide(self) -> Decision:
        return await self.openai.decisions.create(
            model="m",
            input=[
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": OPTIONS}],
                }
            ],
            questions=[
                {
                    "type": "choice",
                    "instructions": "Which?",
                    "choices": [{"value": "red finch"}, {"value": "blue finch"}],
                }
            ],
        )

    async def ask(self, endpoint: str) -> str:
        """The response in one or two words."""
        match endpoint:
            case "chat":
                choice = (await self.chat()).choices[0]
                return f"{choice.finish_reason}: {choice.message.content if choice.message.refusal is None else 'refused'}"
            case "responses":
                response = await self.responses()
                why = response.incomplete_details.reason if response.incomplete_details else "stop"
                kinds = [part.type for item in response.output if item.type == "message" for part in item.content]
                return f"{why}: {'refused' if 'refusal' in kinds else response.output_text}"
            case _:
                message = await self.messages()
                return f"{message.stop_reason}: {''.join(block.text for block in message.content if block.type == 'text')}"


async def test_normal_replies() -> None:
    async with JudgeServer(usage=(123, 4)) as server, Clients(server) as clients:
        chat = await clients.chat()
        assert chat.choices[0].message.content == "ANSWER: A"
        assert chat.usage is not None
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (123, 4)
        response = await clients.responses()
        assert response.output_text == "ANSWER: A"
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens) == (123, 4)
        message = await clients.messages()
        assert [block.type for block in message.content] == ["text"]
        assert (message.usage.input_tokens, message.usage.output_tokens) == (123, 4)
        assert message._request_id
        decision = await clients.decide()
        (answer,) = decision.answers
        assert answer.type == "choice"
        assert answer.choice == "red finch"
        assert [option.value for option in answer.probabilities] == ["red finch", "blue finch"]
        assert [option.probability for option in answer.probabilities] == pytest.approx([0.9, 0.1])
        assert decision.usage.input_tokens == 123
    paths = ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/decisions"]
    assert [received.path for received in server.requests] == paths
    assert server.requests[0].headers["AUTHORIZATION"] == "Bearer k"
    assert server.requests[0].body["model"] == "m"


async def test_answers_keep_to_the_schema() -> None:
    async with JudgeServer() as server, Clients(server) as clients:
        chat = await clients.openai.chat.completions.create(
            model="m",
            messages=CHAT,
            response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}},
        )
        response = await clients.openai.responses.create(
            model="m", input=INPUT, text={"format": {"type": "json_schema", "name": "verdict", "schema": SCHEMA}}
        )
        message = await clients.anthropic.messages.create(
            model="m",
            max_tokens=9,
            messages=MESSAGES,
            output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        )
        called = await clients.anthropic.messages.create(
            model="m",
            max_tokens=9,
            messages=MESSAGES,
            tools=[{"name": "answer", "input_schema": SCHEMA}],
            tool_choice={"type": "tool", "name": "answer"},
        )
    assert message.content[0].type == "text"
    for text in (chat.choices[0].message.content, response.output_text, message.content[0].text):
        assert json.loads(text or "") == {"reasoning": "As far as can be seen.", "answer": "red finch"}
    assert called.stop_reason == "tool_use"
    assert called.content[0].type == "tool_use"
    assert called.content[0].input["answer"] == "red finch"


async def test_a_server_without_structured_output_refuses_schemas() -> None:
    async with JudgeServer(structured=False) as server, Clients(server) as clients:
        with pytest.raises(openai.BadRequestError, match="JSON schema"):
            await clients.openai.responses.create(
                model="m", input=INPUT, text={"format": {"type": "json_schema", "name": "verdict", "schema": SCHEMA}}
            )
        with pytest.raises(anthropic.BadRequestError, match="JSON schema"):
            await clients.anthropic.messages.create(
                model="m",
                max_tokens=9,
                messages=MESSAGES,
                output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
            )
        assert await clients.ask("chat") == "stop: ANSWER: A"


async def test_token_probabilities() -> None:
    async with JudgeServer(answer="It is red.\nANSWER: B") as server, Clients(server) as clients:
        completion = await clients.openai.chat.completions.create(model="m", messages=CHAT, logprobs=True, top_logprobs=20)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == "It is red.\nANSWER: B"
    assert [len(token.top_logprobs) for token in logprobs.content] == [1] * (len(logprobs.content) - 1) + [3]
    assert [token.token for token in logprobs.content[-1].top_logprobs] == [" B", " A", " C"]

    async with JudgeServer(logprobs=False) as server, Clients(server) as clients:
        completion = await clients.openai.chat.completions.create(model="m", messages=CHAT, logprobs=True)
        assert completion.choices[0].logprobs is None


async def test_every_key_has_token_probabilities_of_its_own() -> None:
    async with JudgeServer(answer="C? No.\nANSWER: B") as server, Clients(server) as clients:
        completion = await clients.openai.chat.completions.create(model="m", messages=CHAT, logprobs=True, top_logprobs=20)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [len(token.top_logprobs) for token in logprobs.content or ()] == [3, *[1] * (len(logprobs.content or ()) - 2), 3]


async def test_tokens_from_a_cache() -> None:
    async with JudgeServer(usage=(100, 4), cached=60) as server, Clients(server) as clients:
        chat = await clients.openai.chat.completions.create(model="m", messages=CHAT)
        response = await clients.openai.responses.create(model="m", input=INPUT)
        message = await clients.anthropic.messages.create(model="m", max_tokens=10, messages=MESSAGES)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert (chat.usage.prompt_tokens, chat.usage.prompt_tokens_details.cached_tokens) == (100, 60)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (100, 60)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (40, 60)


async def test_a_response_of_ones_own() -> None:
    """Faults chosen by the number of the request, or by its content."""

    def refuse(received: Received) -> Fault | None:
        return Fault("body", status=422, body={"detail": "no top_logprobs"}) if "top_logprobs" in received.body else None

    page = Fault("body", body="<html></html>")
    async with JudgeServer(faults=[page], refuse=refuse) as server, Clients(server) as clients:
        with pytest.raises(openai.UnprocessableEntityError, match="422"):
            await clients.openai.chat.completions.create(model="m", messages=CHAT, logprobs=True, top_logprobs=20)
        with pytest.raises(openai.APIResponseValidationError, match="text/html"):
            await clients.openai.chat.completions.create(model="m", messages=CHAT)
        assert (await clients.openai.chat.completions.create(model="m", messages=CHAT)).choices


async def test_an_answer_may_depend_on_the_conversation() -> None:
    def answer(asked: Conversation) -> str:
        assert asked.images == [base64.b64decode(IMAGE)]
        key = next(key for key, name in asked.options.items() if name == "blue finch")
        return asked.say(key)

    async with JudgeServer(answer=answer) as server, Clients(server) as clients:
        assert await clients.ask("chat") == "stop: ANSWER: B"
        assert await clients.ask("messages") == "end_turn: ANSWER: B"
        (decided,) = (await clients.decide()).answers
        assert decided.type == "choice"
        assert decided.choice == "blue finch"


async def test_the_nth_request_has_the_nth_fault() -> None:
    async with JudgeServer(faults=lambda number: Fault("empty") if number == 1 else None) as server, Clients(server) as clients:
        assert [await clients.ask("chat") for _ in range(3)] == ["stop: ANSWER: A", "stop: ", "stop: ANSWER: A"]


ENDPOINTS = ("chat", "responses", "messages")
ERRORS: list[tuple[FaultKind, type[Exception], type[Exception]]] = [
    ("rate_limit", openai.RateLimitError, anthropic.RateLimitError),
    ("server_error", openai.InternalServerError, anthropic.InternalServerError),
    ("unavailable", openai.InternalServerError, anthropic.InternalServerError),
    ("overloaded", openai.InternalServerError, anthropic.InternalServerError),
    ("bad_request", openai.BadRequestError, anthropic.BadRequestError),
    ("unauthorized", openai.AuthenticationError, anthropic.AuthenticationError),
    ("forbidden", openai.PermissionDeniedError, anthropic.PermissionDeniedError),
    ("not_found", openai.NotFoundError, anthropic.NotFoundError),
    ("quota", openai.RateLimitError, anthropic.APIStatusError),
    ("reset", openai.APIConnectionError, anthropic.APIConnectionError),
    ("slow", openai.APITimeoutError, anthropic.APITimeoutError),
    ("truncated", openai.APIConnectionError, anthropic.APIConnectionError),
    ("invalid_json", json.JSONDecodeError, json.JSONDecodeError),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("kind", "by_openai", "by_anthropic"), ERRORS, ids=[kind for kind, *_ in ERRORS])
async def test_faults_that_raise(
    kind: FaultKind, by_openai: type[Exception], by_anthropic: type[Exception], endpoint: str
) -> None:
    async with JudgeServer(faults=[Fault(kind, seconds=9)]) as server, Clients(server, timeout=0.5) as clients:
        with pytest.raises(by_anthropic if endpoint == "messages" else by_openai):
            await clients.ask(endpoint)
        assert "ANSWER: A" in await clients.ask(endpoint)
    assert len(server.requests) == 2


HUGE = "ANSWER: " + "lorem ipsum " * 166_666
VERDICTS: dict[FaultKind, tuple[str, str, str]] = {
    "wrong_label": ("stop: ANSWER: something that was never offered",) * 2
    + ("end_turn: ANSWER: something that was never offered",),
    "not_offered_letter": ("stop: ANSWER: Z", "stop: ANSWER: Z", "end_turn: ANSWER: Z"),
    "empty": ("stop: ", "stop: ", "end_turn: "),
    "refusal": ("stop: refused", "stop: refused", "refusal: "),
    "content_filter": ("content_filter: ", "content_filter: ", "refusal: "),
    "length": ("length: ANSW", "max_output_tokens: ANSW", "max_tokens: ANSW"),
    "huge": (f"stop: {HUGE}", f"stop: {HUGE}", f"end_turn: {HUGE}"),
}


@pytest.mark.parametrize("kind", VERDICTS)
async def test_faults_that_answer(kind: FaultKind) -> None:
    async with JudgeServer(faults=[Fault(kind)] * 4) as server, Clients(server) as clients:
        said = [await clients.ask(endpoint) for endpoint in ENDPOINTS]
        assert [text == wanted for text, wanted in zip(said, VERDICTS[kind], strict=True)] == [True] * 3
        (decided,) = (await clients.decide()).answers
        assert decided.type == ("refusal" if kind in ("refusal", "content_filter") else "choice")


@pytest.mark.parametrize(
    ("fault", "header", "value"),
    [
        (Fault("rate_limit", retry_after=2), "retry-after", "2"),
        (Fault("unavailable", retry_after_ms=1500), "retry-after-ms", "1500"),
        (Fault("rate_limit", retry_after=formatdate(0, usegmt=True)), "retry-after", "Thu, 01 Jan 1970 00:00:00 GMT"),
        (Fault("rate_limit"), "retry-after", None),
    ],
)
async def test_errors_say_how_long_to_wait(fault: Fault, header: str, value: str | None) -> None:
    async with JudgeServer(faults=[fault]) as server, Clients(server) as clients:
        with pytest.raises(openai.APIStatusError) as caught:
            await clients.chat()
    assert caught.value.response.headers.get(header) == value


async def test_errors_are_worded_as_the_providers_do() -> None:
    async with JudgeServer(faults=[Fault("quota")] * 2) as server, Clients(server) as clients:
        with pytest.raises(openai.RateLimitError, match="No credit") as by_openai:
            await clients.chat()
        assert (by_openai.value.code, by_openai.value.type) == ("insufficient_quota",) * 2
        assert by_openai.value.request_id
        with pytest.raises(anthropic.APIStatusError) as by_anthropic:
            await clients.messages()
        assert (by_anthropic.value.status_code, by_anthropic.value.type) == (402, "billing_error")
        assert isinstance(by_anthropic.value.body, dict)
        assert by_anthropic.value.request_id == by_anthropic.value.body["request_id"]


async def test_what_is_no_question_is_turned_away() -> None:
    async with JudgeServer() as server, Clients(server) as clients:
        with pytest.raises(openai.AuthenticationError):
            await clients.openai.chat.completions.create(model="m", messages=CHAT, extra_headers={"Authorization": ""})
        with pytest.raises(openai.BadRequestError, match="no image"):
            await clients.openai.responses.create(model="m", input="Which bird?")
        broken = base64.b64encode(base64.b64decode(IMAGE)[:-40]).decode()
        for data, why in ((broken, "decoded"), ("?", "base64")):
            with pytest.raises(anthropic.BadRequestError, match=why):
                await clients.anthropic.messages.create(
                    model="m",
                    max_tokens=9,
                    messages=[
                        {
                            "role": "user",
                            "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}],
                        }
                    ],
                )
    async with JudgeServer(check_images=False) as server, Clients(server) as clients:
        assert (await clients.openai.responses.create(model="m", input="Which bird?")).output_text == "ANSWER: A"


async def test_requests_overlap() -> None:
    async with JudgeServer(latency=0.2, keep_requests=False) as server, Clients(server) as clients:
        await asyncio.gather(*(clients.chat() for _ in range(5)))
    assert server.most_at_once == 5
    assert server.requests == []


def test_from_synchronous_code() -> None:
    with JudgeServer() as server, openai.OpenAI(base_url=server.openai_url, api_key="k", max_retries=0) as client:
        assert client.chat.completions.create(model="m", messages=CHAT).choices[0].message.content == "ANSWER: A"
    assert len(server.requests) == 1


BODY: dict[str, JsonValue] = {"model": "m", "messages": json.loads(json.dumps(CHAT))}


async def submit(clients: Clients, rows: int, **metadata: str) -> Batch:
    lines = [
        json.dumps({"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": BODY}) for row in range(rows)
    ]
    file = await clients.openai.files.create(file=("rows.jsonl", "\n".join(lines).encode()), purpose="batch")
    assert (await clients.openai.files.retrieve(file.id)).filename == "rows.jsonl"
    return await clients.openai.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
    )


async def lines(clients: Clients, file: str | None) -> dict[str, SimpleNamespace]:
    content = await clients.openai.files.content(file or "")
    rows = [json.loads(line, object_hook=lambda fields: SimpleNamespace(**fields)) for line in content.text.splitlines()]
    return {row.custom_id: row for row in rows}


def submit_messages(clients: Clients, rows: int) -> Awaitable[MessageBatch]:
    params: MessageCreateParamsNonStreaming = {"model": "m", "max_tokens": 9, "messages": MESSAGES}
    return clients.anthropic.messages.batches.create(requests=[{"custom_id": str(row), "params": params} for row in range(rows)])


ROWS: list[Fault | None] = [None, Fault("server_error"), Fault("expired"), Fault("refusal"), Fault("reset")]


async def test_openai_batch() -> None:
    async with JudgeServer(faults=ROWS) as server, Clients(server) as clients:
        batch = await submit(clients, len(ROWS), run="17")
        assert batch.status == "validating"
        statuses = [(await clients.openai.batches.retrieve(batch.id)).status for _ in range(3)]
        assert statuses == ["in_progress", "in_progress", "completed"]
        batch = await clients.openai.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
        assert batch.usage is not None
        assert (batch.usage.input_tokens, batch.usage.output_tokens) == (3000, 60)
        output, errors = await lines(clients, batch.output_file_id), await lines(clients, batch.error_file_id)
    assert list(output) == ["0", "3", "4"]
    assert [row.response.body.choices[0].message.content for row in output.values()] == ["ANSWER: A", None, "ANSWER: A"]
    assert errors["1"].response.status_code == 500
    assert errors["2"].error.code == "batch_expired"
    assert server.requests == []


async def test_openai_batches_are_listed() -> None:
    async with JudgeServer() as server, Clients(server) as clients:
        made = [await submit(clients, 1, run=str(number)) for number in range(3)]
        listed = [batch async for batch in clients.openai.batches.list(limit=2)]
        assert [batch.id for batch in listed] == [batch.id for batch in reversed(made)]
        assert [batch.metadata for batch in listed] == [{"run": "2"}, {"run": "1"}, {"run": "0"}]
        assert [batch.id for batch in server.batches] == [batch.id for batch in made]


async def test_openai_batch_cut_short() -> None:
    async with JudgeServer(batch_polls=0, batch_expires=True) as server, Clients(server) as clients:
        expired = await clients.openai.batches.retrieve((await submit(clients, 4)).id)
        assert expired.status == "expired"
        assert list(await lines(clients, expired.output_file_id)) == ["0", "1"]
        assert list(await lines(clients, expired.error_file_id)) == ["2", "3"]
        batch = await submit(clients, 2)
        assert (await clients.openai.batches.cancel(batch.id)).status == "cancelling"
        assert (await clients.openai.batches.retrieve(batch.id)).status == "cancelled"


async def test_openai_batches_that_are_none() -> None:
    async with JudgeServer() as server, Clients(server) as clients:
        with pytest.raises(openai.NotFoundError):
            await clients.openai.batches.retrieve("batch_x")
        with pytest.raises(openai.NotFoundError):
            await clients.openai.files.content("file_x")
        with pytest.raises(openai.BadRequestError):
            await submit(clients, 0)
        file = await clients.openai.files.create(file=b"nonsense", purpose="batch")
        with pytest.raises(openai.BadRequestError):
            await clients.openai.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert server.batches == []


async def test_anthropic_batch() -> None:
    async with JudgeServer(faults=ROWS) as server, Clients(server) as clients:
        batches = clients.anthropic.messages.batches
        made = await submit_messages(clients, len(ROWS))
        statuses = [(await batches.retrieve(made.id)).processing_status for _ in range(3)]
        assert statuses == ["in_progress", "in_progress", "ended"]
        counts = (await batches.retrieve(made.id)).request_counts
        assert (counts.processing, counts.succeeded, counts.errored, counts.expired) == (0, 3, 1, 1)
        results = {row.custom_id: row.result async for row in await batches.results(made.id)}
        assert [batch.id async for batch in batches.list()] == [made.id]
    assert [result.type for result in results.values()] == ["succeeded", "errored", "expired", "succeeded", "succeeded"]
    assert results["1"].type == "errored"
    assert results["1"].error.error.type == "api_error"
    assert results["3"].type == "succeeded"
    assert results["3"].message.stop_reason == "refusal"
    assert len(server.batches) == 1


async def test_anthropic_batch_cut_short() -> None:
    async with JudgeServer(batch_polls=0, batch_expires=True) as server, Clients(server) as clients:
        batches = clients.anthropic.messages.batches
        made = [await submit_messages(clients, 3) for _ in range(2)]
        assert (await batches.cancel(made[0].id)).processing_status == "canceling"
        results = [[row.result.type async for row in await batches.results(batch.id)] for batch in made]
        assert results == [["succeeded", "canceled", "canceled"], ["succeeded", "expired", "expired"]]
        with pytest.raises(anthropic.BadRequestError):
            await submit_messages(clients, 0)
