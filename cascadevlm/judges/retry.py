"""All retries. A backend decides the kind of an error, and this module decides when to ask again."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from math import isfinite

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.wait import wait_random_exponential

from cascadevlm.base.errors import CascadeError, FatalError, RateLimited
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge

_BACKOFF = wait_random_exponential(multiplier=1, max=60)


def wait_as_told(state: RetryCallState) -> float:
    """Seconds to wait: the time that the response names. Default: exponential backoff with full jitter (Brooker 2015, AWS)."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, RateLimited) and error.retry_after is not None:
        return error.retry_after
    return _BACKOFF(state)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait according to the headers ``retry-after-ms`` and ``retry-after`` (RFC 9110, 10.2.3). None without them."""
    for name, units_per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(KeyError, ValueError):
            if isfinite(seconds := float(headers[name]) / units_per_second):
                return max(0.0, seconds)
    with suppress(KeyError, ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None


def patient(*, attempts: int = 6, seconds: float = 300, wait: Callable[[RetryCallState], float] = wait_as_told) -> AsyncRetrying:
    """Repeats a call after retryable errors.

    Args:
        attempts: maximum number of calls.
        seconds: maximum total time between the calls, in seconds. The time inside a call does not count, because a call may
            wait long for its rate limit or its budget.
        wait: function that gives the seconds before the next call.
    """
    return AsyncRetrying(
        retry=retry_if_exception(lambda exc: isinstance(exc, CascadeError) and exc.retryable),
        stop=lambda state: state.attempt_number >= attempts or state.idle_for + state.upcoming_sleep >= seconds,
        wait=wait,
        reraise=True,
    )


class Retrying(WrapperJudge):
    """Asks again after retryable errors, see `patient`.

    If the provider wants a pause of more than ``seconds``, the run stops, because all further questions would fail too.
    """

    def __init__(
        self, wrapped: Judge, *, attempts: int = 6, seconds: float = 300, wait: Callable[[RetryCallState], float] = wait_as_told
    ) -> None:
        super().__init__(wrapped)
        self.attempts = attempts
        self.seconds = seconds
        self.wait = wait

    async def judge(self, question: Question) -> Verdict:
        try:
            return await self.wrapped.judge(
                question
            )  # most first calls succeed, and the start of tenacity takes longer than all other wrappers
        except CascadeError as exc:
            first = exc
        try:
            async for attempt in patient(attempts=self.attempts, seconds=self.seconds, wait=self.wait):
                with attempt:
                    if attempt.retry_state.attempt_number == 1:
                        raise first
                    return await self.wrapped.judge(question)
            raise AssertionError("the last attempt returns or raises")
        except RateLimited as exc:
            if exc.retry_after is None or exc.retry_after < self.seconds:
                raise
            hint = "Run the same command after that time. The answers so far are in the cache."
            raise FatalError(f"The provider accepts no request for {exc.retry_after:.0f} seconds: {exc}", hint=hint) from exc
