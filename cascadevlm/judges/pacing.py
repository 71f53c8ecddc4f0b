"""Rates: the number of requests in flight, and requests and tokens per minute."""

import asyncio
import time

from aiolimiter import AsyncLimiter

from cascadevlm.base.errors import RateLimited
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.base import Judge, WrapperJudge

TOKEN_BURST = 1 / 10
"""Share of the tokens per minute that may be used at the same time."""


class Paced(WrapperJudge):
    """Keeps between 1 and ``concurrency`` requests in flight, and keeps the judge's requests and tokens per minute.

    The number in flight is halved when the provider reports too many requests, and grows by one after each round of successes
    (additive increase, multiplicative decrease; Chiu and Jain 1989). Tokens are counted by their worst case.
    """

    def __init__(self, wrapped: Judge) -> None:
        super().__init__(wrapped)
        requests_per_minute, tokens_per_minute = wrapped.requests_per_minute, wrapped.tokens_per_minute
        self.limit = float(self.concurrency)
        self._in_flight = 0
        self._decreased = -float("inf")
        self._room = asyncio.Condition()
        self._requests = AsyncLimiter(1, 60 / requests_per_minute) if requests_per_minute else None  # evenly, no burst
        self._tokens = AsyncLimiter(tokens_per_minute * TOKEN_BURST, 60 * TOKEN_BURST) if tokens_per_minute else None

    async def judge(self, question: Question) -> Verdict:
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            wanted = float(self.wrapped.quote(question).tokens)
            while wanted > 0:
                share = min(wanted, self._tokens.max_rate)
                await self._tokens.acquire(share)
                wanted -= share
        async with self._room:
            await self._room.wait_for(lambda: self._in_flight < int(self.limit))
            self._in_flight += 1
        began = time.monotonic()
        try:
            verdict = await self.wrapped.judge(question)
            self.limit = min(self.concurrency, self.limit + 1 / self.limit)
            return verdict
        except RateLimited:
            if began > self._decreased:  # requests sent at the same time fail together and count once
                self.limit = max(1.0, self.limit / 2)
                self._decreased = time.monotonic()
            raise
        finally:
            self._in_flight -= 1
            async with self._room:
                self._room.notify(2)  # one request has ended, and the limit may have grown by one
