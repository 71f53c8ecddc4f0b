"""Every exception of both SDKs becomes an error of cascadevlm."""

import asyncio
import importlib
import json
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import anthropic
import httpx2
import openai
import pytest

from cascadevlm.base.errors import FatalError, JudgeError, PermanentError, RateLimited, Refused, TransientError
from cascadevlm.judges.hosted.errors import ErrorResponse, error_of_response, translate
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge

SDKS: list[tuple[ModuleType, type[Exception], type[SdkJudge]]] = [
    (openai, openai.OpenAIError, OpenAIJudge),
    (anthropic, anthropic.AnthropicError, AnthropicJudge),
]
EITHER = pytest.mark.parametrize(("sdk", "root", "judge"), SDKS, ids=["openai", "anthropic"])

BY_STATUS: dict[int, type[JudgeError]] = {
    **dict.fromkeys((400, 412, 413, 415, 422, 431, 499), PermanentError),
    **dict.fromkeys((302, 401, 402, 403, 404, 405, 407, 410), FatalError),
    **dict.fromkeys((408, 409, 425, 500, 501, 502, 504, 520), TransientError),
    **dict.fromkeys((429, 503, 529), RateLimited),
}


def exceptions(sdk: ModuleType, root: type[Exception]) -> list[type[Exception]]:
    """All subclasses of the root, after the import of every module that can be imported. Generated types are only imported by
    these modules.
    """
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
def test_every_exception_of_a_request_may_pass_and_every_other_one_is_fatal(
    sdk: ModuleType, root: type[Exception], judge: type[SdkJudge]
) -> None:
    found = exceptions(sdk, root)
    assert len(found) > 15
    passing = {kind.__name__ for kind in (sdk.APIError, *_below(sdk.APIError)) if not issubclass(kind, sdk.APIStatusError)}
    assert {"APIConnectionError", "APITimeoutError", "APIResponseValidationError"} < passing
    for kind in (root, *found):
        if not issubclass(kind, sdk.APIStatusError):
            plain = type("Plain", (kind,), {"__init__": lambda self: None, "__str__": lambda self: "words"})  # needs no arguments
            error = translate(plain(), judge.errors, secret="")
            retried = kind.__name__ in passing | {"RetryableError"}
            assert type(error) is (TransientError if retried else FatalError), kind


def raised(kind: type[Exception], status: int, body: object = None) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://example.org/v1"), headers={"retry-after": "3"})
    if kind is openai.OAuthError:
        return openai.OAuthError(response=response, body=body)
    return kind("what the provider said", response=response, body=body)  # type: ignore[call-arg]


@EITHER
def test_a_status_is_what_counts(sdk: ModuleType, root: type[Exception], judge: type[SdkJudge]) -> None:
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
    assert type(error_of_response(status, {"error": {"message": "words"}})) is BY_STATUS[status]


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


OF_ONE_IMAGE: list[tuple[int, object, str]] = [
    (
        403,
        {"code": "permission-denied", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_X"},
        "Failed check",
    ),
    (
        403,
        {
            "error": {
                "code": 403,
                "message": "m requires moderation on X.",
                "metadata": {"reasons": ["sexual"], "flagged_input": "…"},
            }
        },
        "sexual",
    ),
    (
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering the content management policy.",
                "code": "content_filter",
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
        "content management policy",
    ),
    (400, {"error": {"message": "Not here.", "code": "content_policy_violation"}}, "Not here."),
    (400, {"error": {"message": "Your request was rejected as a result of our safety system.", "type": "x"}}, "safety system"),
    (400, {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."}, "inappropriate"),
    (
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"}},
        "",
    ),
    (400, {"error": {"message": "The image was flagged. Repeated violations may lead to your account being closed."}}, "flagged"),
    (200, {"error": {"message": "Blocked.", "code": "content_filter"}}, "Blocked."),
    (200, {"error": {"message": "The input was flagged by moderation", "code": 403}}, "flagged"),
    (500, {"error": {"message": "ContentPolicyViolationError: no", "type": "content_policy_violation"}}, "no"),
    (400, {"error": {"message": "输入可能包含敏感内容", "code": "1301"}}, "敏感"),
]
OF_ALL: list[tuple[int, object, str]] = [
    (
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "Your credit balance is too low. Please buy credits."},
        },
        "Your credit balance is too low.",
    ),
    (400, {"error": {"message": "Your account is not active, please check your billing details."}}, "not active"),
    (
        400,
        {"error": {"code": "Arrearage", "message": "Access denied, please make sure you are in good standing."}},
        "good standing",
    ),
    (400, {"code": "Arrearage", "error": "Not in good standing."}, "good standing"),
    (402, {"error": "Insufficient Balance"}, "Insufficient Balance"),
    (
        403,
        {"error": {"message": "The free allocated quota of this model is used up.", "code": "AllocationQuota"}},
        "free allocated",
    ),
    (403, {"detail": "Your account has been flagged for violating our content policy."}, "has been flagged"),
    (403, {"error": {"message": "The key has no access to this."}}, "no access"),
    (
        429,
        {"error": {"message": "You exceeded your current quota, please check your plan and billing details."}},
        "current quota",
    ),
    (429, {"error": {"message": "Your account is suspended due to insufficient balance, please recharge."}}, "recharge"),
    (401, {"message": "Unauthorized"}, "Unauthorized"),
    (400, {"error": {"message": "Incorrect API key provided: ab***yz."}}, "Incorrect API key"),
    (400, [{"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}], "API key not valid."),
    (400, {"error": {"message": "acme/x is not a valid model ID", "code": 400}}, "not a valid model"),
    (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}, "Not Exist"),
    (404, {"error": "model 'x' not found, try pulling it first"}, "try pulling"),
    (404, "<html><head><title>404 Not Found</title></head><body><h1>nginx</h1></body></html>", "404 Not Found"),
    (405, {"detail": "Method Not Allowed"}, "Method Not Allowed"),
    (500, {"error": {"code": 500, "message": "image input is not supported - hint: provide the mmproj"}}, "mmproj"),
    (200, {"error": {"message": "No auth credentials found", "code": 401}}, "No auth"),
    (200, {"error": {"message": "More credits are needed.", "code": "402"}}, "More credits"),
    (200, {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}, "x-api-key"),
    (400, {"error": {"message": "Budget has been exceeded! Current cost: 2, max: 1", "type": "budget_exceeded"}}, "Budget"),
    (429, {"error": {"message": "User=x over budget.", "code": "400"}}, "over budget"),
    (429, {"error": {"message": "RateLimitError: You exceeded your current quota, check your plan."}}, "your plan"),
    (412, {"error": {"message": "Account x is suspended, possibly for failure to pay."}}, "suspended"),
    (429, {"error": {"message": "余额不足,请充值。", "code": "1113"}}, "余额不足"),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, "insufficient balance"),
    (200, {"error": "Unexpected endpoint or method. (POST /chat/completions). Returning 200 anyway"}, "Unexpected endpoint"),
    (400, {"message": "The provided model identifier is invalid.", "__type": "ValidationException"}, "identifier"),
    (400, {"error": "Model does not support images. Please use a model that does."}, "not support images"),
    (400, {"error": {"message": "Invalid content type. image_url is only supported by certain models."}}, "certain models"),
    (422, {"error": {"message": "messages[0]: unknown variant `image_url`, expected `text`"}}, "unknown variant"),
    (400, {"error": {"message": "this model is missing data required for image input"}}, "image input"),
    (500, {"error": {"message": "model requires more system memory (8 GiB) than is available (3 GiB)"}}, "memory"),
]
THAT_PASS: list[tuple[int, object, str]] = [
    (
        429,
        {"error": {"message": "Rate limit reached for m on tokens per min. See https://x/account/billing for more."}},
        "tokens",
    ),
    (429, [{"error": {"code": 429, "message": "You exceeded your current quota, billing … Please retry in 33.3s."}}], "retry in"),
    (429, {"error": {"message": "Your account reached max request: 3, please try again after 1 seconds"}}, "max request"),
    (503, {"error": {"message": "Loading model", "type": "unavailable_error"}}, "Loading"),
    (500, {"error": "model runner has unexpectedly stopped"}, "model runner has unexpectedly stopped"),
    (502, "<html><head><title>502 Bad Gateway</title></head></html>", "502 Bad Gateway"),
    (200, {"id": "g", "error": {"message": "Upstream error: temporarily overloaded", "code": 502}}, "temporarily overloaded"),
    (200, {"error": {"message": "Slow down", "code": 429}}, "Slow down"),
    (200, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "Overloaded"),
    (200, {"error": "boom"}, "boom"),
    (429, {"error": {"message": "Resource has been exhausted (e.g. check quota).", "status": "RESOURCE_EXHAUSTED"}}, "quota"),
    (429, {"error": {"message": "RateLimitError: Rate limit reached for m."}}, "Rate limit"),
    (400, {"__type": "ThrottlingException", "message": "Too many tokens."}, "Too many"),
    (200, "<html><head><title>Sign in</title></head></html>", "is not JSON: 'Sign in'. Check base_url."),
]
OF_THIS_REQUEST: list[tuple[int, object, str]] = [
    (
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "detail"], "msg": "Extra inputs"}]},
        "body.detail: Extra inputs",
    ),
    (400, [{"error": {"code": 400, "message": 'Unknown name "detail"', "status": "INVALID_ARGUMENT"}}], 'Unknown name "detail"'),
    (400, {"error": {"message": "x is not taken into account"}}, "into account"),
    (413, {"unheard": "of"}, '{"unheard": "of"}'),
    (400, {"error": {"message": "The model does not support image format webp."}}, "webp"),
    (400, {"error": {"message": "max_tokens must be greater than thinking.budget_tokens"}}, "budget_tokens"),
    (200, {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}, "bad"),
]
RESPONSES = [
    *((Refused, False, *case) for case in OF_ONE_IMAGE),
    *((FatalError, False, *case) for case in OF_ALL),
    *((TransientError, True, *case) for case in THAT_PASS),
    *((PermanentError, False, *case) for case in OF_THIS_REQUEST),
]


@EITHER
@pytest.mark.parametrize(("kind", "retryable", "status", "body", "words"), RESPONSES)
def test_the_table(
    sdk: ModuleType,
    root: type[Exception],
    judge: type[SdkJudge],
    kind: type[JudgeError],
    retryable: bool,
    status: int,
    body: object,
    words: str,
) -> None:
    """For every body: an error about one image is a refusal, an error about all images is fatal, and the message has the
    server's words.
    """
    if status == 200:
        error = translate(ErrorResponse(body), judge.errors, secret="")
    else:
        client = (sdk.OpenAI if sdk is openai else sdk.Anthropic)(api_key="k", base_url="http://localhost")
        text = body if isinstance(body, str) else json.dumps(body)
        exc = client._make_status_error_from_response(httpx2.Response(status, text=text, request=REQUEST))
        client.close()
        error = translate(exc, judge.errors, secret="")
    assert error.retryable == retryable
    assert retryable or type(error) is kind
    assert words in str(error)
    assert not error.may_be_billed
    assert kind is not FatalError or error.hint


@pytest.mark.parametrize(
    "body",
    [
        {"id": "g", "choices": []},
        {"type": "message", "role": "assistant", "content": None, "usage": {"input_tokens": 9}},
        {"object": "response", "status": "completed", "output": None},
    ],
)
def test_a_body_without_an_answer_or_an_error_may_be_billed(body: object) -> None:
    error = error_of_response(200, body)
    assert (type(error), error.may_be_billed) == (TransientError, True)


REQUEST = httpx2.Request("POST", "https://example.org/v1")


@EITHER
def test_what_has_no_status(sdk: ModuleType, root: type[Exception], judge: type[SdkJudge]) -> None:
    answer = httpx2.Response(200, request=REQUEST)
    cases: list[tuple[Exception, type[JudgeError], bool]] = [
        (sdk.APITimeoutError(request=REQUEST), TransientError, True),
        (sdk.APIConnectionError(request=REQUEST), TransientError, True),
        (sdk.APIResponseValidationError(response=answer, body=None), TransientError, True),
        (root("a bad client"), FatalError, True),
        (ValueError("no JSON"), TransientError, True),
        (KeyError("a bug"), PermanentError, True),
        (caused_by(sdk.APIConnectionError(request=REQUEST), httpx2.ConnectError("refused")), TransientError, False),
        (caused_by(sdk.APIConnectionError(request=REQUEST), httpx2.LocalProtocolError("bad header")), FatalError, False),
        (UnicodeEncodeError("ascii", "“", 0, 1, "a header"), FatalError, False),
        (caused_by(sdk.APITimeoutError(request=REQUEST), httpx2.ConnectTimeout("slow")), TransientError, False),
        (caused_by(sdk.APITimeoutError(request=REQUEST), httpx2.ReadTimeout("slow")), TransientError, True),
    ]
    for exc, kind, may_be_billed in cases:
        error = translate(exc, judge.errors, secret="")
        assert (type(error), error.may_be_billed) == (kind, may_be_billed), exc


def caused_by(exc: Exception, cause: Exception) -> Exception:
    exc.__cause__ = cause
    return exc


@pytest.mark.parametrize("body", ["<p>sk-abcdef</p>", {"error": "x" * 495 + "sk-abcdef"}, {"error": {"code": "sk-abcdef"}}])
@pytest.mark.parametrize("status", [200, 400, 401])
def test_no_body_brings_the_key_into_a_message(status: int, body: object) -> None:
    assert "abcdef" not in str(error_of_response(status, body, secret="sk-abcdef"))


def test_a_message_never_holds_the_key() -> None:
    exc = raised(openai.AuthenticationError, 401)
    exc.args = ("x" * 480 + "Incorrect key sk-abcdef: sk-abcdef" + "x" * 2000,)
    assert "sk-abcdef" in str(exc)
    message = str(translate(exc, OpenAIJudge.errors, secret="sk-abcdef"))
    assert "sk-" not in message
    assert len(message) < 600


@pytest.mark.parametrize("through", [OpenAIJudge, AnthropicJudge])
@pytest.mark.parametrize("has_aiohttp", [True, False])
def test_a_server_that_is_not_there_has_billed_nothing(
    through: type[SdkJudge], has_aiohttp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both transports recognise a refused connection. It is fatal if the server has never answered."""
    for backend in ("openai", "anthropic"):
        monkeypatch.setattr(f"cascadevlm_backends.{backend}.HAS_AIOHTTP", has_aiohttp)
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
    assert (type(error), error.may_be_billed) == (FatalError, False)
    assert str(error) == "No connection to http://127.0.0.1:9: Connection refused. Is the server running, and is base_url right?"


@pytest.mark.parametrize(("secret", "told"), [("", True), ("sk-abcdef", True), ("no JSON", False)])
async def test_the_cause_is_told_unless_it_shows_the_key(secret: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own client may have no key."""
    cause = ValueError("no JSON")

    async def request() -> None:
        raise cause

    monkeypatch.setattr(OpenAIJudge, "secret", secret)
    with pytest.raises(TransientError) as caught:
        await OpenAIJudge("gpt-4o").call(request())
    assert caught.value.__cause__ is (cause if told else None)
