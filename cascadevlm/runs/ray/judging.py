"""Judges that answer in the workers of a cluster."""

import asyncio
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from typing import Protocol, TypeVar

from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, CascadeError, FatalError, TransientError
from cascadevlm.base.types import Exemplar, Question, Verdict
from cascadevlm.judges.base import Judge, LocalJudge, WrapperJudge, before_sending

T_co = TypeVar("T_co", covariant=True)

ASK_AGAIN_SECONDS = 1.0
"""Seconds between two attempts to reach a worker that was lost."""

SILENT_SECONDS = 120.0
"""Seconds after which a worker that is not ready causes a warning: Ray waits for lost machines without a message."""


class _Remote(Protocol[T_co]):
    """A method of a worker, as this process calls it."""

    def remote(self, *arguments: object) -> Awaitable[T_co]: ...


class Worker(Protocol):
    """A `JudgingWorker` as this process sees it."""

    @property
    def identity(self) -> _Remote[Mapping[str, JsonValue] | CascadeError]: ...
    @property
    def judge(self) -> _Remote[Verdict | CascadeError]: ...


class RemoteJudge(WrapperJudge):
    """Asks each question in one of several workers. The number of open questions of a worker is at most the concurrency of the
    judge.

    A lost worker gets no questions until it is back. If it cannot work after that, for example because a key or a model is
    missing, it gets no more questions. The open questions of a lost worker fail, and may have been billed. If no worker is
    left, every question raises a FatalError.

    Args:
        wrapped: the judge in this process. It gives prices and limits, and is never asked.
        workers: number of workers. The concurrency of a local judge is multiplied by this number. The limits of other judges
            hold for all workers together.
        begin: function that starts a worker.
        end: function that ends a worker.
    """

    def __init__(self, wrapped: Judge, workers: int, begin: Callable[[], Worker], end: Callable[[Worker], None]) -> None:
        super().__init__(wrapped)
        if isinstance(wrapped, LocalJudge):
            self.concurrency = wrapped.concurrency * workers
        self._number = workers
        self._begin = begin
        self._end = end
        self._workers: list[Worker] = []
        self._lost: Counter[Worker] = Counter()
        self._returns: set[asyncio.Task[None]] = set()
        self._told: Mapping[str, JsonValue] | None = None
        self._places: asyncio.Queue[Worker | CascadeError] = asyncio.Queue()
        self._left = 0

    def identity(self) -> Mapping[str, JsonValue]:
        return self._told or self.wrapped.identity()

    async def prepare(self) -> None:
        """Start the workers.

        Raises:
            CascadeError: if a judge cannot work in a worker.
            BackendError: if a hosted judge has another identity in a worker, because this process would then reserve wrong
                prices.
        """
        self.costs_money  # noqa: B018  # raises if the price is unknown
        self._workers = [self._begin() for _ in range(self._number)]
        with self._told_if_late():
            identities = await asyncio.gather(*map(_identity, self._workers))
        for told in identities:
            if isinstance(told, CascadeError):
                raise told
            if not isinstance(self.wrapped, LocalJudge) and told != self.wrapped.identity():
                raise BackendError(
                    f"In a worker, {self.spec!r} is {dict(told)}; in this process, it is {dict(self.wrapped.identity())}.",
                    hint="Set the same environment variables on every machine.",
                )
            self._told = told
        self._places = asyncio.Queue()
        for _ in range(self.wrapped.concurrency):
            for worker in self._workers:
                self._places.put_nowait(worker)
        self._left = self._places.qsize()

    async def aclose(self) -> None:
        for task in self._returns:
            task.cancel()
        for worker in self._workers:
            self._end(worker)
        self._workers = []
        self._lost.clear()

    async def judge(self, question: Question) -> Verdict:
        from ray.exceptions import RayError, RayTaskError

        with before_sending():
            worker = await self._places.get()
        if isinstance(worker, CascadeError):
            self._places.put_nowait(worker)  # for the next question
            raise FatalError(
                f"No worker with the judge {self.spec!r} is left: {worker}",
                hint="Solve this problem, then repeat the same command.",
            ) from worker
        lost = False
        try:
            said = await worker.judge.remote(_packed(question))
        except RayTaskError:
            raise
        except RayError as exc:
            lost = True
            self._lose(worker)
            raise TransientError(f"The worker with the judge {self.spec!r} was lost.", may_be_billed=True) from exc
        finally:
            if not lost:
                self._places.put_nowait(worker)
        if isinstance(said, CascadeError):
            raise said
        return said

    def _lose(self, worker: Worker) -> None:
        """Remove one place of a worker until the worker is back."""
        self._lost[worker] += 1
        if self._lost[worker] == 1:
            task = asyncio.create_task(self._await(worker))
            self._returns.add(task)
            task.add_done_callback(self._returns.discard)

    async def _await(self, worker: Worker) -> None:
        """Return the places of a worker when it is back and can work."""
        from ray.exceptions import RayError

        with self._told_if_late():
            while True:
                with suppress(RayError):
                    told = await _identity(worker)
                    break
                await asyncio.sleep(ASK_AGAIN_SECONDS)
        places = self._lost.pop(worker)
        if not isinstance(told, CascadeError):
            for _ in range(places):
                self._places.put_nowait(worker)
            return
        warnings.warn(
            f"A worker that was lost is back, but {self.spec!r} cannot be asked in it: {told}", RuntimeWarning, stacklevel=2
        )
        self._left -= places
        if not self._left:
            self._places.put_nowait(told)

    @contextmanager
    def _told_if_late(self) -> Iterator[None]:
        """Warn if workers are not ready in time."""
        late = (
            f"A worker in which {self.spec!r} is asked has not been ready since {datetime.now():%H:%M:%S}: "
            "it is still loading its model, it is lost, or the cluster has no room for it. 'ray status' shows more."
        )
        telling = asyncio.get_running_loop().call_later(SILENT_SECONDS, warnings.warn, late, RuntimeWarning)
        try:
            yield
        finally:
            telling.cancel()


async def _identity(worker: Worker) -> Mapping[str, JsonValue] | CascadeError:
    """The identity of the judge in a worker, or the reason why the judge cannot work.

    Raises:
        ray.exceptions.RayError: if the worker is lost.
    """
    from ray.exceptions import RayTaskError

    try:
        return await worker.identity.remote()
    except RayTaskError as exc:
        return BackendError(
            f"A judge cannot be made ready in a worker: {str(exc.cause).strip()}.",
            hint="Solve this problem on the machine of the worker, then repeat the same command.",
        )


def _packed(question: Question) -> Question:
    """A copy of the question, without the pixels of images that the judge has already encoded.

    Each of these images is replaced by a separate image of one pixel, because `HostedJudge.sent` distinguishes the images of a
    question by the identity of the objects.
    """

    def without_pixels(shown: Question | Exemplar) -> Image.Image:
        return Image.new("RGB", (1, 1)) if shown.encoded else shown.image

    exemplars = tuple(replace(each, image=without_pixels(each)) for each in question.exemplars)
    return replace(question, image=without_pixels(question), exemplars=exemplars)
