"""Judges that answer in the workers of a cluster."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar

from PIL import Image
from pydantic import JsonValue

from cascadevlm.errors import BackendError, CascadeError, TransientError
from cascadevlm.judge import Judge, LocalJudge, WrapperJudge
from cascadevlm.types import Question, Verdict

T_co = TypeVar("T_co", covariant=True)

ASK_AGAIN_SECONDS = 1.0
"""How often a worker that was lost is asked whether it is back."""


class _Remote(Protocol[T_co]):
    """A method of a worker."""

    def remote(self, *arguments: object) -> Awaitable[T_co]: ...


class Worker(Protocol):
    """A `JudgingWorker`, seen from here."""

    @property
    def identity(self) -> _Remote[Mapping[str, JsonValue] | CascadeError]: ...
    @property
    def judge(self) -> _Remote[Verdict | CascadeError]: ...


class RemoteJudge(WrapperJudge):
    """Puts every question to one of several workers, each of which has at most as many in hand as the judge takes at once.

    A worker that is lost gets no question until it is back; what it was asked fails, and may have been billed.

    Args:
        wrapped: the judge as it is built in this process; knows prices and limits, and is never asked.
        workers: how many there are. Local judges take so many times more questions at once; other judges' limits hold for all
            workers together.
        begin: makes a worker.
        end: ends one.
    """

    def __init__(self, wrapped: Judge, workers: int, begin: Callable[[], Worker], end: Callable[[Worker], None]) -> None:
        super().__init__(wrapped)
        if isinstance(wrapped, LocalJudge):
            self.concurrency = wrapped.concurrency * workers
        self._number = workers
        self._begin = begin
        self._end = end
        self._workers: list[Worker] = []
        self._lost: set[asyncio.Task[None]] = set()
        self._told: Mapping[str, JsonValue] | None = None

    def identity(self) -> Mapping[str, JsonValue]:
        return self._told or self.wrapped.identity()

    async def prepare(self) -> None:
        """Raises BackendError, too, if hosted judges are not the same ones in the workers: their prices are those known here."""
        self.costs_money  # noqa: B018  # raises where the price is unknown
        self._workers = [self._begin() for _ in range(self._number)]
        for told in await asyncio.gather(*(worker.identity.remote() for worker in self._workers)):
            if isinstance(told, CascadeError):
                raise told
            if not isinstance(self.wrapped, LocalJudge) and told != self.wrapped.identity():
                raise BackendError(
                    f"In a worker, {self.spec!r} is {dict(told)}, and here {dict(self.wrapped.identity())}.",
                    hint="Set the same environment variables on every machine.",
                )
            self._told = told
        self._places: asyncio.Queue[Worker] = asyncio.Queue()
        for _ in range(self.wrapped.concurrency):
            for worker in self._workers:
                self._places.put_nowait(worker)

    async def aclose(self) -> None:
        for task in self._lost:
            task.cancel()
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    async def judge(self, question: Question) -> Verdict:
        from ray.exceptions import RayError, RayTaskError

        worker = await self._places.get()
        try:
            said = await worker.judge.remote(_packed(question))
        except RayTaskError:
            raise
        except RayError as exc:
            task = asyncio.create_task(self._await(worker))
            self._lost.add(task)
            task.add_done_callback(self._lost.discard)
            raise TransientError(f"The worker in which {self.spec!r} was asked is lost.", may_be_billed=True) from exc
        self._places.put_nowait(worker)
        if isinstance(said, CascadeError):
            raise said
        return said

    async def _await(self, worker: Worker) -> None:
        """Give a worker its place again once it is back."""
        from ray.exceptions import RayError

        while True:
            with suppress(RayError):
                if not isinstance(await worker.identity.remote(), CascadeError):
                    self._places.put_nowait(worker)
                return
            await asyncio.sleep(ASK_AGAIN_SECONDS)


def _packed(question: Question) -> Question:
    """Without the pixels of images that the judge has encoded, which is then all it sends of them."""
    exemplars = tuple(replace(each, image=_nothing()) if each.encoded else each for each in question.exemplars)
    return replace(question, image=_nothing() if question.encoded else question.image, exemplars=exemplars)


def _nothing() -> Image.Image:
    """In place of an image, and unlike any other: questions tell their images apart by identity."""
    return Image.new("RGB", (1, 1))
