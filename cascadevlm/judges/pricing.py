"""What hosted models charge: the table in ``prices.toml``, and how images are counted in tokens."""

import math
import re
import tomllib
from datetime import date
from decimal import Decimal
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cascadevlm.base.types import Usage

NANODOLLARS_PER_TOKEN = 1_000
"""At a dollar per million tokens."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tiles(_Row):
    """OpenAI's older rule: the image is fitted into 2048 x 2048, then to 768 on its shorter side, and cut into tiles of 512."""

    rule: Literal["tiles"]
    base: int
    tile: int

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image of so many pixels."""
        scale = min(1, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        return self.base + self.tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)

    def tokens_in_low_detail(self, width: int, height: int) -> int:
        """Tokens of the image as a small copy of it, whatever its size."""
        return self.base


class Patches(_Row):
    """The rule of newer models: so many tokens a patch; a larger image is shrunk until it has no more than ``most``."""

    rule: Literal["patches"]
    size: int
    multiplier: float
    most: int

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image of so many pixels."""
        patches = math.ceil(width / self.size) * math.ceil(height / self.size)
        return math.ceil(min(patches, self.most) * self.multiplier)

    def tokens_in_low_detail(self, width: int, height: int) -> int:
        """The most tokens of the image as a copy within 512 x 512."""
        return min(self.tokens(width, height), self.tokens(512, 512))


Dollars = Annotated[Decimal, Field(ge=0)]


class Price(_Row):
    """US dollars per million tokens.

    Attributes:
        cached_input: of input read from the provider's prompt cache; as ``input``, unless given.
        cache_write: of input written to it; as ``input``, unless given.
        batch_discount: the share taken off in the provider's batch API.
        image: how images are counted; None where no rule is published.
        reasons: whether the model's own thoughts come on top of its answers.
        input_limit: the most input tokens of a request for which the price holds.
    """

    input: Dollars
    output: Dollars
    cached_input: Dollars | None = None
    cache_write: Dollars | None = None
    batch_discount: Annotated[Decimal, Field(ge=0, le=1)] = Decimal(0)
    image: Annotated[Tiles | Patches, Field(discriminator="rule")] | None = None
    reasons: bool = False
    input_limit: int | None = None

    def nanodollars(self, usage: Usage, *, batch: bool = False) -> int:
        """The bill for these tokens, rounded up."""
        fresh = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens
        return self._rounded_up(
            fresh * self.input
            + usage.cached_input_tokens * (self.input if self.cached_input is None else self.cached_input)
            + usage.cache_write_tokens * (self.input if self.cache_write is None else self.cache_write)
            + usage.output_tokens * self.output,
            batch,
        )

    def worst_case(self, input_tokens: int, output_tokens: int, *, batch: bool = False) -> int:
        """The bill if all of the input is charged at the dearest of its prices."""
        dearest = max(self.input, self.cached_input or self.input, self.cache_write or self.input)
        return self._rounded_up(input_tokens * dearest + output_tokens * self.output, batch)

    def _rounded_up(self, dollars_per_million: Decimal, batch: bool) -> int:
        return math.ceil(dollars_per_million * NANODOLLARS_PER_TOKEN * (1 - self.batch_discount if batch else 1))


FREE = Price(input=Decimal(0), output=Decimal(0))


class PricedModel(_Row):
    """A row of the table: what was read, when and where."""

    provider: str
    name: str
    price: Price
    read: date
    source: str


@cache
def price_table() -> tuple[PricedModel, ...]:
    """All rows."""
    text = (resources.files("cascadevlm.judges") / "prices.toml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[PricedModel, ...]).validate_python(tomllib.loads(text, parse_float=Decimal)["model"])


def find_price(provider: str, model: str) -> Price | None:
    """The price of a model, or of the one that a dated snapshot (``gpt-4o-2024-08-06``) is of; None if the table has none."""
    name = re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{8})$", "", model)
    return next((row.price for row in price_table() if row.provider == provider and row.name == name), None)
