"""The one event loop behind the synchronous API, in a thread of its own: a caller's running loop (a notebook's) is no matter."""

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
"""Held while the loop is started: threads that come at once share one."""


@cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="cascadevlm", daemon=True).start()
    return loop


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started()


def _forked() -> None:
    """A forked child has no thread for the loop."""
    _started.cache_clear()
    _starting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_forked)


def _inside() -> bool:
    """Whether this is the loop's own thread: whoever waits there for the loop waits for ever."""
    try:
        return asyncio.get_running_loop() is _loop()
    except RuntimeError:
        return False


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run to its end and return the result; an interrupt cancels it.

    Raises:
        InputError: if called by what itself runs in the loop.
    """
    if _inside():
        coroutine.close()
        raise InputError(
            "What a cascade calls in its event loop, such as a policy, cannot wait for a cascade.",
            hint="Classify before, or use aclassify() where you can await it.",
        )
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class PerLoop(Portable, Generic[T]):
    """A value for every event loop: what waits in one could not be woken from another."""

    live: ClassVar[Live] = (("_values", dict),)

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The value of the event loop that is running, made at the first call."""
        for loop in list(self._values):
            if loop.is_closed():
                self._values.pop(loop, None)
        loop = asyncio.get_running_loop()
        if loop not in self._values:
            self._values[loop] = self.make()
        return self._values[loop]

    def pop(self) -> T | None:
        """The value of the event loop that is running, if there is one; it is then forgotten."""
        return self._values.pop(asyncio.get_running_loop(), None)


_END = object()

_open: set[AsyncIterator[object]] = set()
"""What `iterate` goes through: of a source that nobody else holds, the garbage collector would close the inner parts first."""


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """The same items, one at a time; leaving early closes the source."""

    async def following() -> T | object:
        return await anext(items, _END)

    async def close() -> None:
        _open.discard(items)
        if hasattr(items, "aclose"):
            await items.aclose()

    _open.add(items)
    try:
        while (item := run(following())) is not _END:
            yield item  # type: ignore[misc]  # only the sentinel is no T
    finally:
        if _inside():  # whoever left it early did not close it, and the garbage collector runs in any thread
            asyncio.run_coroutine_threadsafe(close(), _loop())
        else:
            run(close())
