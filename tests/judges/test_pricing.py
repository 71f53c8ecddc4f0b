"""The price table, the counts of image tokens compared with the providers' own examples, and the computation of bills."""

import math
from datetime import date
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cascadevlm.base.types import Usage
from cascadevlm.judges.pricing import FREE, Patches, Price, PricedModel, Tiles, find_price, price_table
from cascadevlm_backends.openai import OpenAIJudge

MILLION = 1_000_000
ROWS = pytest.mark.parametrize("row", price_table(), ids=lambda row: f"{row.provider}:{row.name}")


def price_of(provider: str, model: str) -> Price:
    price = find_price(provider, model)
    assert price is not None
    return price


def test_every_model_has_one_row() -> None:
    names = [(row.provider, row.name) for row in price_table()]
    assert len(names) == len(set(names))
    assert {provider for provider, _ in names} == {"openai", "anthropic", "google"}


@ROWS
def test_rows_are_sound(row: PricedModel) -> None:
    assert row.source.startswith("https://")
    assert date(2024, 1, 1) < row.read <= date.today()
    price = row.price
    assert 0 < price.input <= price.output <= 1000
    assert price.cached_input is None or 0 < price.cached_input <= price.input
    assert price.cache_write is None or price.input <= price.cache_write <= 2 * price.input
    assert price.batch_discount == (0 if row.provider == "google" else Decimal("0.5"))
    assert price.image is not None
    assert price.image.tokens(1, 1) > 0
    found = price_of(row.provider, row.name)
    assert found.model_dump(exclude={"origin"}) == price.model_dump(exclude={"origin"})
    assert str(found).endswith(f"(source: prices.toml of cascadevlm, read on {row.read})")


@pytest.mark.parametrize(
    ("model", "size", "low", "high"),
    [
        ("gpt-4o", (1024, 1024), 85, 765),
        ("gpt-4o", (20, 20), 85, 255),
        ("gpt-4o-mini", (1024, 1024), 2833, 25501),
        ("gpt-4.1-mini", (1024, 1024), 415, 1659),  # 16 x 16 of 32 x 32 patches, 1.62 tokens each
        ("gpt-4.1-mini", (64, 32), 4, 4),
    ],
)
def test_low_detail_is_priced_as_low(model: str, size: tuple[int, int], low: int, high: int) -> None:
    details: list[Literal["low", "auto", "high"]] = ["low", "auto", "high"]
    assert [OpenAIJudge(model, detail=detail)._image_tokens(size) for detail in details] == [low, high, high]
    assert OpenAIJudge(model, detail="low", mode="decision")._image_tokens(size) == high  # where no detail is asked for


@ROWS
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_an_image_that_shrinks_takes_no_more(row: PricedModel, width: int, height: int) -> None:
    """An image that is sent is never larger than the limits allow. So the worst case of a question is known before encoding."""
    assert row.price.image is not None
    assert row.price.image.tokens(max(width * 3 // 4, 1), max(height * 3 // 4, 1)) <= row.price.image.tokens(width, height)


IMAGES = [
    # OpenAI's guide to images: https://platform.openai.com/docs/guides/images-vision
    ("openai", "gpt-4o", (1024, 1024), 765),  # to 768 x 768: 4 tiles
    ("openai", "gpt-4o", (2048, 4096), 1105),  # to 1024 x 2048, to 768 x 1536: 6 tiles
    ("openai", "gpt-4o", (4096, 2048), 1105),
    ("openai", "gpt-4o", (512, 512), 255),
    ("openai", "gpt-4o", (1, 1), 255),
    ("openai", "gpt-4o", (513, 512), 425),
    ("openai", "gpt-4o-mini", (1024, 1024), 2833 + 4 * 5667),
    ("openai", "gpt-4.1-mini", (1024, 1024), 1659),  # 1024 patches x 1.62
    ("openai", "gpt-4.1-mini", (4096, 4096), 2489),  # 1536 patches x 1.62
    ("openai", "gpt-6.1-sol", (1024, 1024), 1229),  # 1024 patches x 1.2
    ("openai", "gpt-6.1-sol", (256, 256), 77),  # 64 patches x 1.2
    ("openai", "gpt-6.1-sol", (257, 256), 87),  # 72 patches x 1.2
    # Anthropic's guide to vision: patches of 28 pixels
    ("anthropic", "claude-opus-5", (1024, 1024), 1369),  # 37 x 37
    ("anthropic", "claude-opus-5", (1280, 720), 1196),  # 46 x 26
    ("anthropic", "claude-opus-5", (4096, 4096), 4784),
    ("anthropic", "claude-sonnet-4-5", (1024, 1024), 1369),
    ("anthropic", "claude-sonnet-4-5", (1568, 1568), 1568),
    ("anthropic", "claude-haiku-4-5", (28, 29), 2),
]


@pytest.mark.parametrize(("provider", "model", "size", "tokens"), IMAGES)
def test_images_are_counted_as_the_provider_does(provider: str, model: str, size: tuple[int, int], tokens: int) -> None:
    rule = price_of(provider, model).image
    assert rule is not None
    assert rule.tokens(*size) == tokens


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_an_image_on_its_side_counts_the_same(width: int, height: int) -> None:
    for rule in (Tiles(rule="tiles", base=85, tile=170), Patches(rule="patches", size=32, multiplier=1.2, most=1536)):
        assert rule.tokens(width, height) == rule.tokens(height, width)
        assert 0 < rule.tokens(width, height) <= 1844  # 85 + 170 x 4 x 2, and 1536 x 1.2


@pytest.mark.parametrize(
    ("snapshot", "model"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("gpt-4.1-2025-04-14", "gpt-4.1"),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
    ],
)
def test_a_dated_snapshot_costs_what_its_model_costs(snapshot: str, model: str) -> None:
    provider = "anthropic" if model.startswith("claude") else "openai"
    assert price_of(provider, snapshot) == price_of(provider, model)


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o-preview"),
        ("openai", "ft:gpt-4o:me"),
        ("openai", "gpt-4o-latest"),
        ("openai", "claude-opus-5"),
        ("anthropic", "gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-2025"),
        ("elsewhere", "gpt-4o"),
    ],
)
def test_no_model_takes_anothers_price(provider: str, model: str) -> None:
    assert find_price(provider, model) is None


@pytest.mark.parametrize(
    ("provider", "model", "dollars", "limit"),
    [
        ("openai", "gpt-4-turbo", ("10", "30", None), None),
        ("google", "gemini-3.6-flash", ("0.75", "3.75", "0.075"), None),
        ("google", "gemini-3.1-pro-preview", ("2", "12", "0.2"), 200_000),  # longer requests cost twice as much
        ("google", "gemini-3.1-pro-preview-2026-02-19", ("2", "12", "0.2"), 200_000),
        ("openrouter", "qwen/qwen3.7-flash", (None, None, None), 32_000),  # two limits: the first counts
    ],
)
def test_a_model_without_a_row_has_its_price_in_genai_prices(
    provider: str, model: str, dollars: tuple[str | None, ...], limit: int | None
) -> None:
    assert (provider, model) not in {(row.provider, row.name) for row in price_table()}
    price = price_of(provider, model)
    for found, expected in zip((price.input, price.output, price.cached_input), dollars, strict=True):
        assert expected is None or found == Decimal(expected)
    assert price.input_limit == limit
    assert price.origin == f"genai-prices {version('genai-prices')}"


def test_a_price_by_the_time_of_day_is_the_highest_of_the_day() -> None:
    from genai_prices.data import providers
    from genai_prices.types import StartDateConstraint

    (model,) = [m for provider in providers if provider.id == "deepseek" for m in provider.models if m.id == "deepseek-v4-pro"]
    assert isinstance(model.prices, list)
    by_time = [each.prices for each in model.prices if not isinstance(each.constraint, StartDateConstraint | None)]
    assert by_time
    assert price_of("deepseek", "deepseek-v4-pro").output == max(Decimal(str(each.output_mtok)) for each in by_time)


@pytest.mark.parametrize("model", ["gemini-embedding-001", "gemini-3.6-flash-evil", "gemini-3.6"])
def test_a_model_that_genai_prices_does_not_name_has_no_price(model: str) -> None:
    """genai-prices itself matches names by patterns. An embedding model writes no text."""
    assert find_price("google", model) is None


def test_small_models_keep_their_own_price() -> None:
    assert price_of("openai", "gpt-4o-mini").input < price_of("openai", "gpt-4o").input / 10
    assert price_of("openai", "gpt-4.1-nano").input < price_of("openai", "gpt-4.1-mini").input


def test_a_bill_by_hand() -> None:
    """1,000 input tokens at $3, of which 200 are read from the cache at $0.30 and 300 are written at $3.75; 20 output tokens at
    $15.
    """
    usage = Usage(input_tokens=1000, cached_input_tokens=200, cache_write_tokens=300, output_tokens=20)
    bill = 500 * 3000 + 200 * 300 + 300 * 3750 + 20 * 15_000
    price = price_of("anthropic", "claude-sonnet-4-5")
    assert price.nanodollars(usage) == bill == 2_985_000
    assert price.nanodollars(usage, batch=True) == 1_492_500
    assert price.worst_case(1000, 20) == 1000 * 3750 + 20 * 15_000
    assert FREE.nanodollars(usage) == FREE.worst_case(MILLION, MILLION) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": -1, "output": 1},
        {"input": 1},
        {"input": 1, "output": 1, "cached": 1},
        {"input": 1, "output": 1, "batch_discount": 2},
        {"input": "NaN", "output": 1},
    ],
)
def test_no_price_is_guessed(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Price.model_validate(wrong)


DOLLARS = st.decimals(0, 1000, places=6)
PRICES = st.one_of(
    st.builds(
        Price,
        input=DOLLARS,
        output=DOLLARS,
        cached_input=st.none() | DOLLARS,
        cache_write=st.none() | DOLLARS,
        batch_discount=st.decimals(0, 1, places=4),
    ),
    st.sampled_from([row.price for row in price_table()]),
)
TOKENS = st.integers(0, 2 * MILLION)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    total = draw(TOKENS)
    cached = draw(st.integers(0, total))
    written = draw(st.integers(0, total - cached))
    return Usage(input_tokens=total, cached_input_tokens=cached, cache_write_tokens=written, output_tokens=draw(TOKENS))


def exact_nanodollars(price: Price, usage: Usage) -> Fraction:
    cached = price.input if price.cached_input is None else price.cached_input
    written = price.input if price.cache_write is None else price.cache_write
    dollars = (
        Fraction(price.input) * (usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens)
        + Fraction(cached) * usage.cached_input_tokens
        + Fraction(written) * usage.cache_write_tokens
        + Fraction(price.output) * usage.output_tokens
    ) / MILLION
    return dollars * 1_000_000_000


@given(PRICES, usages())
def test_the_bill_is_exact_arithmetic_rounded_up(price: Price, usage: Usage) -> None:
    exact = exact_nanodollars(price, usage)
    assert price.nanodollars(usage) == math.ceil(exact)
    assert price.nanodollars(usage, batch=True) == math.ceil(exact * (1 - Fraction(price.batch_discount)))


@given(PRICES, usages(), usages())
def test_bills_add_up(price: Price, one: Usage, other: Usage) -> None:
    apart = price.nanodollars(one) + price.nanodollars(other)
    assert apart - 1 <= price.nanodollars(one + other) <= apart


@given(PRICES, usages(), st.booleans())
def test_no_split_of_the_input_costs_more_than_the_worst_case(price: Price, usage: Usage, batch: bool) -> None:
    worst = price.worst_case(usage.input_tokens, usage.output_tokens, batch=batch)
    assert price.nanodollars(usage, batch=batch) <= worst


@given(usages())
def test_a_batch_costs_half(usage: Usage) -> None:
    for row in (row for row in price_table() if row.price.batch_discount):
        whole = row.price.nanodollars(usage)
        assert row.price.nanodollars(usage, batch=True) == math.ceil(exact_nanodollars(row.price, usage) / 2)
        assert 0 <= 2 * row.price.nanodollars(usage, batch=True) - whole <= 2
