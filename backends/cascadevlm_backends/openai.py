"""``openai:``: OpenAI's models, and every server that speaks its protocol, as judges.

vLLM, Ollama, LM Studio, OpenRouter, Azure and ``transformers serve`` are reached through ``base_url``. Where the endpoint can
hold an answer to a schema it is asked to; where it cannot, the lettered prompt alone does, found out with the first question.
"""

import importlib.util
import math
import time
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import JsonValue

from cascadevlm.errors import FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.hosted import HostedJudge, ImageLimits, Reply, answer_schema, choices, normalised, translate
from cascadevlm.prompt import Message, Part, options, render
from cascadevlm.types import Question, Usage, Verdict

if TYPE_CHECKING:
    import httpx2
    import openai
    from openai.types import CompletionUsage, DecisionInputPartUnionParam
    from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam
    from openai.types.chat.chat_completion import ChoiceLogprobs
    from openai.types.decision_create_params import InputUnionMember1DecisionInputUserMessage as DecisionMessage
    from openai.types.responses import ResponseInputContentParam, ResponseInputParam, ResponseTextConfigParam
    from openai.types.shared_params import ResponseFormatJSONSchema

Mode = Literal["answer", "decision"]
Api = Literal["chat", "responses"]
Detail = Literal["auto", "low", "high"]

TOP_LOGPROBS = 20


class OpenAIJudge(HostedJudge):
    """A model behind OpenAI's API or one like it.

    Args:
        model: as the endpoint names it.
        mode: ``"answer"`` reads an answer; ``"decision"`` asks the decisions endpoint for a choice with probabilities.
        api: Chat Completions, which every server speaks, or Responses.
        structured: whether to ask for JSON by a schema; None finds out.
        logprobs: ask for token probabilities and make probabilities of the candidates of them (Chat Completions).
        base_url: of another server; ``api_key_env`` names the variable with its key.
        organization: as OpenAI calls it.
        headers: sent with every request.
        client: your own `openai.AsyncOpenAI`; its retries should be off.
        detail: how closely the model looks at images.
        temperature: the endpoint's default, unless given; models that reason accept no other.
        max_tokens: of an answer; the prompt's, unless given.
        reasoning_effort: for models that reason.
        price: dollars per million tokens, ``{"input": …, "output": …}``, or 0; the table's, unless given.
        concurrency: the most requests in flight.
        requests_per_minute: the most requests to begin in a minute.
        tokens_per_minute: the most tokens, by worst case, in a minute.
        timeout: seconds to wait for an answer.
    """

    provider: ClassVar[str] = "openai"
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=2048, max_bytes=20_000_000)

    def __init__(
        self,
        model: str,
        *,
        mode: Mode = "answer",
        api: Api = "chat",
        structured: bool | None = None,
        logprobs: bool = False,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        organization: str | None = None,
        headers: Mapping[str, str] | None = None,
        client: "openai.AsyncOpenAI | None" = None,
        detail: Detail = "auto",
        temperature: float | None = None,
        max_tokens: int | None = None,
        reasoning_effort: str | None = None,
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
        self.mode: Mode = mode
        self.api: Api = api
        self.structured = structured
        self.logprobs = logprobs
        self.organization = organization
        self.headers = headers
        self.client = client
        self.detail: Detail = detail
        self.temperature = temperature
        self.reasoning_effort = reasoning_effort
        self.timeout = timeout
        self._takes_schema: bool | None = structured

    def identity(self) -> Mapping[str, JsonValue]:
        return {
            "judge": self.spec,
            "endpoint": self.base_url or (str(self.client.base_url) if self.client else None),
            "mode": self.mode,
            "api": self.api,
            "structured": self.structured,
            "logprobs": self.logprobs,
            "detail": self.detail,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "reasoning_effort": self.reasoning_effort,
        }

    def connect(self) -> None:
        self._client  # noqa: B018  # raises where there is no key

    @cached_property
    def _client(self) -> "openai.AsyncOpenAI":
        if self.client is not None:
            return self.client
        import openai

        return openai.AsyncOpenAI(
            api_key=self.api_key(),
            base_url=self.base_url,
            organization=self.organization,
            default_headers=self.headers,
            max_retries=0,
            timeout=self.timeout,
            http_client=_http_client(),
        )

    async def judge(self, question: Question) -> Verdict:
        if self.mode == "decision":
            return await self._ask(question, self._choose(question))
        ask = self._respond if self.api == "responses" else self._complete
        if self._takes_schema is False:
            return await self._ask(question, ask(question, False))
        try:
            verdict = await self._ask(question, ask(question, True))
        except PermanentError:
            if self._takes_schema:
                raise
            verdict = await self._ask(question, ask(question, False))
            self._takes_schema = False
        else:
            self._takes_schema = True
        return verdict

    async def _ask(self, question: Question, request: Awaitable[Reply]) -> Verdict:
        began = time.perf_counter()
        try:
            reply = await request
        except Exception as exc:
            raise translate(exc, ERRORS, secret=self._client.api_key) from exc
        verdict = self.read(reply, question)
        return replace(verdict, usage=replace(verdict.usage, seconds=time.perf_counter() - began))

    async def _complete(self, question: Question, structured: bool) -> Reply:
        from openai import omit

        limit = self.output_limit(question)
        by_key = self.logprobs
        completion = await self._client.chat.completions.create(
            model=self.model,
            messages=self._chat_messages(question, structured),
            response_format=_response_format(question, by_key) if structured else omit,
            temperature=omit if self.temperature is None else self.temperature,
            max_completion_tokens=omit if self.base_url else limit,
            max_tokens=limit if self.base_url else omit,  # what servers other than OpenAI's understand
            reasoning_effort=self.reasoning_effort or omit,
            logprobs=True if self.logprobs else omit,
            top_logprobs=TOP_LOGPROBS if self.logprobs else omit,
        )
        choice = completion.choices[0]
        content = choice.message.content or ""
        filtered = "The provider's content filter stopped the answer." if choice.finish_reason == "content_filter" else None
        return Reply(
            text=content,
            usage=_usage(completion.usage),
            refusal=choice.message.refusal or filtered,
            cut_off=choice.finish_reason == "length",
            probabilities=_probabilities(choice.logprobs, question) if choice.logprobs else None,
        )

    async def _respond(self, question: Question, structured: bool) -> Reply:
        from openai import omit

        response = await self._client.responses.create(
            model=self.model,
            input=self._response_input(question, structured),
            text=_text_format(question) if structured else omit,
            temperature=omit if self.temperature is None else self.temperature,
            max_output_tokens=self.output_limit(question),
            reasoning={"effort": self.reasoning_effort} if self.reasoning_effort else omit,
            store=False,
        )
        refusals = [
            part.refusal for item in response.output if item.type == "message" for part in item.content if part.type == "refusal"
        ]
        why = response.incomplete_details.reason if response.incomplete_details else None
        if why == "content_filter":
            refusals.append("The provider's content filter stopped the answer.")
        usage = response.usage
        return Reply(
            text=response.output_text,
            usage=_tokens(usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens)
            if usage
            else Usage(),
            refusal=refusals[0] if refusals else None,
            cut_off=why == "max_output_tokens",
        )

    async def _choose(self, question: Question) -> Reply:
        """The decisions endpoint: one choice question about the whole conversation."""
        names = choices(question, by_key=False)
        decision = await self._client.decisions.create(
            model=self.model,
            input=self._decision_input(question),
            questions=[
                {
                    "type": "choice",
                    "instructions": "Which of these is shown in the image?",
                    "choices": [{"value": name} for name in names],
                }
            ],
        )
        (answer,) = decision.answers
        usage = decision.usage
        tokens = _tokens(usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens)
        if answer.type != "choice":
            return Reply(text="", usage=tokens, refusal="The model declined to decide.")
        by_name = {str(option.value): option.probability for option in answer.probabilities}
        labels = dict(zip(names, (label.name for label in question.labels), strict=False))
        return Reply(
            text=f"ANSWER: {answer.choice}",
            usage=tokens,
            probabilities=normalised({labels[name]: by_name.get(name, 0.0) for name in labels}),
        )

    def _chat_messages(self, question: Question, structured: bool) -> "list[ChatCompletionMessageParam]":
        messages: list[ChatCompletionMessageParam] = []
        for message in _worded(question, structured):
            if message.role == "assistant":
                messages.append({"role": "assistant", "content": "".join(map(str, message.parts))})
            else:
                messages.append({"role": "user", "content": [self._chat_part(part, question) for part in message.parts]})
        return messages

    def _chat_part(self, part: Part, question: Question) -> "ChatCompletionContentPartParam":
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": self.sent(part, question).data_url, "detail": self.detail}}

    def _response_input(self, question: Question, structured: bool) -> "ResponseInputParam":
        messages: ResponseInputParam = []
        for message in _worded(question, structured):
            if message.role == "assistant":
                messages.append({"role": "assistant", "content": "".join(map(str, message.parts))})
            else:
                messages.append({"role": "user", "content": [self._response_part(part, question) for part in message.parts]})
        return messages

    def _response_part(self, part: Part, question: Question) -> "ResponseInputContentParam":
        if isinstance(part, str):
            return {"type": "input_text", "text": part}
        return {"type": "input_image", "image_url": self.sent(part, question).data_url, "detail": self.detail}

    def _decision_input(self, question: Question) -> "list[DecisionMessage]":
        content: list[DecisionInputPartUnionParam] = []
        for part in render(replace(question, rejected=None))[0].parts:
            if isinstance(part, str):
                content.append({"type": "input_text", "text": part})
            else:
                content.append({"type": "input_image", "image_url": self.sent(part, question).data_url})
        return [{"role": "user", "content": content}]


AS_JSON = "\nGive the answer as JSON: the field answer names the one shown."


def _worded(question: Question, structured: bool) -> tuple[Message, ...]:
    messages = render(question)
    if not structured:
        return messages
    return (*messages[:-1], replace(messages[-1], parts=(*messages[-1].parts, AS_JSON)))


def _response_format(question: Question, by_key: bool) -> "ResponseFormatJSONSchema":
    schema = answer_schema(question, by_key=by_key)
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def _text_format(question: Question) -> "ResponseTextConfigParam":
    return {"format": {"type": "json_schema", "name": "verdict", "strict": True, "schema": answer_schema(question)}}


def _tokens(into: int, out: int, cached: int) -> Usage:
    return Usage(input_tokens=into, output_tokens=out, cached_input_tokens=cached)


def _usage(usage: "CompletionUsage | None") -> Usage:
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return _tokens(usage.prompt_tokens, usage.completion_tokens, (details and details.cached_tokens) or 0)


def _probabilities(logprobs: "ChoiceLogprobs", question: Question) -> Mapping[str, float] | None:
    """Probabilities of the candidates from the alternatives to the token that gave the answer's key; None if it gave none.

    The answer comes last, so the last token that is a key is the one.
    """
    names = dict(zip(options(question), (label.name for label in question.labels), strict=False))
    for token in reversed(logprobs.content or []):
        if _bare(token.token) in options(question):
            masses = dict.fromkeys(names.values(), 0.0)
            for alternative in token.top_logprobs:
                if (key := _bare(alternative.token)) in names:
                    masses[names[key]] += math.exp(alternative.logprob)
            return normalised(masses)
    return None


def _bare(token: str) -> str:
    return token.strip(" \"')(.:*").upper()


def _http_client() -> "httpx2.AsyncClient | None":
    """The SDK's faster transport, where aiohttp is installed."""
    if importlib.util.find_spec("aiohttp") is None:
        return None
    import openai

    return openai.DefaultAioHttpClient()


ERRORS: Mapping[str, type[JudgeError]] = {
    "OpenAIError": FatalError,
    "APIError": TransientError,
    "APIStatusError": JudgeError,
    "APIConnectionError": TransientError,
    "APITimeoutError": TransientError,
    "APIResponseValidationError": TransientError,
    "AuthenticationError": FatalError,
    "BadRequestError": PermanentError,
    "ConflictError": TransientError,
    "ContentFilterFinishReasonError": PermanentError,
    "InternalServerError": TransientError,
    "InvalidWebhookSignatureError": PermanentError,
    "LengthFinishReasonError": PermanentError,
    "NotFoundError": FatalError,
    "OAuthError": FatalError,
    "PermissionDeniedError": FatalError,
    "RateLimitError": RateLimited,
    "UnprocessableEntityError": PermanentError,
    "WebSocketConnectionClosedError": TransientError,
    "WebSocketQueueFullError": TransientError,
}
"""Ours for every exception of the SDK, by name; a status without a class of its own is judged by its number."""
