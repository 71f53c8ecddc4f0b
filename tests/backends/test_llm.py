"""Models of the package llm as judges: the real package, with models of plug-ins, and with its own models of OpenAI's protocol
that ask a server on this machine.
"""

import asyncio
import json
import pickle
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx2
import llm
import pytest
from llm.plugins import pm
from pydantic import JsonValue

from cascadevlm import load_judge, load_prompt
from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.errors import BackendError, FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Exemplar
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.pricing import find_price
from cascadevlm.testing import noise, question
from cascadevlm.testing.contracts import JudgeContract
from cascadevlm_backends.llm import LlmJudge
from tests.backends.hosted_judges import always, cascade, images, no_waiting
from tests.server import Fault, JudgeServer

__all__ = ["no_waiting"]

VISION = frozenset({"image/png", "image/jpeg"})
FREE: dict[str, JsonValue] = {"price": 0}
PRICED: dict[str, JsonValue] = {"price": {"input": 1, "output": 10}}


class _Options(llm.Options):
    temperature: float | None = None
    max_output_tokens: int | None = None


def answer(prompt: llm.Prompt, response: llm.Response | llm.AsyncResponse) -> str:
    """The answer of the models below: the last candidate. They also report their tokens, and remember what they were sent."""
    assert all(attachment.content for attachment in prompt.attachments)
    SENT.append(prompt)
    response.set_usage(input=100, output=7)
    named = [line.partition(") ")[2] for line in prompt.prompt.splitlines() if ") " in line[:4]]
    return json.dumps({"answer": named[-1]}) if prompt.schema else f"ANSWER: {named[-1] if named else 'nothing'}"


SENT: list[llm.Prompt] = []
RAISED: list[Exception] = []


class Parrot(llm.KeyModel):
    model_id = "parrot"
    attachment_types = VISION
    needs_key = "parrot"
    key_env_var = "PARROT_KEY"

    class Options(_Options):
        pass

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
        key: str | None,
    ) -> Iterator[str]:
        assert not stream
        assert key == "the-key"
        if RAISED:
            raise RAISED[0]
        yield answer(prompt, response)


class AsyncParrot(llm.AsyncModel):
    model_id = "cockatoo"
    attachment_types = VISION
    supports_schema = True

    class Options(_Options):
        pass

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str, None]:
        await asyncio.sleep(0)
        yield answer(prompt, response)


class Cockatoo(Parrot):
    model_id = "cockatoo"


class Blind(Parrot):
    model_id = "blind"
    attachment_types = frozenset()


class Endless(Parrot):
    model_id = "endless"

    class Options(llm.Options):
        pass


class Gemini(Parrot):
    model_id = "gemini/gemini-3.6-flash"
    needs_key = "gemini"


class Plugin:
    """A plug-in as a package would register it."""

    @llm.hookimpl
    def register_models(self, register: Callable[..., None]) -> None:
        register(Parrot(), aliases=["polly"])
        register(Cockatoo(), AsyncParrot())
        register(Blind())
        register(Endless())
        register(Gemini())


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("PARROT_KEY", "the-key")
    monkeypatch.delenv(LOCAL_ONLY)
    SENT.clear()
    RAISED.clear()
    pm.register(plugin := Plugin(), name="parrots")
    yield
    pm.unregister(plugin)


def load(spec: str, **options: JsonValue) -> LlmJudge:
    judge = load_judge(spec, **options)
    assert isinstance(judge, LlmJudge)
    return judge


@pytest.mark.parametrize("model", ["parrot", "cockatoo"])
class TestContract(JudgeContract):
    @pytest.fixture(autouse=True)
    def _chosen(self, model: str) -> None:
        self.model = model

    def make(self) -> LlmJudge:
        return load(f"llm:{self.model}", **FREE)


@pytest.mark.parametrize(("spec", "structured"), [("llm:parrot", False), ("llm:polly", False), ("llm:cockatoo", True)])
def test_a_model_of_a_plugin_judges(spec: str, structured: bool) -> None:
    ledger = Ledger(1.0)
    judge = load(spec, temperature=0.5, **PRICED)
    predictions = cascade(judge, ledger=ledger).classify(images(3))
    assert [prediction.decided_by for prediction in predictions] == ["judge"] * 3
    assert {prediction.verdict.judge for prediction in predictions if prediction.verdict} == {spec}
    assert ledger._spent == 3 * (100 * 1_000 + 7 * 10_000)
    for prompt in SENT:
        assert prompt.options.model_dump() == {"temperature": 0.5, "max_output_tokens": judge.output_limit(question())}
        assert bool(prompt.schema) == structured
        assert len(prompt.attachments) == 1


def test_reference_images_have_a_place_in_the_text() -> None:
    shown = [Exemplar(label=Label(name=name), image=noise(seed)) for seed, name in enumerate(("finch", "owl"))]
    asked = replace(question(), exemplars=tuple(shown), prompt=load_prompt("select_fewshot"))
    asyncio.run(load("llm:parrot", **FREE).judge(asked))
    (prompt,) = SENT
    places = [prompt.prompt.index(f"[image {number}]") for number in (1, 2, 3)]
    assert places == sorted(places)
    judge = load("llm:parrot")
    contents = {judge.sent(image, asked).data for image in (asked.image, *(each.image for each in shown))}
    assert {attachment.content for attachment in prompt.attachments} == contents


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        ("llm:parot", FREE, r"llm has no model 'parot'\. Did you mean 'parrot'\?"),
        ("llm:blind", FREE, r"The model 'blind' of llm does not read PNG and JPEG images\. Use a vision model\."),
        ("llm:gpt-3.5-turbo", FREE, r"does not read PNG and JPEG images"),
        ("llm:parrot", {"temprature": 1, **FREE}, r"'parrot' of llm, option 'temprature': .*Options of this model: temperature"),
        ("llm:parrot", {"temperature": "hot", **FREE}, r"option 'temperature': Input should be a valid number"),
        ("llm:parrot", {"max_output_tokens": 5, **FREE}, r"'max_output_tokens' is set by cascadevlm\. Use the option max_tokens"),
        ("llm:parrot", {"structured": True, **FREE}, r"has no schemas"),
        ("llm:parrot", {}, r"The price of 'llm:parrot' is unknown\. Give options = \{ price"),
        ("llm:endless", PRICED, r"costs money, and it has no option that limits the tokens of an answer"),
    ],
)
def test_what_cannot_work_is_said_before_the_run(spec: str, options: dict[str, JsonValue], sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        cascade(load(spec, **options)).classify(images(1))
    assert not SENT


def test_the_key_comes_from_llm_or_from_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARROT_KEY")
    with pytest.raises(BackendError, match=r"'llm:parrot' needs a key\. Run: llm keys set parrot"):
        cascade(load("llm:parrot", **FREE)).classify(images(1))
    monkeypatch.setenv("MINE", "the-key")
    assert cascade(load("llm:parrot", api_key_env="MINE", **FREE)).classify(noise(1)).decided_by == "judge"
    (tmp_path / "keys.json").write_text('{"parrot": "the-key"}')
    assert cascade(load("llm:parrot", **FREE)).classify(noise(2)).decided_by == "judge"


@pytest.mark.parametrize("spec", ["llm:gpt-4o", "llm:4o"])
def test_a_model_of_a_known_provider_has_its_price(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(spec).price == find_price("openai", "gpt-4o")
    assert load("llm:gemini/gemini-3.6-flash").price == find_price("google", "gemini-3.6-flash")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1")  # the SDK inside the plug-in reads it
    with pytest.raises(BackendError, match=r"The price of .* at example.org is unknown"):
        _ = load(spec).price


def test_only_models_on_this_machine_where_nothing_else_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_ONLY, "1")
    with pytest.raises(BackendError, match=f"is not on this machine, and {LOCAL_ONLY} is set"):
        cascade(load("llm:parrot", **FREE)).classify(images(1))


REQUEST = httpx2.Request("POST", "https://example.org")
RESPONSE = httpx2.Response(429, json={"error": {"message": "slow down"}}, headers={"retry-after": "7"})


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (llm.ModelError("The service is overloaded"), TransientError),
        (llm.ModelError("Your credit balance is too low"), FatalError),
        (llm.ModelError("Blocked by the safety filter"), None),
        (httpx2.HTTPStatusError("no", request=REQUEST, response=RESPONSE), RateLimited),
        (httpx2.ConnectError("no", request=REQUEST), FatalError),
        (httpx2.ReadTimeout("no", request=REQUEST), TransientError),
        (KeyError("candidates"), PermanentError),
    ],
)
async def test_errors_of_a_plugin_have_their_kind(raised: Exception, kind: type[JudgeError] | None) -> None:
    RAISED.append(raised)
    judge = load("llm:parrot", **FREE)
    if kind is None:
        assert (await judge.judge(question())).outcome == "refused"
        return
    with pytest.raises(kind) as caught:
        await judge.judge(question())
    assert type(caught.value) is kind
    assert getattr(caught.value, "retry_after", None) == (7 if kind is RateLimited else None)


def test_the_key_is_in_no_message() -> None:
    RAISED.append(llm.ModelError("the key the-key is not valid"))
    with pytest.raises(JudgeError) as caught:
        asyncio.run(load("llm:parrot", **FREE).judge(question()))
    assert "the-key" not in str(caught.value)


def test_a_copy_asks_too() -> None:
    judge = load("llm:polly", temperature=0.1, **FREE)
    asked = asyncio.run(judge.judge(question()))
    again = asyncio.run(cast(LlmJudge, pickle.loads(pickle.dumps(judge))).judge(question()))
    assert (asked.label, asked.outcome) == (again.label, "answered")


def local_models(folder: Path, server: JudgeServer) -> None:
    """Two models as the documentation of llm describes them, at a server on this machine."""
    rows = [
        {"model_id": name, "model_name": "gpt-4o", "api_base": server.openai_url, "vision": True, "supports_schema": True}
        | ({"responses": True} if name == "mine-responses" else {})
        for name in ("mine", "mine-responses")
    ]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(rows))


async def test_llms_own_models_ask_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_ONLY, "1")
    async with JudgeServer(usage=(300, 20)) as server:
        local_models(tmp_path, server)
        judge = load("llm:mine", **PRICED)
        ledger = Ledger(1.0)
        predictions = await cascade(judge, ledger=ledger).aclassify(images(3))
        assert [prediction.decided_by for prediction in predictions] == ["judge"] * 3
        assert ledger._spent == 3 * (300 * 1_000 + 20 * 10_000)
        assert load("llm:mine").costs_money is False
        for received in server.requests:
            body = received.body
            assert body["max_tokens"] == judge.output_limit(question())
            assert "json_schema" in str(body["response_format"])


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(("fault", "kind"), [("unauthorized", FatalError), ("bad_request", PermanentError)])
async def test_llms_own_models_report_errors(tmp_path: Path, fault: str, kind: type[JudgeError]) -> None:
    async with JudgeServer(refuse=always(Fault(fault))) as server:  # type: ignore[arg-type]
        local_models(tmp_path, server)
        judge = load("llm:mine")
        with pytest.raises(kind):
            await judge.judge(question())
        assert len(server.requests) == (2 if kind is PermanentError else 1)  # the second request has no schema
        await judge.disconnect()


async def test_a_server_without_schemas_is_asked_without(tmp_path: Path) -> None:
    def refuse(received: object) -> Fault | None:
        return Fault("bad_request") if "json_schema" in str(getattr(received, "body", "")) else None

    async with JudgeServer(refuse=refuse) as server:
        local_models(tmp_path, server)
        judge = load("llm:mine")
        strict = load("llm:mine", structured=True)
        with pytest.raises(PermanentError):
            await strict.judge(question())
        assert (await judge.judge(question())).outcome == "answered"
        for each in (judge, strict):
            await each.disconnect()
