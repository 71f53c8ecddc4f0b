"""Faults of requests, in the form of both providers."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, TypeAlias
from uuid import uuid4

from pydantic import JsonValue

Json: TypeAlias = Mapping[str, object]
Provider: TypeAlias = Literal["openai", "anthropic"]

ErrorKind: TypeAlias = Literal[
    "rate_limit",
    "server_error",
    "unavailable",
    "overloaded",
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "quota",
]
"""Faults that give an error status."""

ConnectionKind: TypeAlias = Literal["reset", "slow", "drip", "endless", "bomb", "truncated", "invalid_json", "redirect"]
"""Faults of the connection: it breaks, is slow, gives single bytes, never ends, gives a small body that becomes very large when
it is decompressed, ends inside the answer, does not contain JSON, or redirects. Rows of batches have no such faults.
"""

VerdictKind: TypeAlias = Literal["wrong_label", "not_offered_letter", "empty", "huge", "refusal", "content_filter", "length"]
"""Faults that give a correct response with an unusable answer."""

FaultKind: TypeAlias = ErrorKind | ConnectionKind | VerdictKind | Literal["expired", "body"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        kind: the kind of fault. ``"expired"`` is only for rows of batches. ``"body"`` is a response with a given status and
            body.
        retry_after: header of an error: seconds or an HTTP date.
        retry_after_ms: header of an error: milliseconds.
        seconds: time before the first byte of a slow answer, or between two bytes of a dripping answer.
        status: status of the response, for ``"body"``.
        body: body of the response, for ``"body"``: JSON, or a text that is sent as HTML.
        location: target of a redirect.
    """

    kind: FaultKind
    _: KW_ONLY
    retry_after: float | str | None = None
    retry_after_ms: float | None = None
    seconds: float = 1.0
    status: int = 200
    body: JsonValue = None
    location: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response about the waiting time and the target of a redirect."""
        told = {"retry-after": self.retry_after, "retry-after-ms": self.retry_after_ms, "location": self.location or None}
        return {name: str(value) for name, value in told.items() if value is not None}


class Problem(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        self.kind = kind

    def reply(self, provider: Provider) -> tuple[int, Json]:
        """Status and body in the provider's form."""
        error = ERRORS[self.kind]
        message = str(self) or error.message
        if provider == "anthropic":
            status, type_ = error.anthropic
            return status, {"type": "error", "error": {"type": type_, "message": message}, "request_id": new_id("req")}
        status, type_, code = error.openai
        return status, {"error": {"message": message, "type": type_, "param": None, "code": code}}


class Error(NamedTuple):
    """An error for both providers: its status, its type and, for OpenAI, its code."""

    message: str
    openai: tuple[int, str, str | None]
    anthropic: tuple[int, str]


ERRORS: Mapping[str, Error] = {
    "rate_limit": Error("Rate limit reached.", (429, "requests", "rate_limit_exceeded"), (429, "rate_limit_error")),
    "server_error": Error("The server had an error.", (500, "server_error", None), (500, "api_error")),
    "unavailable": Error("The service is unavailable.", (503, "server_error", None), (503, "api_error")),
    "overloaded": Error("Overloaded.", (529, "server_error", "overloaded"), (529, "overloaded_error")),
    "bad_request": Error("Invalid request.", (400, "invalid_request_error", None), (400, "invalid_request_error")),
    "unauthorized": Error("Wrong key.", (401, "invalid_request_error", "invalid_api_key"), (401, "authentication_error")),
    "forbidden": Error("Not allowed.", (403, "permission_error", None), (403, "permission_error")),
    "not_found": Error("Not found.", (404, "invalid_request_error", "not_found"), (404, "not_found_error")),
    "quota": Error("No credit is left.", (429, "insufficient_quota", "insufficient_quota"), (402, "billing_error")),
}


def new_id(prefix: str) -> str:
    """An identifier in the form of the providers."""
    return f"{prefix}_{uuid4().hex}"
