"""Translates a provider's errors into errors of cascadevlm. They define whether to ask again and whether the request may be
billed.

`RULES` is the only table of statuses, codes and words.
"""

import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from ssl import SSLError

from pydantic import BaseModel

from cascadevlm.base.errors import FatalError, JudgeError, PermanentError, RateLimited, Refused, TransientError
from cascadevlm.base.labels import one_line
from cascadevlm.judges.retry import retry_after

NEVER_CONNECTED = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
NEVER_SENT = frozenset({"UnicodeEncodeError", "LocalProtocolError", "UnsupportedProtocol", "InvalidURL"})
MOST_OF_A_MESSAGE = 500

EXHAUSTED = "The account's quota or spending limit is exhausted. Raise it, then run the same command again to continue."
CHECK_KEY = "Check the key and its access rights, then run the same command again to continue."
CHECK_MODEL = "Check model and base_url, then run the same command again to continue."
NO_CONNECTION = "Is the server running, and is base_url right?"


class ErrorResponse(Exception):
    """A response without an answer.

    Attributes:
        status: HTTP status of the response, or of the row of a batch.
        body: the body as JSON or as an object of the SDK. A text if it is not JSON.
    """

    def __init__(self, body: object, *, status: int = 200) -> None:
        super().__init__(f"status {status}")
        self.body = _as_json(body)
        self.status = status


def _as_json(body: object) -> object:
    if isinstance(body, list):
        return [_as_json(item) for item in body]
    return body.model_dump(mode="json", exclude_unset=True, warnings=False) if isinstance(body, BaseModel) else body


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for one kind of error. It applies to a response that has one of the codes, or one of the statuses together with
    the words.

    Attributes:
        kind: the error class of cascadevlm.
        codes: codes of the body, in the form of `_code`.
        statuses: HTTP statuses.
        words: pattern of the server's words. Default: any words.
        hint: the hint of the error.
    """

    kind: type[JudgeError]
    codes: frozenset[str] = frozenset()
    statuses: Container[int] = ()
    words: re.Pattern[str] = re.compile("")
    hint: str = ""

    def holds(self, status: int, codes: frozenset[str], words: str) -> bool:
        """Returns True if the rule applies to a response."""
        return bool(self.codes & codes) or (status in self.statuses and bool(self.words.search(words)))


OK = 200
"""The status of a response whose body contains an error."""

RULES: tuple[Rule, ...] = (
    Rule(
        kind=FatalError,
        statuses={OK, 400, 401, 403, 412, 429},
        words=_words(
            r"\b(account|organi[sz]ation|workspace|key)\b[^.]{0,40}\b(is|was|has been|been) (\w+ )?"
            r"(suspended|deactivated|disabled|banned|blocked|terminated|revoked|flagged|restricted|closed)"
        ),
        hint=CHECK_KEY,
    ),
    Rule(
        kind=Refused,
        codes=frozenset(
            (
                *("content_filter", "content_filtered", "content_policy_violation", "image_content_policy_violation"),
                *("contentpolicyviolationerror", "responsibleaipolicyviolation", "moderation_blocked", "prohibited_content"),
                *("data_inspection_failed", "datainspectionfailed", "safety", "sensitive_content"),
            )
        ),
        statuses={OK, 400, 403, 406, 422, 451},
        words=_words(
            r"content.{0,20}(filter|polic|moderat|safety|violat|guideline|flagged|blocked|inappropriate|prohibited)"
            r"|\bmoderat(ion|ed)|\bflagged\b|safety.?(system|check|filter|polic|setting|guideline)|inappropriate|guardrail|nsfw"
            r"|(violat|breach).{0,40}(polic|guideline|terms)|blocked.{0,40}(safety|polic|prohibited)|prohibited.content"
            r"|sensitive (content|information|image)|responsible.?ai|data.?inspection|敏感|违规"
        ),
    ),
    Rule(
        kind=FatalError,
        codes=frozenset(
            (
                *("insufficient_quota", "insufficient_user_quota", "billing_hard_limit_reached", "billing_not_active"),
                *("billing_error", "enforced_spend_limit_reached", "contract_spend_limit_reached", "insufficient_balance"),
                *("arrearage", "insufficient_credits", "payment_required", "budget_exceeded"),
            )
        ),
        statuses={402},
        hint=EXHAUSTED,
    ),
    Rule(  # before the words for money: a message about a rate may mention the account
        kind=RateLimited,
        statuses={429, 503, 529},
        words=_words(
            r"rate.?limit(?!error)|per.(second|minute|min|hour|day)|\b[rt]p[smd]\b"  # proxies use RateLimitError for every 429
            r"|(retry|again) (in|after) \S*\d|too many|concurren"
        ),
    ),
    Rule(
        kind=FatalError,
        statuses={OK, 400, 401, 403, 404, 409, 429},
        words=_words(
            r"\bcredits?\b|\bbalance\b|billing|(?<!check )\bquota\b|\bpayment|prepaid|insufficient funds"
            r"|(spend|spending|usage).limit|arrear|overdue|unpaid|over budget|budget has been exceeded|余额|欠费"
            r"|(?<!into )\baccount\b"
        ),
        hint=EXHAUSTED,
    ),
    Rule(
        kind=RateLimited,
        codes=frozenset(
            (
                *("rate_limit_exceeded", "rate_limit_error", "resource_exhausted", "too_many_requests", "throttlingexception"),
                *("overloaded", "overloaded_error", "slow_down", "unavailable", "service_unavailable"),
            )
        ),
        statuses={429, 503, 529},
    ),
    Rule(
        kind=FatalError,
        codes=frozenset({"model_not_found", "model_not_exist", "not_found_error", "unknown_model", "invalid_model"}),
        statuses={404, 405, 410, *range(300, 400)},
        hint=CHECK_MODEL,
    ),
    Rule(
        kind=FatalError,
        statuses={OK, 400, 403, 422, 500, 501},
        words=_words(
            r"\bmodels?\b.{0,100}(not exist|not found|not a valid|not available|decommissioned|no longer|not loaded)"
            r"|(unknown|invalid|unsupported|no such|not a valid) model\b|no models? loaded|no endpoints found|unexpected endpoint"
            r"|model (id|identifier|name) is invalid|does not work with the specified model|requires more system memory"
            r"|image input is not supported|support image input|not a multimodal model|missing data required for image input"
            r"|\bmodels?\b.{0,60} not support (images?|vision)( inputs?)?\s*(\.|;|$)"
            r"|image_url.{0,60}(only supported|not supported|expected .?text)"
        ),
        hint=CHECK_MODEL,
    ),
    Rule(
        kind=FatalError,
        codes=frozenset(
            (
                "invalid_api_key",
                "authentication_error",
                "unauthenticated",
                "permission_error",
                "permission_denied",
                "unauthorized",
            )
        ),
        statuses={401, 403, 407},
        hint=CHECK_KEY,
    ),
    Rule(
        kind=FatalError,
        statuses={OK, 400},
        words=_words(
            r"\bapi.?key\b|authenticat|unauthori[sz]ed|not authori[sz]ed|credentials|access token|permission denied"
            r"|location is not supported|not available in your (country|region)"
        ),
        hint=CHECK_KEY,
    ),
    Rule(
        kind=TransientError,
        codes=frozenset({"server_error", "api_error", "internal_error", "internal_server_error", "internal", "timeout_error"}),
        statuses={408, 409, 425, *range(500, 600)},
    ),
    Rule(
        kind=PermanentError,
        codes=frozenset({"invalid_request_error", "invalid_argument", "badrequesterror", "request_too_large"}),
        statuses=range(400, 500),
    ),
)
"""The first rule that applies to a response decides the kind of its error. An error that concerns one image is Refused. An
error that concerns all images is a FatalError.
"""


def error_of_response(status: int, body: object, *, wait: float | None = None, secret: str = "") -> JudgeError:
    """The error of cascadevlm for a response, with the server's own words. Only a response without any sign of an error may be
    billed.

    Args:
        status: HTTP status of the response. With 200, the code in the body decides. Without a code, the error is transient.
        body: the body as JSON, or as text if it is not JSON.
        wait: seconds to wait before the next request, if the response says so.
        secret: the key. Messages must not contain it.
    """
    if status == OK and isinstance(body, str):
        text = _readable(body).replace(secret or "\0", "***")[:MOST_OF_A_MESSAGE]
        return TransientError(f"The response of the endpoint is not JSON: {text!r}.", hint="Check base_url.")
    codes = frozenset(_codes(body))
    if status == OK:
        status = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), OK)
    told = list(dict.fromkeys(_told(body)))
    words = " ".join(told) or one_line(json.dumps(body, default=str, ensure_ascii=False))
    named = [code for code in sorted(codes - {"error", _code(secret)}) if not code.isdigit() and code not in words]
    message = words.replace(secret or "\0", "***")[:MOST_OF_A_MESSAGE]
    message = f"{message} (status {', '.join([str(status), *named])})"
    if status == OK and not told and not any(rule.codes & codes for rule in RULES):
        return TransientError(f"The response contains no answer: {message}", may_be_billed=True)
    rule = next((rule for rule in RULES if rule.holds(status, codes, words)), None)
    if rule is None:
        return TransientError(message)
    return RateLimited(message, retry_after=wait) if rule.kind is RateLimited else rule.kind(message, hint=rule.hint)


def _code(text: str) -> str:
    """A code in lower case, with underscores in place of other characters."""
    return re.sub(r"\W+", "_", text).lower()


def _codes(body: object) -> Iterator[str]:
    """All codes and types in a body, in the form of `_code`."""
    if isinstance(body, Mapping):
        for name, value in body.items():
            if name in ("code", "type", "__type", "status", "error_code", "errorCode", "param") and isinstance(value, str | int):
                yield _code(str(value))
            yield from _codes(value)
    elif isinstance(body, list):
        for item in body:
            yield from _codes(item)


_SAYING = (
    "message",
    "msg",
    "error",
    "errors",
    "detail",
    "error_description",
    "error_msg",
    "title",
    "reason",
    "metadata",
    "raw",
    "reasons",
    "base_resp",
    "status_msg",
)
"""The fields that contain a server's words, at any depth."""


def _told(body: object) -> Iterator[str]:
    """The server's words in a body."""
    if isinstance(body, str):
        if body.strip():
            yield _readable(body)
    elif isinstance(body, list):
        for item in body:
            yield from _told(item)
    elif isinstance(body, Mapping):
        where = body.get("loc")  # pydantic's name for the wrong field
        place = ".".join(map(str, where)) + ": " if isinstance(where, list) else ""
        yield from (place + words for name in _SAYING for words in _told(body.get(name)))


def _readable(text: str) -> str:
    """The text on one line. A page of HTML is replaced by its title; without a title, by its words."""
    if "<html" in text[:1000].lower():
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        text = title[1] if title and title[1].strip() else re.sub(r"<[^>]*>", " ", text)
    return one_line(text)


def translate(exc: Exception, errors: Mapping[str, type[JudgeError]], *, secret: str, reached: bool = True) -> JudgeError:
    """The error of cascadevlm for an exception of an SDK.

    If the exception has a response, the response decides. If not, the name of the exception's class or of its nearest base
    class decides. A request that is interrupted after it is sent may have been answered and billed.

    Args:
        exc: the exception.
        errors: the error class of cascadevlm for each exception class of the SDK, by class name.
        secret: the key. Messages must not contain it.
        reached: true if a connection to the endpoint was made before. If not, a refused connection is fatal, because it affects
            all questions.
    """
    if isinstance(exc, ErrorResponse):
        return error_of_response(exc.status, exc.body, secret=secret)
    response = getattr(exc, "response", None)
    status = getattr(exc, "status_code", getattr(response, "status_code", None))
    if isinstance(status, int) and status >= 300:
        wait = retry_after(response.headers if response is not None else {})
        return error_of_response(status, _body(exc), wait=wait, secret=secret)
    causes = _causes(exc)
    message = " ".join(f"{type(each).__name__}: {each}" for each in dict.fromkeys((exc, causes[-1])))
    message = one_line(message).replace(secret or "\0", "***")[:MOST_OF_A_MESSAGE]
    if _never_sent(causes):  # the exception's text may contain the key
        return FatalError(
            "No request can be sent: the key, a header or base_url has a character that is not allowed.",
            hint="Correct the key, the headers or base_url.",
        )
    if refusal := _refused_connection(causes):
        message = f"No connection to {_server(exc)}: {refusal}."
        return TransientError(message) if reached else FatalError(message, hint=NO_CONNECTION)
    no_answer = isinstance(exc, ValueError) or _from_aiohttp(causes)  # the body is not JSON, or the server does not speak HTTP
    unknown = TransientError if no_answer else PermanentError
    if _never_connected(causes):
        return TransientError(f"No connection to {_server(exc)} was made in time.", hint=NO_CONNECTION)
    kind = next((errors[name] for name in _class_names(exc) if name in errors), unknown)
    return kind(message, may_be_billed=True)


def _body(exc: Exception) -> object:
    """The whole body of an error response. The SDK's exception may have only a part of it."""
    try:
        return json.loads(exc.response.text)  # type: ignore[attr-defined]
    except (AttributeError, ValueError, RuntimeError):  # no response, not JSON, or not read
        return getattr(exc, "body", None) or str(exc)


def _class_names(exc: BaseException) -> list[str]:
    return [base.__name__ for base in type(exc).__mro__]


def _causes(exc: BaseException) -> list[BaseException]:
    """The exception, its cause, the cause of the cause, and so on."""
    causes = []
    cause: BaseException | None = exc
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _from_aiohttp(causes: list[BaseException]) -> list[BaseException]:
    """The exceptions of aiohttp among the causes. If there are any, only these count: the transport translates them wrongly.

    The transport reports a connection closed after the request as never made, and a refused connection as a time-out.
    """
    return [cause for cause in causes if type(cause).__module__.partition(".")[0] == "aiohttp"]


def _never_sent(causes: list[BaseException]) -> bool:
    """True if the request itself is wrong, for example by a line break in a header. aiohttp reports this only in words."""
    return any(type(cause).__name__ in NEVER_SENT or (type(cause) is ValueError and "header" in str(cause)) for cause in causes)


def _never_connected(causes: list[BaseException]) -> bool:
    """True if no connection was made."""
    if ours := _from_aiohttp(causes):
        return any({"ClientConnectorError", "ConnectionTimeoutError"} & {*_class_names(cause)} for cause in ours)
    return any(type(cause).__name__ in NEVER_CONNECTED for cause in causes)


def _refused_connection(causes: list[BaseException]) -> str:
    """The reason why the connection was refused, in the words of the operating system. "" if it was made, or took too long."""
    decisive = _from_aiohttp(causes) or causes
    if not any({"ClientConnectorError", "ConnectError"} & {*_class_names(cause)} for cause in decisive):
        return ""
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, SSLError):  # not an errno
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    return one_line(str(causes[-1]))


def _server(exc: Exception) -> str:
    """Scheme and host of a request, without credentials."""
    url = getattr(getattr(exc, "request", None), "url", None)
    return f"{url.scheme}://{url.netloc.decode()}" if url is not None else "the endpoint"
