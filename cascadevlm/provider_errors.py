"""What came out of a provider's SDK as one of our errors, which say whether to ask again and whether it may be billed."""

from collections.abc import Mapping

from cascadevlm.errors import FatalError, JudgeError, PermanentError, RateLimited, TransientError
from cascadevlm.retry import retry_after

OVERLOADED = frozenset({429, 503, 529})
NEVER_CONNECTED = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
MOST_OF_A_MESSAGE = 500
EXHAUSTED = ("insufficient_quota", "billing_hard_limit_reached", "billing_error", "spend_limit")


def error_of_status(status: int, message: str, *, wait: float | None = None) -> JudgeError:
    """The error that a response's status amounts to; it was not billed."""
    exhausted = status == 402 or any(word in message for word in EXHAUSTED)
    message = message[:MOST_OF_A_MESSAGE]
    if exhausted:
        return FatalError(message, hint="The account's quota or spending limit is exhausted.")
    if status in OVERLOADED:
        return RateLimited(message, retry_after=wait)
    if status in (401, 403, 404):
        return FatalError(message)
    return TransientError(message) if status >= 500 or status in (408, 409) else PermanentError(message)


def translate(exc: Exception, errors: Mapping[str, type[JudgeError]], *, secret: str) -> JudgeError:
    """One of ours for whatever came out of an SDK: by its status where it has one, else by the name of its class or the nearest
    of its bases. A request that broke off after it was sent may have been answered, and so billed.

    Args:
        errors: ours by the names of the SDK's classes.
        secret: the key, which must not get into a message.
    """
    code = getattr(exc, "code", None)
    message = f"{type(exc).__name__}: {exc}" + (f" ({code})" if code else "")
    message = message.replace(secret, "***") if secret else message
    status, response = getattr(exc, "status_code", None), getattr(exc, "response", None)
    if isinstance(status, int) and status >= 400:
        return error_of_status(status, message, wait=retry_after(response.headers if response is not None else {}))
    unknown = TransientError if isinstance(exc, ValueError) else PermanentError  # a ValueError: a body that is no JSON
    kind = next((errors[name] for name in _class_names(exc) if name in errors), unknown)
    return kind(message[:MOST_OF_A_MESSAGE], may_be_billed=not _never_connected(exc))


def _class_names(exc: BaseException) -> list[str]:
    return [base.__name__ for base in type(exc).__mro__]


def _never_connected(exc: BaseException) -> bool:
    """Whether no connection was made, by the exception's causes. Through aiohttp only its own word counts: the transport tells a
    connection closed after the request as one that was never made."""
    causes = []
    cause: BaseException | None = exc
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    from_aiohttp = [cause for cause in causes if type(cause).__module__.partition(".")[0] == "aiohttp"]
    if from_aiohttp:
        return any({"ClientConnectorError", "ConnectionTimeoutError"} & {*_class_names(cause)} for cause in from_aiohttp)
    return any(type(cause).__name__ in NEVER_CONNECTED for cause in causes)
