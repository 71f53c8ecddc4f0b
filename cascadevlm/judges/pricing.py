"""Prices of hosted models: the table ``prices.toml``, and the rules that count images in tokens."""

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
"""Nanodollars per token at one dollar per million tokens."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tiles(_Row):
    """OpenAI's older rule. The image is shrunk to fit into 2048 x 2048. Then it is shrunk until its shorter side has 768 pixels.
    Then it is cut into tiles of 512 x 512.

    Attributes:
        base: tokens per image.
        tile: tokens per tile.
    """

    rule: Literal["tiles"]
    base: int
    tile: int

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image of this size in pixels."""
        scale = min(1, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        return self.base + self.tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)

    def tokens_in_low_detail(self, width: int, height: int) -> int:
        """Tokens of an image in low detail. They do not depend on the size."""
        return self.base


class Patches(_Row):
    """The rule of newer models. The image is cut into square patches. An image with too many patches is shrunk first.

    Attributes:
        size: side of a patch in pixels.
        multiplier: tokens per patch.
        most: maximum number of patches of an image.
    """

    rule: Literal["patches"]
    size: int
    multiplier: float
    most: int

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image of this size in pixels."""
        patches = math.ceil(width / self.size) * math.ceil(height / self.size)
        return math.ceil(min(patches, self.most) * self.multiplier)

    def tokens_in_low_detail(self, width: int, height: int) -> int:
        """Maximum number of tokens of an image in low detail. The image is shrunk to fit into 512 x 512."""
        return min(self.tokens(width, height), self.tokens(512, 512))


Dollars = Annotated[Decimal, Field(ge=0)]


class Price(_Row):
    """Price of a model.

    Attributes:
        input: US dollars per million input tokens.
        output: US dollars per million output tokens.
        cached_input: US dollars per million input tokens that are read from the provider's prompt cache. None: the same as
            ``input``.
        cache_write: US dollars per million input tokens that are written to the provider's prompt cache. None: the same as
            ``input``.
        batch_discount: discount of the provider's batch API, between 0 and 1.
        image: the rule that counts images in tokens. None: no rule is published.
        reasons: whether the model writes thoughts in addition to its answer.
        input_limit: the price holds for requests with at most this number of input tokens. None: for all requests.
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
        """The cost of these tokens in nanodollars, rounded up."""
        fresh = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens
        return self._rounded_up(
            fresh * self.input
            + usage.cached_input_tokens * (self.input if self.cached_input is None else self.cached_input)
            + usage.cache_write_tokens * (self.input if self.cache_write is None else self.cache_write)
            + usage.output_tokens * self.output,
            batch,
        )

    def worst_case(self, input_tokens: int, output_tokens: int, *, batch: bool = False) -> int:
        """The highest possible cost in nanodollars, rounded up: all input tokens have the highest input price."""
        dearest = max(self.input, self.cached_input or self.input, self.cache_write or self.input)
        return self._rounded_up(input_tokens * dearest + output_tokens * self.output, batch)

    def _rounded_up(self, dollars_per_million: Decimal, batch: bool) -> int:
        return math.ceil(dollars_per_million * NANODOLLARS_PER_TOKEN * (1 - self.batch_discount if batch else 1))


FREE = Price(input=Decimal(0), output=Decimal(0))


class PricedModel(_Row):
    """A row of the price table, with the date and the source of the price."""

    provider: str
    name: str
    price: Price
    read: date
    source: str


@cache
def price_table() -> tuple[PricedModel, ...]:
    """All rows of the price table."""
    text = (resources.files("cascadevlm.judges") / "prices.toml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[PricedModel, ...]).validate_python(tomllib.loads(text, parse_float=Decimal)["model"])


def find_price(provider: str, model: str) -> Price | None:
    """The price of a model from the table. None if the table does not have the model.

    A dated snapshot such as ``gpt-4o-2024-08-06`` has the price of its model.
    """
    name = re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{8})$", "", model)
    return next((row.price for row in price_table() if row.provider == provider and row.name == name), None)
