"""``openai:``: OpenAI's models, and every server that speaks its protocol, as judges.

vLLM, Ollama, LM Studio, OpenRouter, Azure and ``transformers serve`` are reached through ``base_url``. Where the endpoint can
hold an answer to a schema it is asked to; where it cannot, the lettered prompt alone does, found out with the first question.
"""

import json
import math
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import JsonValue, PositiveFloat, PositiveInt

from cascadevlm.encoding import ImageLimits
from cascadevlm.errors import BackendError, FatalError, JudgeError, PermanentError, TransientError
from cascadevlm.hosted import (
    HAS_AIOHTTP,
    BatchLimits,
    HostedJudge,
    PriceOption,
    Reply,
    answer_schema,
    believed_usage,
    choices,
    is_json_answer,
    normalised,
    reported,
    require_no_error,
)
from cascadevlm.judge import Turn
from cascadevlm.loop import PerLoop
from cascadevlm.prompt import Message, Part, options, render
from cascadevlm.provider_errors import error_of_status
from cascadevlm.secrets import without_login
from cascadevlm.types import Question, Usage, Verdict

if TYPE_CHECKING:
    import openai
    from openai.types import DecisionInputPartUnionParam
    from openai.types.chat import ChatCompletion, ChatCompletionContentPartParam, ChatCompletionMessageParam
    from openai.types.chat.chat_completion import ChoiceLogprobs
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
    from openai.types.decision_create_params import InputUnionMember1DecisionInputUserMessage as DecisionMessage
    from openai.types.responses import Response, ResponseInputContentParam, ResponseInputParam
    from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParams

Mode = Literal["answer", "decision"]
Api = Literal["chat", "responses"]
Detail = Literal["auto", "low", "high"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

TOP_LOGPROBS = 20
AS_JSON = "\nGive the answer as JSON: the field answer names the one shown."
FILTERED = "The provider's content filter stopped the answer."


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
        headers: sent with every request, and kept nowhere.
        client: your own `openai.AsyncOpenAI`; its retries should be off. It follows no redirects either.
        detail: how closely the model looks at images.
        temperature: the endpoint's default, unless given; models that reason accept no other.
        max_tokens: of an answer, thoughts included; the prompt's, and room for thoughts where a model has them, unless given.
        reasoning_effort: for models that reason.
        price: see `PriceOption`.
        concurrency: the most requests in flight.
        requests_per_minute: the most requests to begin in a minute.
        tokens_per_minute: the most tokens, by worst case, in a minute.
        timeout: seconds that a request may take in all.
    """

    provider: ClassVar[str] = "openai"
    hosts: ClassVar[tuple[str, ...]] = ("api.openai.com",)
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=2048, max_bytes=20_000_000)
    batch_limits: ClassVar[BatchLimits] = BatchLimits(requests=50_000, bytes=190_000_000)
    errors: ClassVar[Mapping[str, type[JudgeError]]] = {
        "OpenAIError": FatalError,
        "APIError": TransientError,
        "APIStatusError": PermanentError,
        "APIConnectionError": TransientError,
        "APITimeoutError": TransientError,
        "APIResponseValidationError": TransientError,
        "ContentFilterFinishReasonError": PermanentError,
        "InvalidWebhookSignatureError": PermanentError,
        "LengthFinishReasonError": PermanentError,
        "WebSocketConnectionClosedError": TransientError,
        "WebSocketQueueFullError": TransientError,
        **dict.fromkeys(
            (  # of what no judge uses: other clients, streams, agents
                "APIRemovedInV1",
                "AgentFilePreparationError",
                "AgentFileStagingError",
                "AgentOutputParseError",
                "AgentTurnResultError",
                "MissingDependencyError",
                "MutuallyExclusiveAuthError",
                "StreamAlreadyConsumed",
                "SubjectTokenProviderError",
                "_AmbiguousModuleClientUsageError",
            ),
            FatalError,
        ),
    }

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
        max_tokens: PositiveInt | None = None,
        reasoning_effort: Effort | None = None,
        price: PriceOption = None,
        concurrency: PositiveInt = 16,
        requests_per_minute: PositiveFloat | None = None,
        tokens_per_minute: PositiveFloat | None = None,
        timeout: PositiveFloat = 120,
    ) -> None:
        super().__init__(
            model,
            base_url=str(client.base_url) if client else base_url,
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
        self.client: openai.AsyncOpenAI | None = client
        self.detail: Detail = detail
        self.temperature = temperature
        self.reasoning_effort: Effort | None = reasoning_effort
        self.timeout = timeout
        self._takes_schema = structured
        self._turns = PerLoop(Turn)

    def identity(self) -> Mapping[str, JsonValue]:
        return {
            "judge": self.spec,
            "endpoint": self.address,
            "mode": self.mode,
            "api": self.api,
            "structured": self.structured,
            "logprobs": self.logprobs,
            "detail": self.detail,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "reasoning_effort": self.reasoning_effort,
        }

    @property
    def _finding_out(self) -> Turn:
        return self._turns.get()

    @property
    def secret(self) -> str:
        return self._client.api_key

    @property
    def _client(self) -> "openai.AsyncOpenAI":
        return cast("openai.AsyncOpenAI", self.connected())

    def _new_client(self) -> "openai.AsyncOpenAI":
        import openai

        return openai.AsyncOpenAI(
            api_key=self.api_key(),
            base_url=without_login(self.endpoint) if self.endpoint else None,
            organization=self.organization,
            default_headers=self.headers,
            max_retries=0,
            timeout=self.timeout,
            http_client=openai.DefaultAioHttpClient() if HAS_AIOHTTP else openai.DefaultAsyncHttpxClient(),
        )

    async def judge(self, question: Question) -> Verdict:
        if self.mode == "decision":
            return await self.ask(self._choose(question), question)
        if self._takes_schema is None:
            async with self._finding_out:
                if self._takes_schema is None:
                    return await self._find_out(question)
        return await self.ask(self._answer(question, self._takes_schema), question)

    async def _find_out(self, question: Question) -> Verdict:
        """Ask for JSON by a schema: an endpoint that refuses it, or answers in other words, is asked by the prompt alone from now
        on. A refusal costs nothing, so that both requests go by one reservation."""
        try:
            verdict = await self.ask(self._answer(question, True), question)
        except PermanentError as exc:
            if exc.may_be_billed:  # both requests go by one reservation
                raise
            verdict = await self.ask(self._answer(question, False), question)
            self._takes_schema = False
            return verdict
        if verdict.outcome not in ("refused", "failed") and verdict.text.strip():
            self._takes_schema = is_json_answer(verdict.text)
        return verdict

    def _answer(self, question: Question, structured: bool) -> Awaitable[Reply]:
        return self._respond(question, structured) if self.api == "responses" else self._complete(question, structured)

    async def _complete(self, question: Question, structured: bool) -> Reply:
        return self._of_completion(
            await self._client.chat.completions.create(**self._chat_params(question, structured)), question
        )

    async def _respond(self, question: Question, structured: bool) -> Reply:
        return _of_response(await self._client.responses.create(**self._response_params(question, structured)))

    def _chat_params(self, question: Question, structured: bool) -> "ChatParams":
        messages: list[ChatCompletionMessageParam] = []
        for message in _worded(question, structured):
            if message.role == "assistant":
                messages.append({"role": "assistant", "content": "".join(map(str, message.parts))})
            else:
                messages.append({"role": "user", "content": [self._chat_part(part, question) for part in message.parts]})
        params: ChatParams = {"model": self.model, "messages": messages}
        if self.is_own_endpoint:
            params["max_completion_tokens"] = self.output_limit(question)
        else:
            params["max_tokens"] = self.output_limit(question)  # what other servers understand
        if structured:
            schema = answer_schema(question, by_key=self.logprobs)
            params["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            }
        if self.temperature is not None:
            params["temperature"] = self.temperature
        if self.reasoning_effort is not None:
            params["reasoning_effort"] = self.reasoning_effort
        if self.logprobs:
            params["logprobs"] = True
            params["top_logprobs"] = TOP_LOGPROBS
        return params

    def _of_completion(self, completion: "ChatCompletion", question: Question) -> Reply:
        require_no_error(completion)
        if not completion.choices:
            raise TransientError("The response holds no answer.", may_be_billed=True)
        choice = completion.choices[0]
        return Reply(
            text=choice.message.content or "",
            usage=_usage(completion, "prompt", "completion"),
            refusal=choice.message.refusal or (FILTERED if choice.finish_reason == "content_filter" else None),
            cut_off=choice.finish_reason == "length",
            probabilities=_probabilities(choice.logprobs, question) if choice.logprobs else None,
        )

    def _response_params(self, question: Question, structured: bool) -> "ResponseParams":
        messages: ResponseInputParam = []
        for message in _worded(question, structured):
            if message.role == "assistant":
                messages.append({"role": "assistant", "content": "".join(map(str, message.parts))})
            else:
                messages.append({"role": "user", "content": [self._response_part(part, question) for part in message.parts]})
        params: ResponseParams = {
            "model": self.model,
            "input": messages,
            "max_output_tokens": self.output_limit(question),
            "store": False,
        }
        if structured:
            params["text"] = {
                "format": {"type": "json_schema", "name": "verdict", "strict": True, "schema": answer_schema(question)}
            }
        if self.temperature is not None:
            params["temperature"] = self.temperature
        if self.reasoning_effort is not None:
            params["reasoning"] = {"effort": self.reasoning_effort}
        return params

    async def _choose(self, question: Question) -> Reply:
        """The decisions endpoint: one choice question about the conversation."""
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
        require_no_error(decision)
        (answer,) = decision.answers
        usage = _usage(decision)
        if answer.type != "choice":
            return Reply(text="", usage=usage, refusal="The model declined to decide.")
        by_name = {str(option.value): option.probability for option in answer.probabilities}
        labels = dict(zip(names, (label.name for label in question.labels), strict=False))
        return Reply(
            text=f"ANSWER: {answer.choice}",
            usage=usage,
            probabilities=normalised({label: by_name.get(name, 0.0) for name, label in labels.items()}),
        )

    def _chat_part(self, part: Part, question: Question) -> "ChatCompletionContentPartParam":
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": self.sent(part, question).data_url, "detail": self.detail}}

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

    def _image_tokens(self, size: tuple[int, int]) -> int:
        rule = self.price.image
        if rule is None or self.detail != "low" or self.mode == "decision":  # which has no detail
            return super()._image_tokens(size)
        return rule.tokens_in_low_detail(*size)

    def batch_row(self, key: str, question: Question) -> JsonValue:
        if self.mode == "decision":
            raise BackendError(f"{self.spec!r} has no batches of decisions.", hint='Use mode = "answer".')
        structured = self.structured is not False
        if self.api == "responses":
            url, body = "/v1/responses", cast(JsonValue, self._response_params(question, structured))
        else:
            url, body = "/v1/chat/completions", cast(JsonValue, self._chat_params(question, structured))
        return {"custom_id": key, "method": "POST", "url": url, "body": body}

    async def submit_batch(self, rows: Path, token: str) -> str:
        file = await self._client.files.create(file=rows, purpose="batch")
        batch = await self._client.batches.create(
            completion_window="24h",
            endpoint="/v1/responses" if self.api == "responses" else "/v1/chat/completions",
            input_file_id=file.id,
            metadata={"cascadevlm": token},
        )
        return batch.id

    async def find_batch(self, token: str) -> str | None:
        async for batch in self._client.batches.list():
            if (batch.metadata or {}).get("cascadevlm") == token:
                return batch.id
        return None

    async def batch_results(self, batch_id: str) -> Mapping[str, JsonValue] | None:
        batch = await self._client.batches.retrieve(batch_id)
        if batch.status not in ("completed", "expired", "cancelled", "failed"):
            return None
        rows: dict[str, JsonValue] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                content = await self._client.files.content(file_id)
                rows |= {row["custom_id"]: row for row in map(json.loads, content.content.splitlines())}
        if batch.status == "failed" and not rows:
            reasons = [error.message for error in (batch.errors.data if batch.errors else None) or () if error.message]
            raise PermanentError(f"{self.spec} refused batch {batch_id}: {' '.join(reasons) or 'no reason given'}")
        return rows

    def of_batch_row(self, row: JsonValue, question: Question) -> Reply:
        from openai.types.chat import ChatCompletion
        from openai.types.responses import Response

        assert isinstance(row, dict)
        response = row.get("response")
        if not isinstance(response, dict) or row.get("error"):
            raise TransientError(f"The batch has no answer: {row.get('error') or 'no reason given'}")
        status, body = response.get("status_code"), response.get("body")
        if status != 200:
            raise error_of_status(int(str(status)), str(body))
        assert isinstance(body, dict)
        if self.api == "responses":  # made as the SDK makes them, which does not validate
            return _of_response(Response.model_construct(None, **body))
        return self._of_completion(ChatCompletion.model_construct(None, **body), question)


def _worded(question: Question, structured: bool) -> tuple[Message, ...]:
    messages = render(question)
    if not structured:
        return messages
    return (*messages[:-1], replace(messages[-1], parts=(*messages[-1].parts, AS_JSON)))


def _of_response(response: "Response") -> Reply:
    require_no_error(response)
    parts = [part for item in response.output if item.type == "message" for part in item.content]
    refusals = [part.refusal for part in parts if part.type == "refusal"]
    why = response.incomplete_details.reason if response.incomplete_details else None
    return Reply(
        text=response.output_text,
        usage=_usage(response),
        refusal=refusals[0] if refusals else FILTERED if why == "content_filter" else None,
        cut_off=why == "max_output_tokens",
    )


def _usage(body: object, into: str = "input", out: str = "output") -> Usage | None:
    """What a response says was used; Chat Completions has other names for the input and the output."""
    return believed_usage(
        input_tokens=reported(body, "usage", f"{into}_tokens"),
        output_tokens=reported(body, "usage", f"{out}_tokens"),
        cached=reported(body, "usage", f"{into}_tokens_details", "cached_tokens"),
        written=reported(body, "usage", f"{into}_tokens_details", "cache_write_tokens"),
    )


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
