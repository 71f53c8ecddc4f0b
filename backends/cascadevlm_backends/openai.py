"""``openai:``: judges behind OpenAI's API, and behind every server with the same protocol.

Examples of such servers are vLLM, Ollama, LM Studio, OpenRouter, Azure and ``transformers serve``; ``base_url`` is their
address. Requests have a JSON schema for the answer. If the endpoint does not accept a schema, the first question finds that
out, and the following requests have no schema.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import JsonValue, PositiveFloat, PositiveInt

from cascadevlm.base.encoding import ImageLimits
from cascadevlm.base.errors import BackendError, FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.base.secrets import without_login
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.answers import after_thoughts, read_answer
from cascadevlm.judges.hosted.base import Form, PriceOption
from cascadevlm.judges.hosted.connection import HAS_AIOHTTP
from cascadevlm.judges.hosted.errors import ErrorResponse
from cascadevlm.judges.hosted.replies import Reply, answer_schema, believed_usage, choices, normalised, reported, texts_of
from cascadevlm.judges.hosted.sdk import BatchLimits, SdkJudge
from cascadevlm.judges.hosted.transport import time_limits
from cascadevlm.judges.prompt import Message, Part, options, render

if TYPE_CHECKING:
    import openai
    from openai.types import DecisionInputPartUnionParam
    from openai.types.chat import ChatCompletion, ChatCompletionContentPartParam, ChatCompletionMessageParam
    from openai.types.chat.chat_completion import ChoiceLogprobs
    from openai.types.chat.chat_completion_content_part_image_param import ImageURL
    from openai.types.chat.chat_completion_token_logprob import TopLogprob
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
LIMIT_NOT_TAKEN = re.compile(
    r"(?=.*max_(completion_)?tokens)"
    r".*(not support|unsupported|not permitted|not allowed|unrecogni[sz]ed|unknown|unexpected|instead|deprecated|requires?)",
    re.IGNORECASE | re.DOTALL,
)
"""Matches errors which say that the limit of tokens has another name."""

FILTERED = "The provider's content filter stopped the answer."


class OpenAIJudge(SdkJudge):
    """A model behind OpenAI's API or an API with the same protocol.

    Args:
        model: name of the model at the endpoint.
        mode: ``"answer"`` reads a text; ``"decision"`` asks the decisions endpoint for a choice with probabilities.
        api: ``"chat"`` for Chat Completions, which every server has, or ``"responses"``.
        structured: true if requests have a JSON schema. Default: requests have a schema if the endpoint accepts it.
        logprobs: request token probabilities and compute probabilities of the candidates from them. For Chat Completions only.
        base_url: address of the server. Default: OpenAI's server.
        api_key_env: name of the environment variable that contains the key.
        headers: extra headers of every request. They are not kept in any file.
        client: your own `openai.AsyncOpenAI`. Turn its retries off. Its redirects are turned off. Default: a new client.
        detail: the image detail that the model uses.
        temperature: sampling temperature. Default: the default of the endpoint. Models that think accept only this default.
        max_tokens: maximum number of tokens of an answer, including thoughts. Default: the limit of the prompt, and extra
            tokens for models that think.
        reasoning_effort: how much the model thinks. Only for models that think. Default: the default of the endpoint.
        price: price in US dollars per million tokens, see `PriceOption`. Default: the price in the price table.
        concurrency: maximum number of requests in flight.
        requests_per_minute: maximum number of requests per minute. Default: no limit.
        tokens_per_minute: maximum number of tokens per minute, in the worst case. Default: no limit.
        timeout: maximum total time of one request, in seconds.
    """

    provider: ClassVar[str] = "openai"
    hosts: ClassVar[tuple[str, ...]] = ("api.openai.com",)
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=2048, max_bytes=20_000_000)
    batch_limits: ClassVar[BatchLimits] = BatchLimits(requests=50_000, bytes=190_000_000)
    errors: ClassVar[Mapping[str, type[JudgeError]]] = {
        "OpenAIError": FatalError,
        "APIError": TransientError,
        "APIStatusError": PermanentError,
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
        self.mode: Mode = mode
        self.api: Api = api
        self.structured = structured
        self.logprobs = logprobs
        self.detail: Detail = detail
        self.temperature = temperature
        self.reasoning_effort: Effort | None = reasoning_effort

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
            default_headers=self.headers,
            max_retries=0,
            timeout=time_limits(self.timeout),
            http_client=openai.DefaultAioHttpClient() if HAS_AIOHTTP else openai.DefaultAsyncHttpxClient(),
        )

    async def judge(self, question: Question) -> Verdict:
        if self.mode == "decision":
            return await self.ask(self._choose(question), question)
        return await self.ask_as_taken(question)

    @property
    def first_form(self) -> Form:
        return Form(schema=self.structured is not False, completion_tokens=self.is_own_endpoint)

    @property
    def schema_is_optional(self) -> bool:
        return self.structured is None

    def other_form(self, form: Form, error: JudgeError) -> Form | None:
        if self.api == "chat" and not isinstance(error, RateLimited) and LIMIT_NOT_TAKEN.search(str(error)):
            return replace(form, completion_tokens=not form.completion_tokens)
        if isinstance(error, PermanentError) and self.schema_is_optional and not self._schema_works:
            return replace(form, schema=False)  # many servers do not say which part they reject
        return super().other_form(form, error)

    async def reply(self, question: Question, form: Form) -> Reply:
        if self.api == "responses":
            return _of_response(await self._client.responses.create(**self._response_params(question, form)))
        return self._of_completion(await self._client.chat.completions.create(**self._chat_params(question, form)), question)

    def _chat_params(self, question: Question, form: Form) -> "ChatParams":
        messages: list[ChatCompletionMessageParam] = []
        for message in _worded(question, form.schema):
            if message.role == "assistant":
                messages.append({"role": "assistant", "content": "".join(map(str, message.parts))})
            else:
                messages.append({"role": "user", "content": [self._chat_part(part, question) for part in message.parts]})
        params: ChatParams = {"model": self.model, "messages": messages}
        if form.completion_tokens:
            params["max_completion_tokens"] = self.output_limit(question)
        else:
            params["max_tokens"] = self.output_limit(question)  # the name that most other servers know
        if form.schema:
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
        choice = completion.choices[0] if getattr(completion, "choices", None) else None
        error = choice and (choice.model_extra or {}).get("error")
        if error or choice is None or choice.message is None or str(choice.finish_reason) == "error":
            raise ErrorResponse({"error": error} if error else completion)
        text, thoughts = texts_of(choice.message.content)
        probabilities = None
        with suppress(AttributeError, TypeError, OverflowError):  # the answer counts without malformed probabilities
            probabilities = _probabilities(choice.logprobs, text, question) if choice.logprobs else None
        extra = choice.message.model_extra or {}
        thoughts = thoughts or texts_of(extra.get("reasoning_content") or extra.get("reasoning"))[0]
        return Reply(
            text=text,
            thoughts=thoughts,
            usage=_usage(completion, "prompt", "completion"),
            refusal=choice.message.refusal or (FILTERED if choice.finish_reason == "content_filter" else None),
            cut_off=choice.finish_reason == "length",
            probabilities=probabilities,
        )

    def _response_params(self, question: Question, form: Form) -> "ResponseParams":
        messages: ResponseInputParam = []
        for message in _worded(question, form.schema):
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
        if form.schema:
            params["text"] = {
                "format": {"type": "json_schema", "name": "verdict", "strict": True, "schema": answer_schema(question)}
            }
        if self.temperature is not None:
            params["temperature"] = self.temperature
        if self.reasoning_effort is not None:
            params["reasoning"] = {"effort": self.reasoning_effort}
        return params

    async def _choose(self, question: Question) -> Reply:
        """Ask the decisions endpoint one choice question about the conversation."""
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
        if not getattr(decision, "answers", None):
            raise ErrorResponse(decision)
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
        image: ImageURL = {"url": self.sent(part, question).data_url}
        if self.detail != "auto":  # some servers do not know the default
            image["detail"] = self.detail
        return {"type": "image_url", "image_url": image}

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
        if rule is None or self.detail != "low" or self.mode == "decision":  # decisions have no detail
            return super()._image_tokens(size)
        return rule.tokens_in_low_detail(*size)

    def require_batch_api(self) -> None:
        if self.mode == "decision":
            raise BackendError(f"{self.spec!r} has no batch API in mode 'decision'.", hint='Use mode = "answer".')

    def batch_row(self, key: str, question: Question) -> JsonValue:
        if self.api == "responses":
            url, body = "/v1/responses", cast(JsonValue, self._response_params(question, self.form))
        else:
            url, body = "/v1/chat/completions", cast(JsonValue, self._chat_params(question, self.form))
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
            raise TransientError(f"The batch has no answer to the question: {row.get('error') or 'no reason given'}")
        status, body = response.get("status_code"), response.get("body")
        if status != 200 or not isinstance(body, dict):
            raise ErrorResponse(body, status=int(str(status)))
        if self.api == "responses":
            return _of_response(Response.construct(None, **body))
        return self._of_completion(ChatCompletion.construct(None, **body), question)


def _worded(question: Question, structured: bool) -> tuple[Message, ...]:
    messages = render(question)
    if not structured:
        return messages
    return (*messages[:-1], replace(messages[-1], parts=(*messages[-1].parts, AS_JSON)))


def _of_response(response: "Response") -> Reply:
    if getattr(response, "output", None) is None or response.error:
        raise ErrorResponse(response)
    contents = [reported(item, "content") for item in response.output if reported(item, "type") == "message"]
    reasoning = [item for item in response.output if reported(item, "type") == "reasoning"]
    thoughts = [text for item in reasoning for name in ("content", "summary") for text in texts_of(reported(item, name))]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    refusals = [str(refusal) for part in parts if (refusal := reported(part, "refusal"))]
    why = response.incomplete_details.reason if response.incomplete_details else None
    return Reply(
        text="\n".join(texts_of(content)[0] for content in contents),
        thoughts="\n".join(thoughts),
        usage=_usage(response),
        refusal=refusals[0] if refusals else FILTERED if why == "content_filter" else None,
        cut_off=why == "max_output_tokens",
    )


def _usage(body: object, into: str = "input", out: str = "output") -> Usage | None:
    """The usage that a response reports. Chat Completions uses other names for input and output.

    Gemini's endpoint counts thoughts in the total number of tokens, but not in the output. Thoughts are billed as output.
    """
    read, wrote, total = (reported(body, "usage", f"{name}_tokens") for name in (into, out, "total"))
    if isinstance(read, int) and isinstance(wrote, int) and isinstance(total, int):
        wrote = max(wrote, total - read)
    return believed_usage(
        input_tokens=read,
        output_tokens=wrote,
        cached=reported(body, "usage", f"{into}_tokens_details", "cached_tokens"),
        written=reported(body, "usage", f"{into}_tokens_details", "cache_write_tokens"),
    )


def _probabilities(logprobs: "ChoiceLogprobs", text: str, question: Question) -> Mapping[str, float] | None:
    """Probabilities of the candidates. They come from the alternatives to the token that is the key of the answer.

    None if no token is exactly this key. None also if keys have several letters, because such a key may be several tokens.
    """
    offered = options(question)
    answer = read_answer(text, question)
    if answer is None or max(map(len, offered)) > 1:
        return None
    chosen = question.labels.index(answer.label) if answer.label else len(question.labels)
    tokens = logprobs.content or []
    written = "".join(token.token for token in tokens)  # the tokens include thoughts, the text may not
    said = after_thoughts(written, question) or ""
    start = written.rfind(said) + (said.lower().rfind("answer") + len("answer") if "answer" in said.lower() else 0)
    end = 0
    for token in tokens:
        begin, end = end, end + len(token.token)
        if end > start and re.search(r"\w", written[max(begin, start) : end]):
            return _masses(token.top_logprobs, question) if _bare(token.token) == list(offered)[chosen] else None
    return None


def _masses(alternatives: "Sequence[TopLogprob]", question: Question) -> Mapping[str, float] | None:
    names = dict(zip(options(question), (label.name for label in question.labels), strict=False))
    masses = dict.fromkeys(names.values(), 0.0)
    for alternative in alternatives:
        if (key := _bare(alternative.token)) in names:
            masses[names[key]] += math.exp(alternative.logprob)
    return normalised(masses)


def _bare(token: str) -> str:
    return token.strip().upper()
