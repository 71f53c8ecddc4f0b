"""The event loop of the synchronous API. It has its own thread, so the API also works where a loop already runs (a notebook)."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import cache
from typing import ClassVar, Generic, TypeVar

from cascadevlm.base.errors import InputError
from cascadevlm.base.portable import Live, Portable

T = TypeVar("T")


_starting = threading.Lock()
"""Held while the loop starts, so that threads that call at the same time share one loop."""


@cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="cascadevlm", daemon=True).start()
    return loop


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started()


def _forked() -> None:
    """Forget the loop in a forked child process: its thread does not exist there."""
    _started.cache_clear()
    _starting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_forked)


def _inside() -> bool:
    """True in the thread of the loop. Code in this thread must not wait for the loop, because it would wait forever."""
    try:
        return asyncio.get_running_loop() is _loop()
    except RuntimeError:
        return False


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine to its end and return its result. An interrupt cancels the coroutine.

    Raises:
        InputError: if the calling code itself runs in the loop.
    """
    if _inside():
        coroutine.close()
        raise InputError(
            "Code that a cascade calls in its event loop, such as a policy, cannot wait for a cascade.",
            hint="Classify the images before this call, or await aclassify().",
        )
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class PerLoop(Portable, Generic[T]):
    """One value per event loop, because one loop cannot wake a task that waits in another loop."""

    live: ClassVar[Live] = (("_values", dict),)

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The value of the running event loop. The first call in a loop makes the value."""
        for loop in list(self._values):
            if loop.is_closed():
                self._values.pop(loop, None)
        loop = asyncio.get_running_loop()
        if loop not in self._values:
            self._values[loop] = self.make()
        return self._values[loop]

    def pop(self) -> T | None:
        """Remove and return the value of the running event loop; None if the loop has no value."""
        return self._values.pop(asyncio.get_running_loop(), None)


_END = object()

_open: set[AsyncIterator[object]] = set()
"""The sources that `iterate` reads. Without this set, the garbage collector would close the inner parts of a source first."""


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """Yield the same items, one at a time. The source is also closed if the caller stops early."""

    async def following() -> T | object:
        return await anext(items, _END)

    async def close() -> None:
        _open.discard(items)
        if hasattr(items, "aclose"):
            await items.aclose()

    _open.add(items)
    try:
        while (item := run(following())) is not _END:
            yield item  # type: ignore[misc]  # only the sentinel is not of type T
    finally:
        if _inside():  # the caller stopped early, and the garbage collector closes this generator in any thread
            asyncio.run_coroutine_threadsafe(close(), _loop())
        else:
            run(close())
