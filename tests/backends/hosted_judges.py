"""Code that the tests of hosted judges share: the three protocols, their price, and cascades that ask the judges."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

import pytest
from pydantic import JsonValue

from cascadevlm import Cascade, Stage, load_prompt
from cascadevlm.base.images import ImageSource
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import VerdictStore
from cascadevlm.judges.hosted.base import HostedJudge
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.testing import FakeScorer, noise
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge
from tests.server import Fault, JudgeServer

LABELS = ["red finch", "blue finch", "grey owl"]
PRICE: Mapping[str, JsonValue] = {"input": 1, "output": 10}
USAGE = (300, 20)
BILL = 300 * 1000 + 20 * 10_000
"""Cost in nanodollars of the usage that the servers report, at this price."""

Make: TypeAlias = Callable[..., SdkJudge]


def chat(server: JudgeServer, **options: object) -> SdkJudge:
    options = {"base_url": server.openai_url, "price": PRICE, "structured": True, **options}
    return OpenAIJudge("gpt-4o", **options)  # type: ignore[arg-type]


def responses(server: JudgeServer, **options: object) -> SdkJudge:
    return chat(server, api="responses", **options)


def messages(server: JudgeServer, **options: object) -> SdkJudge:
    options = {"base_url": server.anthropic_url, "price": PRICE, **options}
    return AnthropicJudge("claude-sonnet-5", **options)  # type: ignore[arg-type]


EVERY = pytest.mark.parametrize("make", [chat, responses, messages], ids=["chat", "responses", "messages"])
EITHER = pytest.mark.parametrize("make", [chat, messages], ids=["openai", "anthropic"])


def cascade(judge: HostedJudge, *, ledger: Ledger | None = None, store: VerdictStore | None = None, **stage: object) -> Cascade:
    """A cascade that asks the judge about every image."""
    asking = replace(Stage(judge=judge, prompt=load_prompt("select")), **stage)  # type: ignore[arg-type]
    return Cascade(FakeScorer(), [asking], labels=LABELS, ledger=ledger, store=store)


def images(count: int) -> list[ImageSource]:
    return [noise(seed, (24, 24)) for seed in range(count)]


def always(fault: Fault) -> Callable[[int], Fault | None]:
    return lambda _: fault


def one_in_three(faults: Iterable[Fault]) -> Callable[[int], Fault | None]:
    kinds = list(faults)
    return lambda number: kinds[number // 3 % len(kinds)] if number % 3 == 1 else None


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry immediately, unless a response names a time to wait, and do not wait for other questions before a failure."""
    monkeypatch.setattr("cascadevlm.judges.retry._BACKOFF", lambda _: 0.0)
    monkeypatch.setattr("cascadevlm.judges.outage.PATIENCE", 0.01)
