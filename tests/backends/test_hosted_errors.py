"""Every exception of either SDK is one of ours."""

import asyncio
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import anthropic
import httpx2
import openai
import pytest

from cascadevlm.errors import FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.hosted import HostedJudge
from cascadevlm.provider_errors import error_of_status, translate
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge

SDKS: list[tuple[ModuleType, type[Exception], type[HostedJudge]]] = [
    (openai, openai.OpenAIError, OpenAIJudge),
    (anthropic, anthropic.AnthropicError, AnthropicJudge),
]
EITHER = pytest.mark.parametrize(("sdk", "root", "judge"), SDKS, ids=["openai", "anthropic"])

BY_STATUS: dict[int, type[JudgeError]] = {
    **dict.fromkeys((400, 405, 412, 413, 415, 422, 431, 499), PermanentError),
    **dict.fromkeys((401, 402, 403, 404), FatalError),
    **dict.fromkeys((408, 409, 500, 501, 502, 504), TransientError),
    **dict.fromkeys((429, 503, 529), RateLimited),
}


def exceptions(sdk: ModuleType, root: type[Exception]) -> list[type[Exception]]:
    """All that derive from the root, once every module that can be imported has been; generated types only as these need them."""
    skipped = tuple(f"{sdk.__name__}.{name}" for name in ("types.", "resources.", "cli."))
    for module in pkgutil.walk_packages(sdk.__path__, f"{sdk.__name__}.", onerror=lambda _: None):
        if not module.name.startswith(skipped) and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra that is not installed
                continue
    return list(_below(root))


def _below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _below(derived)


@EITHER
def test_every_exception_is_mapped(sdk: ModuleType, root: type[Exception], judge: type[HostedJudge]) -> None:
    found = exceptions(sdk, root)
    assert len(found) > 15
    unmapped = []
    for kind in found:
        nearer = kind.__mro__[: kind.__mro__.index(root)]
        if not any(base.__name__ in judge.errors for base in nearer):
            unmapped.append(kind.__qualname__)
    assert not unmapped
    assert judge.errors[root.__name__] is FatalError


def raised(kind: type[Exception], status: int, body: object = None) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://example.org/v1"), headers={"retry-after": "3"})
    if kind is openai.OAuthError:
        return openai.OAuthError(response=response, body=body)
    return kind("what the provider said", response=response, body=body)  # type: ignore[call-arg]


@EITHER
def test_a_status_is_what_counts(sdk: ModuleType, root: type[Exception], judge: type[HostedJudge]) -> None:
    base = sdk.APIStatusError
    kinds = [kind for kind in exceptions(sdk, root) if issubclass(kind, base)]
    statuses = [(kind, getattr(kind, "status_code", None)) for kind in kinds]
    known = [(kind, status) for kind, status in statuses if isinstance(status, int)]
    assert len(known) >= 7
    for kind, status in [*known, *((base, status) for status in BY_STATUS)]:
        error = translate(raised(kind, status), judge.errors, secret="")
        assert type(error) is BY_STATUS[status], kind
        assert not error.may_be_billed
        assert getattr(error, "retry_after", 3) == 3


@pytest.mark.parametrize("status", [*BY_STATUS])
def test_what_a_status_amounts_to(status: int) -> None:
    assert type(error_of_status(status, "words")) is BY_STATUS[status]


@pytest.mark.parametrize(
    ("provider", "status", "code"),
    [
        ("openai", 429, "insufficient_quota"),
        ("openai", 400, "billing_hard_limit_reached"),
        ("anthropic", 402, "billing_error"),
        ("anthropic", 429, "enforced_spend_limit_reached"),
        ("anthropic", 429, "contract_spend_limit_reached"),
    ],
)
def test_spent_quotas_stop_the_run_whatever_their_status(provider: str, status: int, code: str) -> None:
    _, _, judge = SDKS[provider == "anthropic"]
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://example.org/v1"))
    body = {"error": {"message": "No more.", "type": code, "code": code, "details": {"error_code": code}}}
    client = (openai.OpenAI if provider == "openai" else anthropic.Anthropic)(api_key="k", base_url="http://localhost")
    exc = client._make_status_error(f"Error code: {status} - {body}", body=body, response=response)
    client.close()
    error = translate(exc, judge.errors, secret="k-not-in-it")
    assert type(error) is FatalError
    assert "exhausted" in str(error)


REQUEST = httpx2.Request("POST", "https://example.org/v1")


@EITHER
def test_what_has_no_status(sdk: ModuleType, root: type[Exception], judge: type[HostedJudge]) -> None:
    answer = httpx2.Response(200, request=REQUEST)
    cases: list[tuple[Exception, type[JudgeError], bool]] = [
        (sdk.APITimeoutError(request=REQUEST), TransientError, True),
        (sdk.APIConnectionError(request=REQUEST), TransientError, True),
        (sdk.APIResponseValidationError(response=answer, body=None), TransientError, True),
        (root("a bad client"), FatalError, True),
        (ValueError("no JSON"), TransientError, True),
        (KeyError("a bug"), PermanentError, True),
        (caused_by(sdk.APIConnectionError(request=REQUEST), httpx2.ConnectError("refused")), TransientError, False),
        (caused_by(sdk.APITimeoutError(request=REQUEST), httpx2.ConnectTimeout("slow")), TransientError, False),
        (caused_by(sdk.APITimeoutError(request=REQUEST), httpx2.ReadTimeout("slow")), TransientError, True),
    ]
    for exc, kind, may_be_billed in cases:
        error = translate(exc, judge.errors, secret="")
        assert (type(error), error.may_be_billed) == (kind, may_be_billed), exc


def caused_by(exc: Exception, cause: Exception) -> Exception:
    exc.__cause__ = cause
    return exc


def test_a_message_never_holds_the_key() -> None:
    exc = raised(openai.AuthenticationError, 401)
    exc.args = ("x" * 480 + "Incorrect key sk-abcdef: sk-abcdef" + "x" * 2000,)
    assert "sk-abcdef" in str(exc)
    message = str(translate(exc, OpenAIJudge.errors, secret="sk-abcdef"))
    assert "sk-" not in message
    assert len(message) < 600


@pytest.mark.parametrize("through", [OpenAIJudge, AnthropicJudge])
def test_a_server_that_is_not_there_has_billed_nothing(through: type[HostedJudge]) -> None:
    """Through the transport in use, a refused connection is known as one."""
    from cascadevlm.testing import question

    async def ask() -> JudgeError:
        options = {"base_url": "http://127.0.0.1:9", "price": 0}  # the port of "discard", where nobody listens
        judge = through("m", **options)  # type: ignore[arg-type]
        try:
            await judge.judge(question())
        except JudgeError as exc:
            return exc
        finally:
            await judge.disconnect()
        raise AssertionError("it answered")

    error = asyncio.run(ask())
    assert (type(error), error.may_be_billed) == (TransientError, False)


@pytest.mark.parametrize(("secret", "told"), [("", True), ("sk-abcdef", True), ("no JSON", False)])
async def test_the_cause_is_told_unless_it_shows_the_key(secret: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of the user's own may have no key."""
    cause = ValueError("no JSON")

    async def request() -> None:
        raise cause

    monkeypatch.setattr(OpenAIJudge, "secret", secret)
    with pytest.raises(TransientError) as caught:
        await OpenAIJudge("gpt-4o").call(request())
    assert caught.value.__cause__ is (cause if told else None)
