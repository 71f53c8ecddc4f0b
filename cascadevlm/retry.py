"""The one owner of waiting: the backend says what kind an error is, this says when to ask again."""

from collections.abc import Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_after_delay
from tenacity.wait import wait_random_exponential

from cascadevlm.errors import CascadeError, RateLimited
from cascadevlm.judge import Judge, WrapperJudge
from cascadevlm.types import Question, Verdict

_BACKOFF = wait_random_exponential(multiplier=1, max=60)


def wait_as_told(state: RetryCallState) -> float:
    """Seconds to wait: what this very response said, else exponential with full jitter (Brooker 2015, AWS)."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, RateLimited) and error.retry_after is not None:
        return error.retry_after
    return _BACKOFF(state)


class Retrying(WrapperJudge):
    """Asks again after retryable errors.

    Attributes:
        attempts: the most requests for one question.
        seconds: no further attempt begins later than this after the first.
        wait: what to wait, given tenacity's account of the attempts so far.
    """

    def __init__(
        self, wrapped: Judge, *, attempts: int = 6, seconds: float = 300, wait: Callable[[RetryCallState], float] = wait_as_told
    ) -> None:
        super().__init__(wrapped)
        self.attempts = attempts
        self.seconds = seconds
        self.wait = wait

    async def judge(self, question: Question) -> Verdict:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda exc: isinstance(exc, CascadeError) and exc.retryable),
            stop=stop_after_attempt(self.attempts) | stop_after_delay(self.seconds),
            wait=self.wait,
            reraise=True,
        )
        return await retrying(self.wrapped.judge, question)
