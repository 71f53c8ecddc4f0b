"""Rules for every connection to a provider: redirects are not followed, and the size of responses and the time to connect are
limited."""

import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cascadevlm.base.errors import FatalError, TransientError

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = {"POST": 32 << 20, "GET": 1 << 30}
"""Maximum number of bytes of a decompressed response, by the method of the request. An answer has a few thousand bytes. The
results of a batch may be large.
"""

ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

CONNECT_SECONDS = 10.0
"""Maximum time to connect, in seconds."""


def time_limits(seconds: float | None) -> "httpx2.Timeout":
    """The time limits of a request that may take this number of seconds in total.

    The time to connect is limited to half of the total. So a missing server is noticed before the total time is over, and it is
    certain that the request was not sent.
    """
    import httpx2

    return httpx2.Timeout(seconds, connect=CONNECT_SECONDS if seconds is None else min(CONNECT_SECONDS, seconds / 2))


def guard(client: "httpx2.AsyncClient") -> None:
    """Make a client refuse redirects and responses above `MOST_BYTES`. A redirect would send headers and images elsewhere."""
    client.headers["accept-encoding"] = "gzip"  # servers disagree on the format of deflate
    hooks = client.event_hooks
    if _check not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [_check, *hooks["response"]]}


async def _check(response: "httpx2.Response") -> None:
    """Check a response. httpx calls this hook before it reads the body."""
    import httpx2

    host = response.request.url.host
    if response.has_redirect_location:
        elsewhere = response.request.url.join(response.headers["location"]).host
        raise FatalError(
            f"The server {host!r} redirects to {elsewhere!r}, and redirects are not followed.",
            hint="Give the final address as base_url.",
        )
    encoding = response.headers.pop("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *ENCODINGS):
        raise TransientError(f"The server {host!r} answers in the encoding {encoding!r}, not in gzip.", may_be_billed=True)

    stream = response.stream
    assert isinstance(stream, httpx2.AsyncByteStream)
    response.stream = _bounded(stream, encoding, MOST_BYTES.get(response.request.method, 0), host)


def _bounded(stream: "httpx2.AsyncByteStream", encoding: str, left: int, host: str) -> "httpx2.AsyncByteStream":
    """The decompressed stream. It raises TransientError after ``left`` bytes."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            room = left
            unzip = zlib.decompressobj(ENCODINGS[encoding]) if encoding in ENCODINGS else None
            async for chunk in stream:
                try:
                    data = unzip.decompress(chunk, room + 1) if unzip else chunk
                except zlib.error as exc:
                    message = f"The response of the server {host!r} is not in its declared encoding {encoding!r}."
                    raise TransientError(message, may_be_billed=True) from exc
                room -= len(data)
                if room < 0:
                    raise TransientError(f"The response of the server {host!r} is longer than {left} bytes.", may_be_billed=True)
                yield data

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
