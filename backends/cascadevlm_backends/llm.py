"""``llm:``: models of the package llm (by Simon Willison) as judges: every provider that has a plug-in for llm.

The model is an id or alias that ``llm models`` lists, for example ``gpt-4o``. Only models that read images can be judges. Needs
the extra: ``pip install "cascadevlm[llm]"``, and the plug-in of the provider.

The plug-in of another package makes its own connections. Therefore, the size of a response is not limited, and the plug-in may
send a request again or follow a redirect.
"""

import asyncio
import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue, PositiveFloat, PositiveInt, ValidationError

from cascadevlm.base.encoding import EncodedImage, ImageLimits
from cascadevlm.base.entry_points import nearest
from cascadevlm.base.errors import BackendError, FatalError, JudgeError, PermanentError, TransientError
from cascadevlm.base.loop import PerLoop
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.hosted.base import Form, HostedJudge, PriceOption
from cascadevlm.judges.hosted.errors import ErrorResponse
from cascadevlm.judges.hosted.replies import Reply, answer_schema, believed_usage
from cascadevlm.judges.hosted.transport import guard
from cascadevlm.judges.prompt import render
from cascadevlm_backends.openai import AS_JSON

if TYPE_CHECKING:
    import llm
    import openai

    Model = llm.Model | llm.KeyModel | llm.AsyncModel | llm.AsyncKeyModel

IMAGE_TYPES = frozenset({"image/png", "image/jpeg"})

LIMIT_OPTIONS = ("max_tokens", "max_output_tokens", "num_predict")
"""The names that plug-ins use for the maximum number of tokens of an answer."""

PROVIDER_OF_KEY = {"gemini": "google"}
"""The provider's name in the price tables, if it is not the name under which llm keeps the key."""


@dataclass(kw_only=True)
class _Connection:
    """The client of one event loop, and the number of runs that use it."""

    client: "openai.AsyncOpenAI | None" = None
    runs: int = 0


@dataclass(frozen=True, kw_only=True)
class _Said:
    """The text of a response, and the numbers of tokens that the plug-in reports."""

    text: str
    input: int | None
    output: int | None


class LlmJudge(HostedJudge):
    """A model of the package llm.

    The key comes from llm (``llm keys set NAME``, or the plug-in's environment variable), or from ``api_key_env``.

    Args:
        model: id or alias of the model in llm.
        structured: true if requests have a JSON schema. Default: requests have a schema if the model supports schemas.
        api_key_env: name of the environment variable that contains the key. Default: the key that llm finds.
        max_tokens: maximum number of tokens of an answer, including thoughts. Default: the limit of the prompt, and extra
            tokens for models that think.
        price: price in US dollars per million tokens, see `PriceOption`. Default: the price in the price tables.
        concurrency: maximum number of requests in flight.
        requests_per_minute: maximum number of requests per minute. Default: no limit.
        tokens_per_minute: maximum number of tokens per minute, in the worst case. Default: no limit.
        timeout: maximum total time of one request, in seconds.
        model_options: options of the model, as ``llm models --options`` lists them, for example ``temperature``.

    Raises:
        BackendError: at first use, if llm does not have the model, if the model reads no images, or if an option is wrong.
    """

    requires: ClassVar[tuple[str, ...]] = ("llm",)
    provider: ClassVar[str] = "llm"
    hosts: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[ImageLimits] = ImageLimits(longest_side=1568, max_bytes=3_700_000)
    errors: ClassVar[Mapping[str, type[JudgeError]]] = {
        "APIStatusError": PermanentError,
        "APIError": TransientError,
        "HTTPError": TransientError,  # of httpx
        "OpenAIError": FatalError,
        "AnthropicError": FatalError,
        "NeedsKeyException": FatalError,
    }

    def __init__(
        self,
        model: str,
        *,
        structured: bool | None = None,
        api_key_env: str | None = None,
        max_tokens: PositiveInt | None = None,
        price: PriceOption = None,
        concurrency: PositiveInt = 8,
        requests_per_minute: PositiveFloat | None = None,
        tokens_per_minute: PositiveFloat | None = None,
        timeout: PositiveFloat = 120,
        **model_options: JsonValue,
    ) -> None:
        super().__init__(
            model,
            base_url=None,
            api_key_env=api_key_env or "",
            headers=None,
            timeout=timeout,
            price=price,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_tokens=max_tokens,
        )
        self.structured = structured
        self.model_options = model_options
        self._connections: PerLoop[_Connection] = PerLoop(_Connection)

    @cached_property
    def _model(self) -> "Model":
        """The model of llm. The asynchronous form if there is one."""
        try:
            import llm
        except ModuleNotFoundError as exc:
            raise BackendError(f"{self.spec!r} needs the package 'llm'.", hint='Run: pip install "cascadevlm[llm]"') from exc
        asynchronous, synchronous = llm.get_async_model_aliases(), llm.get_model_aliases()
        known: Mapping[str, Model] = {**synchronous, **asynchronous}
        if self.model not in known:
            hint = f"{nearest(self.model, known)} Models of other providers need a plug-in: llm install NAME."
            raise BackendError(f"llm has no model {self.model!r}.", hint=hint)
        return known[self.model]

    @property
    def endpoint(self) -> str | None:
        of_sdk = os.environ.get(f"{(self._model.needs_key or '').upper()}_BASE_URL")
        return getattr(self._model, "api_base", None) or of_sdk or None

    @property
    def priced_as(self) -> tuple[str | None, str]:
        key = self._model.needs_key or ""
        provider = super().priced_as[0] if self.host else PROVIDER_OF_KEY.get(key, key)
        return provider, (getattr(self._model, "model_name", None) or self._model.model_id).removeprefix(f"{key}/")

    @cached_property
    def _key(self) -> str | None:
        import llm

        if self.api_key_env:
            return self.api_key()
        try:
            return self._model.get_key(None)
        except llm.NeedsKeyException as exc:
            raise BackendError(f"{self.spec!r} needs a key.", hint=f"Run: llm keys set {self._model.needs_key}") from exc

    @property
    def secret(self) -> str:
        return self._key or ""

    def identity(self) -> Mapping[str, JsonValue]:
        kind = type(self._model)
        return {
            "judge": self.spec,
            "model": f"{kind.__module__}.{kind.__qualname__}:{self._model.model_id}",
            "endpoint": self.address,
            "structured": self.structured,
            "max_tokens": self.max_tokens,
            "model_options": self.model_options,
        }

    def check(self) -> str:
        self._require_images()
        self._require_options()
        self.require_allowed()
        self._key  # noqa: B018  # raises if there is no key
        return str(self.price) if self.costs_money else "costs nothing"

    async def prepare(self) -> None:
        self._connections.get().runs += 1
        self.check()

    async def aclose(self) -> None:
        """Close the client when the last run in this event loop has ended."""
        connection = self._connections.get()
        connection.runs -= 1
        if connection.runs <= 0:
            await self.disconnect()

    async def disconnect(self) -> None:
        """Forget the client of this event loop, and close it."""
        connection = self._connections.pop()
        if connection is not None and connection.client is not None:
            await connection.client.close()

    def _connected(self) -> "Model":
        """The model. If it uses OpenAI's SDK, a copy that keeps one client per event loop.

        The model itself makes a client for every request and does not close it. Such a client also repeats requests and follows
        redirects.
        """
        import llm

        if not (hasattr(self._model, "get_client") and isinstance(self._model, llm.AsyncModel | llm.AsyncKeyModel)):
            return self._model
        connection = self._connections.get()
        if connection.client is None:
            client: openai.AsyncOpenAI = self._model.get_client(self._key, async_=True).with_options(max_retries=0)
            guard(client._client)
            connection.client = client
        model = copy.copy(self._model)
        vars(model)["get_client"] = lambda *_, **__: connection.client
        return model

    def _require_images(self) -> None:
        if not self._model.attachment_types >= IMAGE_TYPES:
            raise BackendError(f"The model {self.model!r} of llm does not read PNG and JPEG images.", hint="Use a vision model.")
        if self.structured and not self._model.supports_schema:
            raise BackendError(f"The model {self.model!r} of llm has no schemas.", hint="Remove the option structured.")

    def _require_options(self) -> None:
        try:
            self._model.Options.model_validate(self.model_options)
        except ValidationError as exc:
            name, problem = ".".join(map(str, exc.errors()[0]["loc"])), exc.errors()[0]["msg"]
            hint = (
                f"Correct or remove the option. Options of this model: {', '.join(self._model.Options.model_fields) or 'none'}."
            )
            raise BackendError(f"The model {self.model!r} of llm, option {name!r}: {problem}.", hint=hint) from exc
        if limits := [name for name in LIMIT_OPTIONS if name in self.model_options]:
            raise BackendError(f"The option {limits[0]!r} is set by cascadevlm.", hint="Use the option max_tokens.")
        if self.costs_money and self._limit_option is None:
            raise BackendError(
                f"The model {self.model!r} of llm costs money, and it has no option that limits the tokens of an answer.",
                hint="Use another model, or price = 0 if the model is free.",
            )

    @property
    def _limit_option(self) -> str | None:
        return next((name for name in LIMIT_OPTIONS if name in self._model.Options.model_fields), None)

    @property
    def first_form(self) -> Form:
        return Form(schema=self._model.supports_schema if self.structured is None else self.structured)

    @property
    def schema_is_optional(self) -> bool:
        return self.structured is None

    def other_form(self, form: Form, error: JudgeError) -> Form | None:
        if isinstance(error, PermanentError) and self.schema_is_optional and not self._schema_works:
            return replace(form, schema=False)  # many servers do not say which part they reject
        return super().other_form(form, error)

    async def judge(self, question: Question) -> Verdict:
        return await self.ask_as_taken(question)

    async def reply(self, question: Question, form: Form) -> Reply:
        import llm

        try:
            said = await self._prompt(question, form)
        except llm.ModelError as exc:  # it has words and no status
            raise ErrorResponse({"message": str(exc)}) from exc
        return Reply(
            text=said.text,
            usage=believed_usage(input_tokens=said.input, output_tokens=said.output, cached=None, written=None),
            cut_off=(said.output or 0) >= self.output_limit(question),
        )

    async def _prompt(self, question: Question, form: Form) -> _Said:
        import llm

        text, images = self._flat(question)
        limit = {self._limit_option: self.output_limit(question)} if self._limit_option else {}
        prompt = text + AS_JSON * form.schema
        attachments = [llm.Attachment(type=image.media_type, content=image.data) for image in images]
        schema = answer_schema(question) if form.schema else None
        options = {**self.model_options, **limit}
        model = self._connected()
        if isinstance(model, llm.AsyncModel | llm.AsyncKeyModel):
            awaited = model.prompt(prompt, attachments=attachments, schema=schema, stream=False, options=options, key=self._key)
            said, usage = await awaited.text(), await awaited.usage()
            return _Said(text=said, input=usage.input, output=usage.output)

        def ask() -> _Said:
            response = model.prompt(prompt, attachments=attachments, schema=schema, stream=False, options=options, key=self._key)
            return _Said(text=response.text(), input=response.usage().input, output=response.usage().output)

        return await asyncio.to_thread(ask)

    def _flat(self, question: Question) -> tuple[str, list[EncodedImage]]:
        """The conversation as one text, and its images, because not every plug-in reads the parts and turns of a conversation.

        If there are several images, the text names the place of each image.
        """
        texts, images = list[str](), list[EncodedImage]()
        several = bool(question.exemplars)
        for message in render(question):
            texts.append("\n\nYour answer was:\n" if message.role == "assistant" else "\n\n" * bool(texts))
            for part in message.parts:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    images.append(self.sent(part, question))
                    texts.append(f"[image {len(images)}]" * several)
        return "".join(texts), images
