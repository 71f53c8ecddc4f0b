"""What all hosted judges share: images encoded once within a provider's limits, prices, the worst case, the key."""

import base64
import hashlib
import io
import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from PIL import Image
from pydantic import JsonValue, TypeAdapter, ValidationError

from cascadevlm.budget import NANODOLLARS
from cascadevlm.errors import BackendError, FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.judge import Judge, verdict_from_text
from cascadevlm.pricing import FREE, Price, find_price
from cascadevlm.prompt import answer_format, options, render
from cascadevlm.retry import retry_after
from cascadevlm.types import Exemplar, Question, Usage, Verdict

LOSSLESS_PIXELS = 256 * 256
"""Images up to this size go as PNG: JPEG would blur what little they show."""

JPEG_QUALITY = 90
MESSAGE_OVERHEAD_TOKENS = 64
"""More than any provider adds for roles and separators of our three messages."""

UNKNOWN_IMAGE_PIXELS_PER_TOKEN = 14 * 14
"""For models without a published rule: one token for the smallest patch in use, more than any model is known to take."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a provider accepts: the longest side in pixels and the size of the encoded bytes."""

    longest_side: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it is sent."""

    data: bytes
    media_type: Literal["image/png", "image/jpeg"]
    width: int
    height: int

    @cached_property
    def digest(self) -> str:
        """sha256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{self.base64}"


def encode_image(image: Image.Image, limits: ImageLimits) -> EncodedImage:
    """Shrink an RGB image to the limits and encode it, small ones without loss."""
    if max(image.size) > limits.longest_side:
        image = image.copy()
        image.thumbnail((limits.longest_side, limits.longest_side), Image.Resampling.LANCZOS)
    while True:
        lossless = image.width * image.height <= LOSSLESS_PIXELS
        buffer = io.BytesIO()
        image.save(buffer, "PNG") if lossless else image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        if buffer.tell() <= limits.max_bytes:
            media_type: Literal["image/png", "image/jpeg"] = "image/png" if lossless else "image/jpeg"
            return EncodedImage(data=buffer.getvalue(), media_type=media_type, width=image.width, height=image.height)
        image = image.resize((max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)), Image.Resampling.LANCZOS)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from a provider, before it is read: the text, why there is none, and what is billed."""

    text: str
    usage: Usage
    refusal: str | None = None
    cut_off: bool = False
    probabilities: Mapping[str, float] | None = None


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


def text_of_json(text: str) -> str:
    """An answer given as JSON in the form that prompts ask for; any other text unchanged."""
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    if not isinstance(fields, dict) or not isinstance(fields.get("answer"), str):
        return text
    return f"{fields.get('reasoning') or ''}\nANSWER: {fields['answer']}".strip()


def normalised(masses: Mapping[str, float]) -> Mapping[str, float] | None:
    """The same masses, summing to 1; None where there is none."""
    total = sum(masses.values())
    return {name: mass / total for name, mass in masses.items()} if total > 0 else None


OVERLOADED = frozenset({503, 529})
NEVER_CONNECTED = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"})
EXHAUSTED = ("insufficient_quota", "billing_hard_limit_reached", "billing_error", "spend_limit")


def translate(exc: Exception, errors: Mapping[str, type[JudgeError]], *, secret: str) -> JudgeError:
    """One of ours for an SDK's exception, by the name of its class or the nearest of its bases.

    Args:
        errors: ours by the names of the SDK's classes.
        secret: the key, which must not get into a message.
    """
    kind = next((errors[base.__name__] for base in type(exc).__mro__ if base.__name__ in errors), TransientError)
    status = getattr(exc, "status_code", None)
    message = f"{type(exc).__name__}: {exc}".replace(secret, "***")[:500]
    headers = getattr(getattr(exc, "response", None), "headers", {})
    if any(word in message for word in EXHAUSTED):
        return FatalError(message, hint="The account's quota or spending limit is exhausted.")
    if kind is RateLimited or status in OVERLOADED:
        return RateLimited(message, retry_after=retry_after(headers))
    if kind is JudgeError:  # a status without a class of its own
        kind = TransientError if status is None or status >= 500 or status == 408 else PermanentError
    broke_off = status is None and type(exc.__cause__).__name__ not in NEVER_CONNECTED
    return kind(message, may_be_billed=broke_off and kind is TransientError)


class HostedJudge(Judge):
    """A judge behind an API that charges by the token.

    Attributes:
        provider: whose prices hold.
        limits: what the provider accepts.
        model: as the provider names it.
        base_url: another endpoint than the provider's.
        api_key_env: the environment variable that holds the key.
    """

    provider: ClassVar[str]
    limits: ClassVar[ImageLimits]

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key_env: str,
        price: Mapping[str, JsonValue] | float | None,
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

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine, and so free and without a key."""
        return urlsplit(self.base_url or "").hostname in ("localhost", "127.0.0.1", "::1")

    @cached_property
    def price(self) -> Price:
        """What the model charges: as given, nothing on this machine, else as the table says.

        Raises:
            BackendError: if the price is unknown.
        """
        if self.given_price is not None:
            try:
                return FREE if self.given_price == 0 else TypeAdapter(Price).validate_python(self.given_price)
            except ValidationError as exc:
                problem = exc.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise BackendError(f"The price of {self.spec!r} is wrong at {where!r}: {problem['msg']}.") from exc
        price = FREE if self.is_local else find_price(self.provider, self.model)
        if price is None:
            raise BackendError(
                f"The price of {self.spec!r} is unknown.",
                hint="Give options = { price = { input = 2.5, output = 10 } } (dollars per million tokens), or price = 0.",
            )
        return price

    def api_key(self) -> str:
        """The key from the environment; any text does on this machine.

        Raises:
            BackendError: naming the variable, if it is not set.
        """
        key = os.environ.get(self.api_key_env) or ("local" if self.is_local else None)
        if key is None:
            raise BackendError(f"{self.spec!r} needs a key.", hint=f"Set the environment variable {self.api_key_env}.")
        return key

    async def prepare(self) -> None:
        self.price  # noqa: B018  # raises where it is unknown
        self.connect()

    @abstractmethod
    def connect(self) -> None:
        """Make the client.

        Raises:
            BackendError: if there is no key.
        """

    def encoded(self, shown: Question | Exemplar) -> EncodedImage:
        """The image of a question or exemplar as it is sent; encoded at the first call."""
        if self.limits not in shown.encoded:
            shown.encoded[self.limits] = encode_image(shown.image, self.limits)
        return shown.encoded[self.limits]

    def sent(self, image: Image.Image, question: Question) -> EncodedImage:
        """A rendered image of a question, its own or an exemplar's, as it is sent."""
        shown = next(shown for shown in (question, *question.exemplars) if shown.image is image)
        return self.encoded(shown)

    def image_digest(self, question: Question) -> str:
        return self.encoded(question).digest

    def read(self, reply: Reply, question: Question) -> Verdict:
        """The verdict a reply amounts to; refusals and answers cut off are no reason to ask again."""
        usage = replace(reply.usage, dollars=self.price.nanodollars(reply.usage) / NANODOLLARS, requests=1)
        if reply.refusal is not None:
            return Verdict(outcome="refused", text=reply.text, error=reply.refusal, judge=self.spec, usage=usage)
        if reply.cut_off:
            error = f"The answer was cut off at {self.output_limit(question)} tokens; raise max_tokens."
            return Verdict(outcome="failed", text=reply.text, error=error, judge=self.spec, usage=usage)
        text = text_of_json(reply.text)
        return verdict_from_text(text, question, judge=self.spec, usage=usage, probabilities=reply.probabilities)

    def output_limit(self, question: Question) -> int:
        """The most tokens an answer may have."""
        return self.max_tokens or answer_format(question).max_tokens

    def worst_case_usage(self, question: Question) -> Usage:
        """No tokenizer makes more tokens of a text than it has bytes."""
        text = sum(len(part.encode()) for message in render(question) for part in message.parts if isinstance(part, str))
        schema = 3 * sum(len(name.encode()) for name in options(question).values())
        images = sum(self._image_tokens(self.encoded(shown)) for shown in (question, *question.exemplars))
        return Usage(
            input_tokens=text + schema + images + MESSAGE_OVERHEAD_TOKENS + self.fixed_input_tokens,
            output_tokens=self.output_limit(question),
        )

    fixed_input_tokens: ClassVar[int] = 512
    """What a backend's own instructions, schema and tool definitions take at most."""

    def _image_tokens(self, image: EncodedImage) -> int:
        if self.price.image is None:
            return image.width * image.height // UNKNOWN_IMAGE_PIXELS_PER_TOKEN + 1
        return self.price.image.tokens(image.width, image.height)

    def worst_case(self, question: Question) -> int:
        return self.price.nanodollars(self.worst_case_usage(question))

    def worst_case_tokens(self, question: Question) -> int:
        usage = self.worst_case_usage(question)
        return usage.input_tokens + usage.output_tokens
