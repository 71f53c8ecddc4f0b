"""What holds for every connection to a provider: no redirect is followed, no response is endless, no connection is waited for
for long."""

import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cascadevlm.base.errors import FatalError, TransientError

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = {"POST": 32 << 20, "GET": 1 << 30}
"""Of a response, decompressed: an answer is some thousand bytes; the results of a batch, which are fetched, may be many."""

ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

CONNECT_SECONDS = 10.0
"""How long it may take to connect."""


def time_limits(seconds: float | None) -> "httpx2.Timeout":
    """The limits of a request that may take so many seconds. A connection must be made in half of them: then it is known that a
    server which is not there was sent nothing."""
    import httpx2

    return httpx2.Timeout(seconds, connect=CONNECT_SECONDS if seconds is None else min(CONNECT_SECONDS, seconds / 2))


def guard(client: "httpx2.AsyncClient") -> None:
    """Have a client follow no redirect, which would carry headers and images elsewhere, and read no more than `MOST_BYTES`."""
    client.headers["accept-encoding"] = "gzip"  # of deflate there are two kinds
    hooks = client.event_hooks
    if _check not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [_check, *hooks["response"]]}


async def _check(response: "httpx2.Response") -> None:
    """Called with every response, before its body is read."""
    import httpx2

    host = response.request.url.host
    if response.has_redirect_location:
        elsewhere = response.request.url.join(response.headers["location"]).host
        raise FatalError(
            f"The server {host!r} redirects to {elsewhere!r}, and redirects are not followed.",
            hint="Give the address that answers itself as base_url.",
        )
    encoding = response.headers.pop("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *ENCODINGS):
        raise TransientError(f"The server {host!r} answers in the encoding {encoding!r}, not asked for.", may_be_billed=True)

    stream = response.stream
    assert isinstance(stream, httpx2.AsyncByteStream)
    response.stream = _bounded(stream, encoding, MOST_BYTES.get(response.request.method, 0), host)


def _bounded(stream: "httpx2.AsyncByteStream", encoding: str, left: int, host: str) -> "httpx2.AsyncByteStream":
    """The stream decompressed; it raises TransientError where there are more bytes than ``left``."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            room = left
            unzip = zlib.decompressobj(ENCODINGS[encoding]) if encoding in ENCODINGS else None
            async for chunk in stream:
                try:
                    data = unzip.decompress(chunk, room + 1) if unzip else chunk
                except zlib.error as exc:
                    told = f"The response of the server {host!r} is not in the encoding {encoding!r}, as it says."
                    raise TransientError(told, may_be_billed=True) from exc
                room -= len(data)
                if room < 0:
                    raise TransientError(f"The response of the server {host!r} has no end.", may_be_billed=True)
                yield data

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
