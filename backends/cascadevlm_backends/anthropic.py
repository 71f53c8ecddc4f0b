"""``anthropic:``: Claude as a judge, through the Messages API.

The answer is held to the candidates by a JSON schema or, with ``structured="tool"``, by a tool that must be called. The fixed
part of a question (reference images, the wording before them) can be kept in the provider's prompt cache.
"""

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import JsonValue

from cascadevlm.errors import FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.hosted import HostedJudge, ImageLimits, Reply, answer_schema, translate
from cascadevlm.prompt import Part, render
from cascadevlm.types import Question, Usage, Verdict

if TYPE_CHECKING:
    import anthropic
    import httpx2
    from anthropic.types import ContentBlockParam, ImageBlockParam, MessageParam, TextBlockParam

Structured = Literal["schema", "tool", "none"]

MINIMUM_THINKING_TOKENS = 1024
TOOL = "answer"


class AnthropicJudge(HostedJudge):
    """A model behind Anthropic's API.

    Args:
        model: as Anthropic names it.
        structured: hold the answer to the candidates by a ``"schema"``, by a forced ``"tool"``, or not at all.
        thinking_tokens: how many tokens the model may think before it answers, at least 1,024; it does not think, unless given.
        cache_prompt: mark the reference images for the provider's prompt cache: worth it where many questions show the same.
        base_url: of another server; ``api_key_env`` names the variable with its key.
        headers: sent with every request.
        client: your own `anthropic.AsyncAnthropic`; its retries should be off.
        temperature: the endpoint's default, unless given.
        max_tokens: of an answer; the prompt's, unless given. Thinking comes on top.
        price: dollars per million tokens, ``{"input": …, "output": …}``, or 0; the table's, unless given.
        concurrency: the most requests in flight.
        requests_per_minute: the most requests to begin in a minute.
        tokens_per_minute: the most tokens, by worst case, in a minute.
        timeout: seconds to wait for an answer.
    """

    provider: ClassVar[str] = "anthropic"
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=1568, max_bytes=3_700_000)  # 5 MB once in base64

    def __init__(
        self,
        model: str,
        *,
        structured: Structured = "schema",
        thinking_tokens: int | None = None,
        cache_prompt: bool = False,
        base_url: str | None = None,
        api_key_env: str = "ANTHROPIC_API_KEY",
        headers: Mapping[str, str] | None = None,
        client: "anthropic.AsyncAnthropic | None" = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        price: Mapping[str, JsonValue] | float | None = None,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 120,
    ) -> None:
        super().__init__(
            model,
            base_url=base_url,
            api_key_env=api_key_env,
            price=price,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_tokens=max_tokens,
        )
        self.structured: Structured = structured
        self.thinking_tokens = thinking_tokens
        self.cache_prompt = cache_prompt
        self.headers = headers
        self.client = client
        self.temperature = temperature
        self.timeout = timeout

    def identity(self) -> Mapping[str, JsonValue]:
        return {
            "judge": self.spec,
            "endpoint": self.base_url or (str(self.client.base_url) if self.client else None),
            "structured": self.structured,
            "thinking_tokens": self.thinking_tokens,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def connect(self) -> None:
        self._client  # noqa: B018  # raises where there is no key

    @cached_property
    def _client(self) -> "anthropic.AsyncAnthropic":
        if self.client is not None:
            return self.client
        import anthropic

        return anthropic.AsyncAnthropic(
            api_key=self.api_key(),
            base_url=self.base_url,
            default_headers=self.headers,
            max_retries=0,
            timeout=self.timeout,
            http_client=_http_client(),
        )

    def output_limit(self, question: Question) -> int:
        return super().output_limit(question) + (self.thinking_tokens or 0)

    async def judge(self, question: Question) -> Verdict:
        began = time.perf_counter()
        try:
            reply = await self._ask(question)
        except Exception as exc:
            raise translate(exc, ERRORS, secret=self._client.api_key or "") from exc
        verdict = self.read(reply, question)
        return replace(verdict, usage=replace(verdict.usage, seconds=time.perf_counter() - began))

    async def _ask(self, question: Question) -> Reply:
        from anthropic import omit

        schema = answer_schema(question)
        tool = self.structured == "tool"
        message = await self._client.messages.create(
            model=self.model,
            max_tokens=self.output_limit(question),
            messages=self._messages(question),
            output_config={"format": {"type": "json_schema", "schema": schema}} if self.structured == "schema" else omit,
            tools=[{"name": TOOL, "description": "Say which candidate is shown.", "input_schema": schema}] if tool else omit,
            tool_choice={"type": "tool", "name": TOOL} if tool else omit,
            temperature=omit if self.temperature is None else self.temperature,
            thinking={"type": "enabled", "budget_tokens": self.thinking_tokens} if self.thinking_tokens else omit,
        )
        texts = [block.text for block in message.content if block.type == "text"]
        texts += [json.dumps(block.input) for block in message.content if block.type == "tool_use"]
        return Reply(
            text="\n".join(texts),
            usage=_usage(message.usage),
            refusal="The model refused to answer." if message.stop_reason == "refusal" else None,
            cut_off=message.stop_reason == "max_tokens",
        )

    def _messages(self, question: Question) -> "list[MessageParam]":
        messages: list[MessageParam] = []
        for message in render(question):
            content: list[ContentBlockParam] = [self._block(part, question) for part in message.parts]
            messages.append({"role": message.role, "content": content})
        return messages

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


def _usage(usage: "anthropic.types.Usage") -> Usage:
    """Ours counts cached and newly cached tokens among the input, Anthropic's beside it."""
    read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
    return Usage(
        input_tokens=usage.input_tokens + read + written,
        cached_input_tokens=read,
        cache_write_tokens=written,
        output_tokens=usage.output_tokens,
    )


def _http_client() -> "httpx2.AsyncClient | None":
    """The SDK's faster transport, where aiohttp is installed."""
    if importlib.util.find_spec("aiohttp") is None:
        return None
    import anthropic

    return anthropic.DefaultAioHttpClient()


ERRORS: Mapping[str, type[JudgeError]] = {
    "AnthropicError": FatalError,
    "APIError": TransientError,
    "APIStatusError": JudgeError,
    "APIConnectionError": TransientError,
    "APITimeoutError": TransientError,
    "APIResponseValidationError": TransientError,
    "APIWebhookValidationError": PermanentError,
    "AuthenticationError": FatalError,
    "BadRequestError": PermanentError,
    "ClientClosedRequestError": TransientError,
    "ConflictError": TransientError,
    "ContentTooLargeError": PermanentError,
    "CredentialsError": FatalError,
    "DeadlineExceededError": TransientError,
    "GatewayTimeoutError": TransientError,
    "HTTPNotImplementedError": PermanentError,
    "IdentityTokenFileError": FatalError,
    "InternalServerError": TransientError,
    "NotFoundError": FatalError,
    "OverloadedError": RateLimited,
    "PaymentRequiredError": FatalError,
    "PermissionDeniedError": FatalError,
    "PreconditionFailedError": PermanentError,
    "RateLimitError": RateLimited,
    "RequestHeaderFieldsTooLargeError": PermanentError,
    "RequestTimeoutError": TransientError,
    "RequestTooLargeError": PermanentError,
    "RetryableError": TransientError,
    "ServiceUnavailableError": RateLimited,
    "UnprocessableEntityError": PermanentError,
}
"""Ours for every exception of the SDK, by name; a status without a class of its own is judged by its number."""
