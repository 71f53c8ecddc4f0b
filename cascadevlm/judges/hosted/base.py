"""Base class of judges behind an API that charges by the token: prices, requests, answers."""

import asyncio
import re
import time
from abc import abstractmethod
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeAlias

from PIL import Image
from pydantic import JsonValue, ValidationError

from cascadevlm.base.encoding import EncodedImage, ImageLimits, encode_image, size_within
from cascadevlm.base.errors import BackendError, FatalError, JudgeError, PermanentError, RateLimited, Refused, TransientError
from cascadevlm.base.portable import Live
from cascadevlm.base.secrets import is_address
from cascadevlm.base.types import NANODOLLARS, Exemplar, Question, Usage, Verdict
from cascadevlm.judges.answers import concluding_answer, is_json_answer
from cascadevlm.judges.base import Quote, before_sending, verdict_from_text
from cascadevlm.judges.hosted.connection import RemoteJudge
from cascadevlm.judges.hosted.replies import Reply
from cascadevlm.judges.pricing import FREE, PROVIDER_OF_HOST, Price, find_price
from cascadevlm.judges.prompt import answer_format, once_per_question, options, render

FIXED_TOKENS = 600
"""Upper limit of the tokens that a provider adds for roles, separators, the fixed part of a schema and the instructions of a
forced tool.
"""

REASONING_TOKENS = 4096
"""Extra tokens for models that think before they answer, so that the thoughts do not use up the limit of the answer."""

USUAL_BYTES_PER_TOKEN = 4
"""Bytes of English text per token. Only estimates use this figure."""

USUAL_SHARE_OF_LIMIT = 1 / 3
"""Length of a usual answer as a share of its limit. Only estimates use this figure."""

UNKNOWN_IMAGE_PIXELS_PER_TOKEN = 14 * 14
"""Pixels per image token for models without a published rule: one token per patch of the smallest size in use."""

UNKNOWN_SMALL_IMAGE_TOKENS = 5 * 576
"""The worst case of a small image for models without a published rule: LLaVA-NeXT cuts it into five tiles of 576 tokens."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """The parts of a request that some endpoints do not accept.

    Attributes:
        schema: whether the request has a schema for the answer.
        completion_tokens: whether the limit of tokens has its newer name, ``max_completion_tokens``.
    """

    schema: bool
    completion_tokens: bool = False


NAMES_SCHEMA = re.compile(
    r"response.?format|output.?(config|format)|text\.format|schema|structured|grammar|requested parameters", re.IGNORECASE
)
"""Matches errors that concern the schema."""

FIRST_ALONE_SECONDS = 5.0
"""Maximum time, in seconds, that other questions wait while the first question finds out which form the endpoint accepts."""

PriceOption: TypeAlias = Mapping[str, JsonValue] | float | None
"""A price in dollars per million tokens, with the keys of `Price`. 0: the model is free. None: the price from the price table."""


@once_per_question
def input_bytes(question: Question) -> int:
    """Bytes of the text of a question, and of the names in its schema."""
    text = sum(len(part.encode()) for message in render(question) for part in message.parts if isinstance(part, str))
    return text + 3 * sum(len(name.encode()) for name in options(question).values())


class HostedJudge(RemoteJudge):
    """A judge behind an API that charges by the token.

    Attributes:
        limits: the image sizes that the provider accepts.
        model: name of the model at the provider.
        given_price: the price from the configuration.
        max_tokens: maximum number of tokens of an answer. None: see `output_limit`.
    """

    live: ClassVar[Live] = (("_first", lambda: None),)

    limits: ClassVar[ImageLimits]

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key_env: str,
        headers: Mapping[str, str] | None,
        timeout: float | None,
        price: PriceOption,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        max_tokens: int | None,
    ) -> None:
        super().__init__(base_url=base_url, api_key_env=api_key_env, headers=headers, timeout=timeout)
        self.spec = f"{self.provider}:{model}"
        self.model = model
        self.given_price = price
        self.concurrency = concurrency
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self.max_tokens = max_tokens
        self._form: Form | None = None  # None until the endpoint accepted one
        self._schema_works = False
        self._first: asyncio.Future[FatalError | None] | None = (
            None  # done when no question waits for the first question any more
        )
        self._found_out = False

    @cached_property
    def price(self) -> Price:
        """The price of the model.

        The given price replaces values of the price tables. The tables are valid only at the hosts in `PROVIDER_OF_HOST`. A model
        on this machine is free if no price is given.

        Raises:
            BackendError: if the price is unknown or wrong.
        """
        if self.endpoint and not is_address(self.endpoint):
            hint = "Write http://host:port/v1 or https://…. In a password, write %2F for '/', %23 for '#' and %3F for '?'."
            raise BackendError(f"The base_url of {self.spec!r} is not an address.", hint=hint)  # not shown: it may be secret
        if self.given_price is None and self.is_local:
            return FREE
        provider, model = self.priced_as
        known = find_price(provider, model) if provider else None
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
            return Price.model_validate({**(known.model_dump(exclude={"origin"}) if known else {}), **self.given_price})
        except ValidationError as exc:
            problem = exc.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise BackendError(
                f"The price of {self.spec!r} is wrong at {where!r}: {problem['msg']}.", hint="Correct the key price in options."
            ) from exc

    @property
    def priced_as(self) -> tuple[str | None, str]:
        """The provider and the model whose row in the price tables is valid for this judge. The provider is None if no row is."""
        return PROVIDER_OF_HOST.get(self.host) if self.host else self.provider, self.model

    def check(self) -> str:
        price = str(self.price)
        self.require_allowed()
        self.api_key()
        return price if self.costs_money else "costs nothing"

    @property
    def costs_money(self) -> bool:
        return self.price != FREE

    def encoded(self, shown: Question | Exemplar) -> EncodedImage:
        """The encoded image of a question or exemplar. The first call encodes it."""
        if self.limits not in shown.encoded:
            shown.encoded[self.limits] = encode_image(shown.image, self.limits)
        return shown.encoded[self.limits]

    def sent(self, image: Image.Image, question: Question) -> EncodedImage:
        """The encoded form of an image in the rendered question: the image of the question or of an exemplar."""
        if image is question.image:
            return self.encoded(question)
        return next(self.encoded(exemplar) for exemplar in question.exemplars if exemplar.image is image)

    def image_digest(self, question: Question) -> str:
        return self.encoded(question).digest

    @property
    @abstractmethod
    def first_form(self) -> Form:
        """The form of the first request."""

    @property
    @abstractmethod
    def schema_is_optional(self) -> bool:
        """Whether the judge may ask without a schema if the endpoint does not accept one."""

    @property
    def form(self) -> Form:
        """The form of the next request: the form that the endpoint accepted, or the first form."""
        return self._form or self.first_form

    @abstractmethod
    async def reply(self, question: Question, form: Form) -> Reply:
        """Send one request for a question, and return the reply."""

    async def ask_as_taken(self, question: Question) -> Verdict:
        """The verdict on a question, asked in a form that the endpoint accepts.

        The first question finds this form. The other questions wait for it, at most `FIRST_ALONE_SECONDS`.
        """
        loop = asyncio.get_running_loop()
        first = self._first
        if first is None and not self._found_out:
            return await self._ask_first(question, loop)
        if first is not None and first.get_loop() is loop:
            with before_sending():
                await asyncio.wait([first])
            if fatal := first.result():  # the same error would stop this question
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
                other = None if exc.may_be_billed else self.other_form(form, exc)  # one reservation covers all requests
                if other is None or other in tried:
                    raise
                form = other
            else:
                self._learn(form, verdict)
                return verdict

    def other_form(self, form: Form, error: JudgeError) -> Form | None:
        """The form to try after an error that was not billed. None if another form would not help."""
        names_schema = not isinstance(error, RateLimited) and NAMES_SCHEMA.search(str(error))
        return replace(form, schema=False) if names_schema and self.schema_is_optional else None

    def _learn(self, form: Form, verdict: Verdict) -> None:
        """Remember a form that got an answer.

        If the request has a schema and the answer is not JSON, the endpoint ignores schemas. An empty, refused or cut-off
        answer does not prove this. After a schema has worked once, all requests have the schema.
        """
        if form.schema and verdict.outcome not in ("refused", "failed") and verdict.text.strip():
            self._schema_works = self._schema_works or is_json_answer(verdict.text)
            form = replace(form, schema=self._schema_works or not self.schema_is_optional)
        if form.schema or not self._schema_works:
            self._form = form

    async def ask(self, request: Awaitable[Reply], question: Question) -> Verdict:
        """The verdict of one request. Its usage contains the time of the request in seconds."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                reply = await self.call(request)
            verdict = self.read(reply, question)
        except TimeoutError:
            raise TransientError(
                f"There was no answer within {self.timeout:g} seconds.", may_be_billed=True, hint="Raise the option timeout."
            ) from None
        except Refused as exc:
            verdict = self._refused(exc)
        return replace(verdict, usage=replace(verdict.usage, seconds=time.perf_counter() - began))

    def _refused(self, error: Refused) -> Verdict:
        """The verdict for an error response that concerns one image. Such a response is not billed."""
        return Verdict(outcome="refused", error=str(error), judge=self.spec, usage=Usage(requests=1))

    def read(self, reply: Reply, question: Question, *, batch: bool = False) -> Verdict:
        """The verdict for a reply. Refusals and cut-off answers become verdicts, because asking again would not help."""
        used, bill = self._bill(reply.usage, question, batch=batch)
        usage = replace(used, dollars=bill / NANODOLLARS, requests=1)
        if reply.refusal is not None:
            return Verdict(outcome="refused", text=reply.text, error=reply.refusal, judge=self.spec, usage=usage)
        if reply.cut_off:
            error = f"The answer was cut off at {self.output_limit(question)} tokens. Raise max_tokens."
            return Verdict(outcome="failed", text=reply.text, error=error, judge=self.spec, usage=usage)
        text = reply.text if reply.text.strip() else concluding_answer(reply.thoughts)
        if not text.strip() and reply.thoughts.strip():
            error = "The answer is empty: the response contains only thoughts, and they do not end in an answer."
            return Verdict(outcome="unparsed", error=error, judge=self.spec, usage=usage)
        return verdict_from_text(text, question, judge=self.spec, usage=usage, probabilities=reply.probabilities)

    def _bill(self, usage: Usage | None, question: Question, *, batch: bool) -> tuple[Usage, int]:
        """The usage of a request and its cost in nanodollars.

        The usage that the endpoint reports counts if its cost is at most the worst case. If not, the worst case counts.
        """
        input_tokens, output_tokens = self.most_tokens(question)
        worst = self.price.worst_case(input_tokens, output_tokens, batch=batch)
        if usage is not None and (bill := self.price.nanodollars(usage, batch=batch)) <= worst:
            return usage, bill
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens) if self.costs_money else Usage(), worst

    def output_limit(self, question: Question) -> int:
        """Maximum number of tokens of an answer: ``max_tokens``. Default: the limit of the prompt plus the tokens of the
        longest name and, for models that think, `REASONING_TOKENS`.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        name = max(len(name.encode()) for name in options(question).values()) // USUAL_BYTES_PER_TOKEN
        return answer_format(question).max_tokens + name + (REASONING_TOKENS if self.price.reasons else 0)

    def _sent_sizes(self, question: Question) -> list[tuple[int, int]]:
        """Width and height of all images as they are sent, in pixels.

        If an image is not encoded yet, its size within the limits is returned. Encoding may make the image smaller, but not
        larger.
        """
        shown: tuple[Question | Exemplar, ...] = (question, *question.exemplars)
        return [self._sent_size(each) for each in shown]

    def _sent_size(self, shown: Question | Exemplar) -> tuple[int, int]:
        # A worker of a cluster gets encoded images without their pixels.
        encoded = shown.encoded.get(self.limits)
        return (encoded.width, encoded.height) if encoded else size_within(shown.image.size, self.limits)

    def most_tokens(self, question: Question) -> tuple[int, int]:
        """Maximum numbers of input tokens and output tokens of a request. A text never has more tokens than bytes."""
        least = UNKNOWN_SMALL_IMAGE_TOKENS if self.price.image is None else 0
        images = sum(max(self._image_tokens(size), least) for size in self._sent_sizes(question))
        return input_bytes(question) + images + FIXED_TOKENS, self.output_limit(question)

    def quote(self, question: Question, *, batch: bool = False) -> Quote:
        """The price of one request for this question.

        Args:
            batch: whether the question is asked in the provider's batch API.
        """
        input_tokens, output_tokens = self.most_tokens(question)
        limit = self.price.input_limit
        if limit is not None and input_tokens > limit:
            raise PermanentError(
                f"The question may take {input_tokens} tokens, but the price is only known up to {limit} tokens.",
                hint="Use fewer or smaller images, or set price in options.",
            )
        usual = Usage(
            input_tokens=input_bytes(question) // USUAL_BYTES_PER_TOKEN
            + sum(map(self._image_tokens, self._sent_sizes(question))),
            output_tokens=int(output_tokens * USUAL_SHARE_OF_LIMIT),
        )
        return Quote(
            worst_case=self.price.worst_case(input_tokens, output_tokens, batch=batch),
            usual_case=self.price.nanodollars(usual, batch=batch),
            tokens=input_tokens + output_tokens,
        )

    def _image_tokens(self, size: tuple[int, int]) -> int:
        width, height = size
        if self.price.image is None:
            return width * height // UNKNOWN_IMAGE_PIXELS_PER_TOKEN + 1
        return self.price.image.tokens(width, height)
