"""Every option that changes an answer is in the judge's `identity()`. Every other option is named here with the reason."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import anthropic
import openai
import pytest

from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import key_of, question_payload
from cascadevlm.testing import question
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.hf_chat import HfChatJudge
from cascadevlm_backends.llm import LlmJudge
from cascadevlm_backends.openai import OpenAIJudge
from cascadevlm_backends.recorded import RecordedJudge
from tests.backends.test_llm import Parrot
from tests.judges.test_cache import key

HERE = "http://localhost:9/v1"

CHANGES: Mapping[type[Judge], Mapping[str, object]] = {
    OpenAIJudge: {
        "model": "other",
        "mode": "decision",
        "api": "responses",
        "structured": True,
        "logprobs": True,
        "base_url": "http://localhost:8/v1",
        "client": openai.AsyncOpenAI(api_key="k", base_url="http://localhost:8/v1"),
        "detail": "low",
        "temperature": 0.0,
        "max_tokens": 7,
        "reasoning_effort": "low",
    },
    AnthropicJudge: {
        "model": "other",
        "structured": "tool",
        "thinking": "disabled",
        "effort": "low",
        "base_url": "http://localhost:8/v1",
        "client": anthropic.AsyncAnthropic(api_key="k", base_url="http://localhost:8/v1"),
        "temperature": 0.0,
        "max_tokens": 7,
    },
    HfChatJudge: {"model": "other", "mode": "likelihood", "dtype": "bfloat16", "temperature": 0.5, "max_tokens": 7},
    LlmJudge: {"model": "other", "structured": True, "max_tokens": 7, "model_options": {"temperature": 0.5}},
    RecordedJudge: {"model": "other"},
}
"""Another value of each option that changes an answer."""

PACE = "changes when questions are asked, not what is answered"
HOSTED_UNCHANGED: Mapping[str, tuple[object, str]] = {
    "api_key_env": ("MY_KEY", "names a secret"),
    "headers": ({"X-Token": "t"}, "are secret"),
    "price": ({"input": 1, "output": 2}, "changes what is billed; an answer that it cuts off is not kept"),
    "concurrency": (2, PACE),
    "requests_per_minute": (2, PACE),
    "tokens_per_minute": (2, PACE),
    "timeout": (2, PACE),
}
UNCHANGED: Mapping[type[Judge], Mapping[str, tuple[object, str]]] = {
    OpenAIJudge: HOSTED_UNCHANGED,
    AnthropicJudge: {
        **HOSTED_UNCHANGED,
        "cache_prompt": (True, "changes what is billed"),
    },
    HfChatJudge: {
        "device": ("cpu", "changes rounding alone; the precision that it stands for is the dtype"),
        "revision": (None, "is told by the commit that it leads to"),
        "batch_size": (2, "changes rounding alone"),
    },
    LlmJudge: {name: unchanged for name, unchanged in HOSTED_UNCHANGED.items() if name != "headers"},
    RecordedJudge: {},
}
"""Another value of each option that changes no answer, and the reason."""


def made(kind: Callable[..., Judge], tmp_path: Path, options: Mapping[str, object]) -> Judge:
    model, options = str(options.get("model", "m")), {name: value for name, value in options.items() if name != "model"}
    if kind is HfChatJudge:
        folder = tmp_path / model
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(f'{{"name": "{model}"}}')
        return kind(str(folder), **options)  # type: ignore[arg-type]
    if kind is RecordedJudge:
        judge = kind(model)
        vars(judge)["_verdicts"] = {}
        return judge
    if kind is LlmJudge:
        of_model = options.pop("model_options", {})
        assert isinstance(of_model, dict)
        asking = kind(model, **options, **of_model)  # type: ignore[arg-type]
        vars(asking)["_model"] = Parrot()
        return asking
    return kind(model, **{"base_url": HERE, **options})


def of_judge(judge: Judge) -> str:
    """The identity of a judge, without the spec of a model that is identified by its content."""
    return key_of({**judge.identity(), **({"judge": ""} if isinstance(judge, HfChatJudge) else {})})


OPTIONS = [
    pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind in CHANGES for name in inspect.signature(kind).parameters
]


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_every_option_of_every_judge(kind: type[Judge], name: str, tmp_path: Path) -> None:
    before = of_judge(made(kind, tmp_path, {}))
    if name in CHANGES[kind]:
        assert of_judge(made(kind, tmp_path, {name: CHANGES[kind][name]})) != before
    else:
        other, _ = UNCHANGED[kind][name]
        assert of_judge(made(kind, tmp_path, {name: other})) == before


def test_no_judge_and_no_option_is_forgotten() -> None:
    assert set(CHANGES) == set(UNCHANGED) == {point.load() for point in entry_points(group="cascadevlm.judges")}
    for kind, changes in CHANGES.items():
        assert {*changes, *UNCHANGED[kind]} == set(inspect.signature(kind).parameters)
        assert not {*changes} & {*UNCHANGED[kind]}


def test_the_key_of_a_question_holds_the_identity() -> None:
    judges = [OpenAIJudge("m", base_url=HERE, detail=detail) for detail in ("low", "high", "auto")]
    assert len({key(question(), judge) for judge in judges}) == 3
    assert question_payload(judges[0], question())["judge"] == dict(judges[0].identity())
