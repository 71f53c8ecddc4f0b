"""What all hosted judges share: answers held to a schema, prices, the worst case, the key, batches."""

import asyncio
import importlib.util
import os
import re
import time
from abc import abstractmethod
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

from PIL import Image
from pydantic import BaseModel, JsonValue, ValidationError

from cascadevlm.base.encoding import EncodedImage, ImageLimits, encode_image, size_within
from cascadevlm.base.errors import (
    BackendError,
    CascadeError,
    FatalError,
    JudgeError,
    PermanentError,
    RateLimited,
    Refused,
    TransientError,
)
from cascadevlm.base.loop import PerLoop
from cascadevlm.base.portable import Live
from cascadevlm.base.secrets import credentials_of, is_address, login_of, scrubbed, shown_address
from cascadevlm.base.types import NANODOLLARS, Exemplar, Question, Usage, Verdict
from cascadevlm.judges.base import Judge, before_sending, verdict_from_text
from cascadevlm.judges.hosted.errors import ErrorResponse, translate
from cascadevlm.judges.hosted.transport import guard
from cascadevlm.judges.pricing import FREE, Price, find_price
from cascadevlm.judges.prompt import answer_format, concluding_answer, is_json_answer, options, render

if TYPE_CHECKING:
    import httpx2

HAS_AIOHTTP = importlib.util.find_spec("aiohttp") is not None
"""Whether the SDKs' faster transport can be used."""

LOCAL_ONLY = "CASCADEVLM_LOCAL_ONLY"
"""The environment variable that keeps judges from paid endpoints, whatever the configuration says."""

NO_KEY = "no-key-needed"
"""What servers on this machine are sent in place of a key."""

FIXED_TOKENS = 600
"""More than any provider adds for roles, separators, a schema's fixed part and the instructions of a forced tool."""

REASONING_TOKENS = 4096
"""Room for the thoughts of models that have them, so that an answer is not cut off before it begins."""

MOST_TOKENS = 100_000_000
"""More than any model takes or gives in one request."""

USUAL_BYTES_PER_TOKEN = 4
USUAL_SHARE_OF_LIMIT = 1 / 3
"""How long English text is in tokens, and how much of its limit an answer takes: for estimates alone."""

UNKNOWN_IMAGE_PIXELS_PER_TOKEN = 14 * 14
"""For models without a published rule: one token per patch of the smallest size in use."""

UNKNOWN_SMALL_IMAGE_TOKENS = 5 * 576
"""The most that a model without a published rule takes for a small image, in the worst case: LLaVA-NeXT makes five tiles of 576
tokens of it."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from a provider, before it is read: the text, why there is none, and what is billed, if it says; and the
    thoughts that the provider tells apart from the text."""

    text: str
    usage: Usage | None
    thoughts: str = ""
    refusal: str | None = None
    cut_off: bool = False
    probabilities: Mapping[str, float] | None = None


def reported(source: object, *path: str) -> object:
    """What an object of an SDK holds under a path; None where it holds nothing: SDKs do not validate what they are sent."""
    for name in path:
        source = getattr(source, name, None)
    return source


def believed_usage(
    *, input_tokens: object, output_tokens: object, cached: object, written: object, apart: bool = False
) -> Usage | None:
    """What a provider says was used; None where the counts cannot be true. It may leave out what its prompt cache gave and took.

    Args:
        apart: whether ``cached`` and ``written`` are counted beside ``input_tokens``, not among them.
    """
    counts = (input_tokens, output_tokens, 0 if cached is None else cached, 0 if written is None else written)
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
        return None
    into, out, read, kept = cast(tuple[int, int, int, int], counts)
    into += read + kept if apart else 0
    if into == 0 or read + kept > into:
        return None
    return Usage(input_tokens=into, output_tokens=out, cached_input_tokens=read, cache_write_tokens=kept)


def choices(question: Question, *, by_key: bool) -> list[str]:
    """What an answer held to a schema may be: the names offered, or their keys."""
    offered = options(question)
    names = list(offered.values())
    return list(offered) if by_key or len(set(names)) < len(names) else names


def answer_schema(question: Question, *, by_key: bool = False) -> dict[str, object]:
    """The JSON schema of an answer, the reasoning before it where the prompt asks for any."""
    answer = {"type": "string", "enum": choices(question, by_key=by_key)}
    reasoning = {"reasoning": {"type": "string"}} if answer_format(question).reasoning else {}
    properties = {**reasoning, "answer": answer}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def texts_of(content: object) -> tuple[str, str]:
    """The text of an answer and the thoughts told apart from it; the content is one text or a list of parts."""
    if isinstance(content, str):
        return content, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content if isinstance(content, list) else ():
        match part.model_dump(warnings=False) if isinstance(part, BaseModel) else part:
            case str(text) | {"type": "text" | "output_text", "text": str(text)}:
                texts.append(text)
            case {"thinking": thought} | {"reasoning": thought} | {"summary": thought} | {"text": thought}:
                thoughts.append(texts_of(thought)[0])
    return "\n".join(texts), "\n".join(thoughts)


def normalised(masses: Mapping[str, float]) -> Mapping[str, float] | None:
    """The same masses, summing to 1; None where there is none."""
    total = sum(masses.values())
    return {name: mass / total for name, mass in masses.items()} if total > 0 else None


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """What a provider takes in one batch: so many requests, and so many bytes of them."""

    requests: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """What not every endpoint takes of a request: a schema for the answer; the limit of tokens under its newer name."""

    schema: bool
    completion_tokens: bool = False


NAMES_SCHEMA = re.compile(
    r"response.?format|output.?(config|format)|text\.format|schema|structured|grammar|requested parameters", re.IGNORECASE
)
"""How an error tells that it is about the schema."""

FIRST_ALONE_SECONDS = 5.0
"""How long the first question may keep others waiting while it finds out what the endpoint takes."""


T = TypeVar("T")

PriceOption: TypeAlias = Mapping[str, JsonValue] | float | None
"""Dollars per million tokens, as in `Price`; 0 for nothing; None for what the table says."""


class Client(Protocol):
    """A client of an SDK."""

    _client: "httpx2.AsyncClient"

    async def close(self) -> None: ...


@dataclass(kw_only=True)
class _Connection:
    """What a judge has in one event loop: a client, and how many runs use it."""

    client: Client | None = None
    runs: int = 0


class HostedJudge(Judge):
    """A judge behind an API that charges by the token.

    Attributes:
        provider: whose prices hold, at its own ``hosts``.
        limits: what the provider accepts.
        batch_limits: what its batch API accepts.
        errors: ours for every exception of its SDK, by name; those that come with a status are judged by that.
        model: as the provider names it.
        base_url: another endpoint than the provider's.
        api_key_env: the environment variable that holds the key.
        client: the user's own, if any.
        headers: sent with every request; secret.
        timeout: seconds that a request may take in all.
    """

    live: ClassVar[Live] = (("_first", lambda: None),)

    client: "Client | None" = None
    headers: Mapping[str, str] | None = None
    timeout: float | None = None
    _reached = False  # whether the endpoint was ever connected to
    _form: Form | None = None  # once found out
    _schema_works = False
    _first: "asyncio.Future[FatalError | None] | None" = None  # done when no question waits for the first any more
    _found_out = False
    provider: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]]
    limits: ClassVar[ImageLimits]
    batch_limits: ClassVar[BatchLimits]
    errors: ClassVar[Mapping[str, type[JudgeError]]]

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key_env: str,
        price: PriceOption,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        max_tokens: int | None,
    ) -> None:
        self.spec = f"{self.provider}:{model}"
        self.model = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.given_price = price
        self.concurrency = concurrency
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self.max_tokens = max_tokens
        self._connections: PerLoop[_Connection] = PerLoop(_Connection)

    @property
    def endpoint(self) -> str | None:
        """Where the model is: ``base_url``, or what the SDK takes from the environment; None for the provider's own."""
        return self.base_url or os.environ.get(f"{self.provider.upper()}_BASE_URL") or None

    @property
    def address(self) -> str | None:
        """The endpoint without credentials: what is told, and kept."""
        return shown_address(self.endpoint) if self.endpoint else None

    @property
    def host(self) -> str | None:
        """Of the endpoint; None for the provider's own."""
        return urlsplit(self.endpoint).hostname if self.endpoint else None

    @property
    def is_own_endpoint(self) -> bool:
        """Whether the endpoint is the provider's own."""
        return self.host in (None, *self.hosts)

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine, and so free and without a key."""
        return self.host in ("localhost", "127.0.0.1", "::1")

    @cached_property
    def price(self) -> Price:
        """What the model charges: as given, on top of what the table says of the provider's own models; nothing on this machine.

        Raises:
            BackendError: if the price is unknown or wrong.
        """
        if self.endpoint and not is_address(self.endpoint):
            hint = "Write http://host:port/v1 or https://…, and in a password %2F for '/', %23 for '#', %3F for '?'."
            raise BackendError(
                f"The base_url of {self.spec!r} is no address.", hint=hint
            )  # untold: nobody knows what in it is secret
        if self.given_price is None and self.is_local:
            return FREE
        known = find_price(self.provider, self.model) if self.is_own_endpoint else None
        if isinstance(self.given_price, int | float):
            if self.given_price == 0:
                return FREE
            raise BackendError(f"The price of {self.spec!r} is {self.given_price!r}.", hint="Give input and output, or 0.")
        if self.given_price is None:
            if known is None:
                raise BackendError(
                    f"The price of {self.spec!r}{f' at {self.host}' if self.host else ''} is unknown.",
                    hint="Give options = { price = { input = 2.5, output = 10 } } (dollars per million tokens), or price = 0.",
                )
            return known
        try:
            return Price.model_validate({**(known.model_dump() if known else {}), **self.given_price})
        except ValidationError as exc:
            problem = exc.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise BackendError(f"The price of {self.spec!r} is wrong at {where!r}: {problem['msg']}.") from exc

    @property
    def costs_money(self) -> bool:
        return self.price != FREE

    def api_key(self) -> str:
        """The key from the environment; any text does on this machine.

        Raises:
            BackendError: naming the variable, if it is not set or holds what no key does.
        """
        key = os.environ.get(self.api_key_env) or (NO_KEY if self.is_local else None)
        if key is None:
            raise BackendError(f"{self.spec!r} needs a key.", hint=f"Set the environment variable {self.api_key_env}.")
        if stray := re.search(r"^\s|[^ -~]|\s$", key):
            raise BackendError(
                f"The key of {self.spec!r} holds {stray[0]!r} at position {stray.start() + 1} of {len(key)}, which no key does.",
                hint=f"Set {self.api_key_env} without spaces around it, line breaks and typographic quotes.",
            )
        return key

    def __getstate__(self) -> dict[str, object]:
        if self.client is not None:
            raise BackendError(
                f"{self.spec!r} has a client of its own, which cannot be copied.", hint="Give base_url and headers instead."
            )
        return super().__getstate__()

    async def prepare(self) -> None:
        self._connections.get().runs += 1
        self.price  # noqa: B018  # raises where it is unknown
        self.connected()

    async def aclose(self) -> None:
        """Close the client when the last run in this event loop has ended."""
        connection = self._connections.get()
        connection.runs -= 1
        if connection.runs <= 0:
            await self.disconnect()

    @abstractmethod
    def _new_client(self) -> Client:
        """A client of the SDK.

        Raises:
            BackendError: if there is no key.
        """

    def connected(self) -> Client:
        """The user's own client or, in every event loop, one of ours; made at the first call.

        Raises:
            BackendError: if there is no key, or if ``$CASCADEVLM_LOCAL_ONLY`` is set and the endpoint is elsewhere.
        """
        connection = self._connections.get()
        if connection.client is None:
            self.require_allowed()
            connection.client = self.client or self._new_client()
            guard(connection.client._client)
            if self.client is None and self.endpoint and (login := login_of(self.endpoint)):
                connection.client._client.auth = login
        return connection.client

    async def disconnect(self) -> None:
        """Let go of the client of this event loop; close it, unless it is the user's own."""
        connection = self._connections.pop()
        if self.client is None and connection is not None and connection.client is not None:
            await connection.client.close()

    def encoded(self, shown: Question | Exemplar) -> EncodedImage:
        """The image of a question or exemplar as it is sent; encoded at the first call."""
        if self.limits not in shown.encoded:
            shown.encoded[self.limits] = encode_image(shown.image, self.limits)
        return shown.encoded[self.limits]

    def sent(self, image: Image.Image, question: Question) -> EncodedImage:
        """A rendered image of a question, its own or an exemplar's, as it is sent."""
        if image is question.image:
            return self.encoded(question)
        return next(self.encoded(exemplar) for exemplar in question.exemplars if exemplar.image is image)

    def image_digest(self, question: Question) -> str:
        return self.encoded(question).digest

    def require_allowed(self) -> None:
        """Refuse to be connected where only this machine may be asked, as in tests.

        Raises:
            BackendError: if ``$CASCADEVLM_LOCAL_ONLY`` is set and the endpoint is elsewhere.
        """
        if os.environ.get(LOCAL_ONLY) and not self.is_local:
            raise BackendError(f"{self.spec!r} is not on this machine, and {LOCAL_ONLY} is set.")

    @property
    @abstractmethod
    def first_form(self) -> Form:
        """The form of the first request."""

    @property
    @abstractmethod
    def schema_is_optional(self) -> bool:
        """Whether the judge may ask without a schema where the endpoint does not take one."""

    @property
    def form(self) -> Form:
        """The form of requests, as far as it is known what the endpoint takes."""
        return self._form or self.first_form

    @abstractmethod
    async def reply(self, question: Question, form: Form) -> Reply:
        """What the model replies to a question."""

    @property
    @abstractmethod
    def secret(self) -> str:
        """The key in use, to be kept out of messages."""

    @property
    def secrets(self) -> list[str]:
        """All that must be kept out of messages: the key, the values of headers, the credentials of the address."""
        headers = [text for value in (self.headers or {}).values() for text in (value, value.rpartition(" ")[2])]
        return [self.secret, *headers, *(credentials_of(self.endpoint) if self.endpoint else ())]

    async def call(self, request: Awaitable[T]) -> T:
        """The result of a request to the provider.

        Raises:
            JudgeError: in place of whatever the SDK raises, by `translate`.
        """
        try:
            result = await request
        except Exception as exc:
            known = exc if isinstance(exc, CascadeError) else exc.__cause__  # an SDK may wrap ours
            if isinstance(known, CascadeError):
                error = known
            else:
                error = translate(exc, self.errors, secret=self.secret, reached=self._reached)
                self._reached = self._reached or not isinstance(error, FatalError)
            error.args = tuple(scrubbed(str(text), self.secrets) for text in error.args)
            shows_secret = error is known or scrubbed(str(exc), self.secrets) != str(exc)
            raise error from (None if shows_secret else exc)
        self._reached = True
        return result

    async def ask_as_taken(self, question: Question) -> Verdict:
        """The verdict on a question, asked in a form that the endpoint takes. The first question finds the form out; for
        `FIRST_ALONE_SECONDS` at most, others wait for it."""
        loop = asyncio.get_running_loop()
        first = self._first
        if first is None and not self._found_out:
            return await self._ask_first(question, loop)
        if first is not None and first.get_loop() is loop:
            with before_sending():
                await asyncio.wait([first])
            if fatal := first.result():  # what stopped the first question would stop this one
                raise fatal
        return await self._adapt(question)

    async def _ask_first(self, question: Question, loop: asyncio.AbstractEventLoop) -> Verdict:
        self._first = first = loop.create_future()
        patience = loop.call_later(FIRST_ALONE_SECONDS, self._let_others_go, first, None)
        fatal = None
        try:
            return await self._adapt(question)
        except FatalError as exc:
            fatal = exc
            raise
        finally:
            patience.cancel()
            self._let_others_go(first, fatal)

    def _let_others_go(self, first: "asyncio.Future[FatalError | None]", fatal: FatalError | None) -> None:
        self._first, self._found_out = None, fatal is None
        if not first.done():
            first.set_result(fatal)

    async def _adapt(self, question: Question) -> Verdict:
        form, tried = self.form, set[Form]()
        while True:
            tried.add(form)
            try:
                verdict = await self.ask(self.reply(question, form), question)
            except JudgeError as exc:
                other = None if exc.may_be_billed else self.other_form(form, exc)  # all requests go by one reservation
                if other is None or other in tried:
                    raise
                form = other
            else:
                self._learn(form, verdict)
                return verdict

    def other_form(self, form: Form, error: JudgeError) -> Form | None:
        """The form to ask in after an error that was not billed; None where another form would not help."""
        names_schema = not isinstance(error, RateLimited) and NAMES_SCHEMA.search(str(error))
        return replace(form, schema=False) if names_schema and self.schema_is_optional else None

    def _learn(self, form: Form, verdict: Verdict) -> None:
        """Keep to a form that got an answer. An endpoint that answers with something else than JSON takes no notice of a schema;
        an answer that is empty, refused or cut off does not tell. A schema that worked once is only left out where it must be."""
        if form.schema and verdict.outcome not in ("refused", "failed") and verdict.text.strip():
            self._schema_works = self._schema_works or is_json_answer(verdict.text)
            form = replace(form, schema=self._schema_works or not self.schema_is_optional)
        if form.schema or not self._schema_works:
            self._form = form

    async def ask(self, request: Awaitable[Reply], question: Question) -> Verdict:
        """The verdict of one request, timed."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                reply = await self.call(request)
            verdict = self.read(reply, question)
        except TimeoutError:
            raise TransientError(f"There was no answer within {self.timeout:g} seconds.", may_be_billed=True) from None
        except Refused as exc:
            verdict = self._refused(exc)
        return replace(verdict, usage=replace(verdict.usage, seconds=time.perf_counter() - began))

    def read_row(self, row: JsonValue, question: Question) -> Verdict:
        """The verdict of a row of a batch's results.

        Raises:
            JudgeError: what the row says instead of an answer.
        """
        try:
            return self.read(self.of_batch_row(row, question), question, batch=True)
        except ErrorResponse as exc:
            error = translate(exc, self.errors, secret=self.secret)
            if isinstance(error, Refused):
                return self._refused(error)
            raise error from None

    def _refused(self, error: Refused) -> Verdict:
        """The verdict that an error response amounts to which concerns one image; such a response is not billed."""
        return Verdict(outcome="refused", error=str(error), judge=self.spec, usage=Usage(requests=1))

    def read(self, reply: Reply, question: Question, *, batch: bool = False) -> Verdict:
        """The verdict a reply amounts to; refusals and answers cut off are no reason to ask again."""
        used, bill = self._bill(reply.usage, question, batch=batch)
        usage = replace(used, dollars=bill / NANODOLLARS, requests=1)
        if reply.refusal is not None:
            return Verdict(outcome="refused", text=reply.text, error=reply.refusal, judge=self.spec, usage=usage)
        if reply.cut_off:
            error = f"The answer was cut off at {self.output_limit(question)} tokens; raise max_tokens."
            return Verdict(outcome="failed", text=reply.text, error=error, judge=self.spec, usage=usage)
        text = reply.text if reply.text.strip() else concluding_answer(reply.thoughts)
        if not text.strip() and reply.thoughts.strip():
            error = "The answer is empty: the endpoint gave nothing but thoughts, which do not end in an answer."
            return Verdict(outcome="unparsed", error=error, judge=self.spec, usage=usage)
        return verdict_from_text(text, question, judge=self.spec, usage=usage, probabilities=reply.probabilities)

    def _bill(self, usage: Usage | None, question: Question, *, batch: bool) -> tuple[Usage, int]:
        """What a request used, and its bill in nanodollars: as the endpoint says, at most the worst case."""
        input_tokens, output_tokens = self.most_tokens(question)
        worst = self.price.worst_case(input_tokens, output_tokens, batch=batch)
        if usage is not None and (bill := self.price.nanodollars(usage, batch=batch)) <= worst:
            return usage, bill
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens) if self.costs_money else Usage(), worst

    def output_limit(self, question: Question) -> int:
        """The most tokens an answer may have: the prompt's, the longest name's and, for models that have any, its thoughts."""
        if self.max_tokens is not None:
            return self.max_tokens
        name = max(len(name.encode()) for name in options(question).values()) // USUAL_BYTES_PER_TOKEN
        return answer_format(question).max_tokens + name + (REASONING_TOKENS if self.price.reasons else 0)

    def _input_bytes(self, question: Question) -> int:
        """Of the text, and of a schema's names."""
        text = sum(len(part.encode()) for message in render(question) for part in message.parts if isinstance(part, str))
        return text + 3 * sum(len(name.encode()) for name in options(question).values())

    def _sent_sizes(self, question: Question) -> list[tuple[int, int]]:
        """Of all images, as they are sent or, if they were not encoded yet, as they are within the limits: their bytes may make
        them shrink further, but not grow."""
        shown: tuple[Question | Exemplar, ...] = (question, *question.exemplars)
        return [self._sent_size(each) for each in shown]

    def _sent_size(self, shown: Question | Exemplar) -> tuple[int, int]:
        """In a worker of a cluster only what was encoded tells the size: the pixels stay behind."""
        encoded = shown.encoded.get(self.limits)
        return (encoded.width, encoded.height) if encoded else size_within(shown.image.size, self.limits)

    def most_tokens(self, question: Question) -> tuple[int, int]:
        """The most tokens that a request can take, in and out. No tokenizer makes more tokens of a text than it has bytes."""
        least = UNKNOWN_SMALL_IMAGE_TOKENS if self.price.image is None else 0
        images = sum(max(self._image_tokens(size), least) for size in self._sent_sizes(question))
        return self._input_bytes(question) + images + FIXED_TOKENS, self.output_limit(question)

    def usual_case(self, question: Question) -> int:
        text = self._input_bytes(question) // USUAL_BYTES_PER_TOKEN
        usage = Usage(
            input_tokens=text + sum(map(self._image_tokens, self._sent_sizes(question))),
            output_tokens=int(self.output_limit(question) * USUAL_SHARE_OF_LIMIT),
        )
        return self.price.nanodollars(usage)

    def _image_tokens(self, size: tuple[int, int]) -> int:
        width, height = size
        if self.price.image is None:
            return width * height // UNKNOWN_IMAGE_PIXELS_PER_TOKEN + 1
        return self.price.image.tokens(width, height)

    def worst_case(self, question: Question) -> int:
        return self._worst_case(question, batch=False)

    def batch_worst_case(self, question: Question) -> int:
        """`worst_case`, in the batch API."""
        return self._worst_case(question, batch=True)

    def _worst_case(self, question: Question, *, batch: bool) -> int:
        input_tokens, output_tokens = self.most_tokens(question)
        limit = self.price.input_limit
        if limit is not None and input_tokens > limit:
            raise PermanentError(f"The question may take {input_tokens} tokens, and the price is known up to {limit}.")
        return self.price.worst_case(input_tokens, output_tokens, batch=batch)

    def worst_case_tokens(self, question: Question) -> int:
        return sum(self.most_tokens(question))

    @abstractmethod
    def batch_row(self, key: str, question: Question) -> JsonValue:
        """A question as the batch API takes it, under ``key``."""

    @abstractmethod
    async def submit_batch(self, rows: Path, token: str) -> str:
        """Submit a file of rows, one JSON object a line; returns the batch's id. ``token`` is how `find_batch` will know it."""

    @abstractmethod
    async def find_batch(self, token: str) -> str | None:
        """The id of a batch that was submitted before, if it was."""

    @abstractmethod
    async def batch_results(self, batch_id: str) -> Mapping[str, JsonValue] | None:
        """What came back, by key; None while the batch runs. Rows without an answer may be missing.

        Raises:
            PermanentError: if the provider refused the batch as a whole.
        """

    @abstractmethod
    def of_batch_row(self, row: JsonValue, question: Question) -> Reply:
        """A row of results, read.

        Raises:
            ErrorResponse: what it says instead of an answer.
            JudgeError: if it says nothing.
        """
