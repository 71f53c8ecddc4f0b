"""``anthropic:``: Claude as a judge, through the Messages API.

A JSON schema restricts the answer to the candidates. With ``structured="tool"``, a forced tool call restricts the answer
instead. The provider's prompt cache can keep the part that many questions have in common: the reference images and the text
before them.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import JsonValue, PositiveFloat, PositiveInt

from cascadevlm.base.encoding import ImageLimits
from cascadevlm.base.errors import FatalError, JudgeError, PermanentError, TransientError
from cascadevlm.base.secrets import without_login
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.hosted.base import Form, PriceOption
from cascadevlm.judges.hosted.connection import HAS_AIOHTTP
from cascadevlm.judges.hosted.errors import ErrorResponse
from cascadevlm.judges.hosted.replies import Reply, answer_schema, believed_usage, reported, texts_of
from cascadevlm.judges.hosted.sdk import BatchLimits, SdkJudge
from cascadevlm.judges.hosted.transport import time_limits
from cascadevlm.judges.prompt import Message, Part, render

if TYPE_CHECKING:
    import anthropic
    from anthropic.types import AssistantMessageParam, ImageBlockParam, OutputConfigParam, TextBlockParam, UserMessageParam
    from anthropic.types import Message as AnthropicMessage
    from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as MessageParams
    from anthropic.types.messages.batch_create_params import Request

Structured = Literal["schema", "tool", "none"]
Thinking = Literal["adaptive", "disabled"]
Effort = Literal["low", "medium", "high", "xhigh", "max"]

TOOL = "answer"


class AnthropicJudge(SdkJudge):
    """A model behind Anthropic's API.

    Args:
        model: name of the model at Anthropic.
        structured: how the answer is restricted to the candidates. ``"schema"``: by a JSON schema. If the model rejects the
            schema, requests have no schema. ``"tool"``: by a forced tool call. Models that always think reject it. ``"none"``:
            the answer is not restricted.
        thinking: ``"adaptive"``, ``"disabled"``, or a number of tokens for models with a thinking budget. Default: the model's
            own setting.
        effort: how much the model thinks. Default: the model's own setting.
        cache_prompt: mark the reference images for the provider's prompt cache. Use it if many questions show the same images.
        base_url: address of the server. Default: Anthropic's server.
        api_key_env: name of the environment variable that contains the key.
        headers: extra headers of every request. They are not kept in any file.
        client: your own `anthropic.AsyncAnthropic`. Turn its retries off. Its redirects are turned off. Default: a new client.
        temperature: sampling temperature. Default: the default of the endpoint. Models that think accept only this default.
        max_tokens: maximum number of tokens of an answer, including thoughts. Default: the limit of the prompt, and extra
            tokens for models that think.
        price: price in US dollars per million tokens, see `PriceOption`. Default: the price in the price table.
        concurrency: maximum number of requests in flight.
        requests_per_minute: maximum number of requests per minute. Default: no limit.
        tokens_per_minute: maximum number of tokens per minute, in the worst case. Default: no limit.
        timeout: maximum total time of one request, in seconds.
    """

    provider: ClassVar[str] = "anthropic"
    hosts: ClassVar[tuple[str, ...]] = ("api.anthropic.com",)
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=1568, max_bytes=3_700_000)  # 5 MB after base64 encoding
    batch_limits: ClassVar[BatchLimits] = BatchLimits(requests=100_000, bytes=250_000_000)
    errors: ClassVar[Mapping[str, type[JudgeError]]] = {
        "AnthropicError": FatalError,
        "APIError": TransientError,
        "APIStatusError": PermanentError,
        "RetryableError": TransientError,  # raised by the middleware of the user's own client
    }

    def __init__(
        self,
        model: str,
        *,
        structured: Structured = "schema",
        thinking: Thinking | PositiveInt | None = None,
        effort: Effort | None = None,
        cache_prompt: bool = False,
        base_url: str | None = None,
        api_key_env: str = "ANTHROPIC_API_KEY",
        headers: Mapping[str, str] | None = None,
        client: "anthropic.AsyncAnthropic | None" = None,
        temperature: float | None = None,
        max_tokens: PositiveInt | None = None,
        price: PriceOption = None,
        concurrency: PositiveInt = 16,
        requests_per_minute: PositiveFloat | None = None,
        tokens_per_minute: PositiveFloat | None = None,
        timeout: PositiveFloat = 120,
    ) -> None:
        super().__init__(
            model,
            base_url=base_url,
            api_key_env=api_key_env,
            headers=headers,
            client=client,
            timeout=timeout,
            price=price,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_tokens=max_tokens,
        )
        self.structured: Structured = structured
        self.thinking: Thinking | int | None = thinking
        self.effort: Effort | None = effort
        self.cache_prompt = cache_prompt
        self.temperature = temperature

    def identity(self) -> Mapping[str, JsonValue]:
        return {
            "judge": self.spec,
            "endpoint": self.address,
            "structured": self.structured,
            "thinking": self.thinking,
            "effort": self.effort,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    @property
    def secret(self) -> str:
        return self._client.api_key or ""

    @property
    def _client(self) -> "anthropic.AsyncAnthropic":
        return cast("anthropic.AsyncAnthropic", self.connected())

    def _new_client(self) -> "anthropic.AsyncAnthropic":
        import anthropic

        return anthropic.AsyncAnthropic(
            api_key=self.api_key(),
            base_url=without_login(self.endpoint) if self.endpoint else None,
            default_headers=self.headers,
            max_retries=0,
            timeout=time_limits(self.timeout),
            http_client=anthropic.DefaultAioHttpClient() if HAS_AIOHTTP else anthropic.DefaultAsyncHttpxClient(),
        )

    def output_limit(self, question: Question) -> int:
        budget = self.thinking if isinstance(self.thinking, int) else 0
        return self.max_tokens or super().output_limit(question) + budget

    async def judge(self, question: Question) -> Verdict:
        return await self.ask_as_taken(question)

    @property
    def first_form(self) -> Form:
        return Form(schema=self.structured == "schema")

    @property
    def schema_is_optional(self) -> bool:
        return True

    async def reply(self, question: Question, form: Form) -> Reply:
        return _of_message(await self._client.messages.create(**self._params(question, form), extra_body=self._sampling))

    @property
    def _sampling(self) -> dict[str, JsonValue]:
        """Parameters of older models. The SDK no longer has arguments for them."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def _params(self, question: Question, form: Form) -> "MessageParams":
        schema = answer_schema(question)
        messages = [self._message(message, question) for message in render(question)]
        params: MessageParams = {"model": self.model, "max_tokens": self.output_limit(question), "messages": messages}
        output: OutputConfigParam = {}
        if form.schema:
            output["format"] = {"type": "json_schema", "schema": schema}
        if self.effort is not None:
            output["effort"] = self.effort
        if output:
            params["output_config"] = output
        if self.structured == "tool":
            params["tools"] = [{"name": TOOL, "description": "Say which candidate is shown.", "input_schema": schema}]
            params["tool_choice"] = {"type": "tool", "name": TOOL}
        match self.thinking:
            case int(budget):
                params["thinking"] = {"type": "enabled", "budget_tokens": budget}
            case "adaptive":
                params["thinking"] = {"type": "adaptive"}
            case "disabled":
                params["thinking"] = {"type": "disabled"}
        return params

    def _message(self, message: Message, question: Question) -> "UserMessageParam | AssistantMessageParam":
        if message.role == "user":
            return {"role": "user", "content": [self._block(part, question) for part in message.parts]}
        return {"role": "assistant", "content": "".join(map(str, message.parts))}

    def _block(self, part: Part, question: Question) -> "TextBlockParam | ImageBlockParam":
        if isinstance(part, str):
            return {"type": "text", "text": part}
        image = self.sent(part, question)
        block: ImageBlockParam = {
            "type": "image",
            "source": {"type": "base64", "media_type": image.media_type, "data": image.base64},
        }
        if self.cache_prompt and question.exemplars and part is question.exemplars[-1].image:
            block["cache_control"] = {"type": "ephemeral"}
        return block

    def batch_row(self, key: str, question: Question) -> JsonValue:
        return {"custom_id": key, "params": {**cast(dict[str, JsonValue], self._params(question, self.form)), **self._sampling}}

    async def submit_batch(self, rows: Path, token: str) -> str:
        requests: list[Request] = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        return (await self._client.messages.batches.create(requests=requests)).id

    async def find_batch(self, token: str) -> str | None:
        """Batches at Anthropic have no field for the token. Therefore, the newest batch with the number of requests in the
        token is returned, if it is not older than the time in the token.
        """
        began, count, _ = token.split("/")
        async for batch in self._client.messages.batches.list():
            if batch.created_at < datetime.fromisoformat(began):
                break
            counts = batch.request_counts
            total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
            if total == int(count):
                return batch.id
        return None

    async def batch_results(self, batch_id: str) -> Mapping[str, JsonValue] | None:
        batch = await self._client.messages.batches.retrieve(batch_id)
        if batch.processing_status != "ended":
            return None
        return {
            row.custom_id: row.result.model_dump(mode="json")
            async for row in await self._client.messages.batches.results(batch_id)
        }

    def of_batch_row(self, row: JsonValue, question: Question) -> Reply:
        from anthropic.types import Message as AnthropicMessage

        assert isinstance(row, dict)
        match row["type"]:
            case "succeeded":
                message = row["message"]
                assert isinstance(message, dict)
                return _of_message(AnthropicMessage.construct(None, **message))  # the SDK does not validate either of them
            case "errored":
                raise ErrorResponse(row["error"])
            case kind:
                raise TransientError(f"The batch has no answer to the question: {row.get('error') or kind}")


def _of_message(message: "AnthropicMessage") -> Reply:
    if getattr(message, "content", None) is None:
        raise ErrorResponse(message)
    text, thoughts = texts_of(message.content)
    calls = [json.dumps(reported(block, "input")) for block in message.content if reported(block, "type") == "tool_use"]
    return Reply(
        text="\n".join([*filter(None, [text]), *calls]),
        thoughts=thoughts,
        usage=believed_usage(
            input_tokens=reported(message, "usage", "input_tokens"),
            output_tokens=reported(message, "usage", "output_tokens"),
            cached=reported(message, "usage", "cache_read_input_tokens"),
            written=reported(message, "usage", "cache_creation_input_tokens"),
            apart=True,
        ),
        refusal="The model refused to answer." if message.stop_reason == "refusal" else None,
        cut_off=message.stop_reason == "max_tokens",
    )
