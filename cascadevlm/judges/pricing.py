"""Prices of hosted models, and the rules that count images in tokens.

There are two price tables. ``prices.toml`` is part of cascadevlm. The package genai-prices knows more models, and its new
versions have new prices. `find_price` decides between the tables: a model with a row in ``prices.toml`` has the price of this
row, and every other model has its price in genai-prices. Both tables are files on this machine. Nothing is downloaded.
"""

import math
import re
import tomllib
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cascadevlm.base.types import Usage

if TYPE_CHECKING:
    from genai_prices.types import TieredPrices

NANODOLLARS_PER_TOKEN = 1_000
"""Nanodollars per token at one dollar per million tokens."""

PROVIDER_OF_HOST = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "google",
}
"""The provider whose prices are valid at a host. Another server with the same protocol may have other prices."""


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
        origin: the table that the price comes from, with its date or version.
    """

    input: Dollars
    output: Dollars
    cached_input: Dollars | None = None
    cache_write: Dollars | None = None
    batch_discount: Annotated[Decimal, Field(ge=0, le=1)] = Decimal(0)
    image: Annotated[Tiles | Patches, Field(discriminator="rule")] | None = None
    reasons: bool = False
    input_limit: int | None = None
    origin: str = "the configuration"

    def __str__(self) -> str:
        """The price for people: the dollars per million tokens, and the table that they come from."""
        return f"${self.input} per million input tokens, ${self.output} per million output tokens (source: {self.origin})"

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
    """All rows of ``prices.toml``."""
    text = (resources.files("cascadevlm.judges") / "prices.toml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[PricedModel, ...]).validate_python(tomllib.loads(text, parse_float=Decimal)["model"])


@cache
def find_price(provider: str, model: str) -> Price | None:
    """The price of a model today: from ``prices.toml`` or, if this table does not have the model, from genai-prices.

    A dated snapshot such as ``gpt-4o-2024-08-06`` has the price of its model. A name that is only similar to the name of a model
    has no price.

    Args:
        provider: the provider, by its name in the tables: ``"openai"``, ``"anthropic"``, ``"google"`` and others.
        model: name of the model at the provider.

    Returns:
        The price. None if no table has the model.
    """
    name = re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{8})$", "", model)
    row = next((row for row in price_table() if row.provider == provider and row.name == name), None)
    if row is not None:
        return row.price.model_copy(update={"origin": f"prices.toml of cascadevlm, read on {row.read}"})
    return _of_genai_prices(provider, name)


def _of_genai_prices(provider: str, name: str) -> Price | None:
    """The price of a model in genai-prices.

    If the price depends on the number of input tokens, the price up to the first limit is used, and `Price.input_limit` refuses
    longer requests. If the price depends on the time of day, the highest price of the day is used. If images or thoughts have
    their own price, the highest price is used for all tokens. A price per request is not supported.
    """
    from genai_prices.data import providers
    from genai_prices.types import StartDateConstraint, TieredPrices

    models = [model for each in providers if each.id == provider for model in each.models if model.id == name]
    if not models:
        return None
    (model,) = models
    prices = [model.get_prices(datetime.now(UTC))]
    if isinstance(model.prices, list):
        prices += [each.prices for each in model.prices if not isinstance(each.constraint, StartDateConstraint | None)]

    def highest(*keys: str) -> Decimal | None:
        found = [price for each in prices for key in keys if (price := getattr(each, key)) is not None]
        return max(map(_base, found), default=None)

    if None in (highest("input_mtok"), highest("output_mtok")) or highest("requests_kcount"):
        return None
    tiers = [price for each in prices for price in vars(each).values() if isinstance(price, TieredPrices)]
    return Price.model_validate(
        {
            "input": highest("input_mtok", "input_image_mtok"),
            "output": highest("output_mtok", "output_reasoning_mtok"),
            "cached_input": highest("cache_read_mtok"),
            "cache_write": highest("cache_write_mtok"),
            "input_limit": min((tier.start for price in tiers for tier in price.tiers), default=None),
            "origin": f"genai-prices {version('genai-prices')}",
        }
    )


def _base(price: "Decimal | TieredPrices") -> Decimal:
    """The price of a request that is too short for any tier."""
    return price if isinstance(price, Decimal) else price.base
