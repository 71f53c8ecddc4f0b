"""Reads images and tables at addresses: ``https://``, and the file systems of fsspec, such as ``s3://``, ``gs://`` and ``hf://``.

A download is limited in size and in total time, and is tried again after a temporary error. A redirect to another server is not
followed, because the address may contain credentials.
"""

import io
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias, TypeGuard, TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.errors import BackendError, CascadeError, ImageError
from cascadevlm.base.secrets import credentials_of, scrubbed, shown_address

if TYPE_CHECKING:
    import httpx2
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

T = TypeVar("T")

Place: TypeAlias = Path | str
"""A path on this machine, or an address, which is always a text."""

MAX_DOWNLOAD = 100 << 20
"""Maximum number of bytes of a downloaded image."""

DOWNLOAD_SECONDS = 60.0
"""Maximum time for an image, in seconds, with all attempts."""

ATTEMPTS = 4
"""Maximum number of attempts to download an image."""

WAIT = wait_random_exponential(multiplier=0.5, max=10)
"""The time between two attempts."""

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0
"""Maximum time without a byte from the server, in seconds."""

MOST_REDIRECTS = 5

AT_ONCE = 32
"""Maximum number of downloads at the same time."""

PART_BYTES = 1 << 20

INSTALL = "Install it: pip install 'cascadevlm[remote]'"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HTTP = ("http", "https")
_ON_THIS_MACHINE = ("file", "local", "memory")
_WITH_FOLDERS = ("s3", "gs", "hf", "memory", "file")
"""Schemes of file systems whose names of files are whole addresses: without a server and without a login."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Downloaded(bytes):
    """The bytes of a downloaded image.

    Attributes:
        name: the address without credentials, for messages.
    """

    name: str = ""


class _Temporary(Exception):
    """A download failed, but may succeed later."""


def is_address(source: object) -> TypeGuard[str]:
    """Returns True for a text with a scheme, such as ``https://host/a.jpg`` or ``s3://bucket/a.jpg``."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def place_of(text: str | Path) -> Place:
    """An address unchanged, and every other text as a path."""
    return text if is_address(text) else Path(text)


def inside(folder: Place, name: str) -> Place:
    """The place of a name, which is an address, or a path that is absolute or relative to a folder."""
    if is_address(name):
        return name
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def name_of(place: Place) -> str:
    """The text that stands for a place in results and messages. It contains no credentials."""
    return shown_address(place) if is_address(place) else str(place)


def suffix_of(place: Place) -> str:
    """The suffix in lower case, such as ``.csv``."""
    return Path(urlsplit(place).path if isinstance(place, str) else place).suffix.lower()


def fetching(sources: Sequence[T]) -> list[Callable[[], T | Downloaded]]:
    """A function per source that returns the source. If the source is an address, its download begins now, in another thread.

    The functions raise the errors of `download`.
    """
    return [
        _downloads().submit(download, source).result if is_address(source) else partial(_itself, source) for source in sources
    ]


def _itself(source: T) -> T:
    return source


@cache
def _downloads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "downloading")


def download(address: str) -> Downloaded:
    """The content of an image at an address.

    Raises:
        ImageError: if there is no such image, the image is too large, the server redirects to another server, or all attempts
            fail.
        BackendError: if a package is missing, or if ``$CASCADEVLM_LOCAL_ONLY`` is set and the address is on another machine.
    """
    require_allowed(address)
    shown, ends_at = shown_address(address), time.monotonic() + DOWNLOAD_SECONDS
    read = _http_parts if scheme_of(address) in _HTTP else _file_parts
    attempts = Retrying(
        retry=retry_if_exception_type(_Temporary),
        stop=lambda state: state.attempt_number >= ATTEMPTS or time.monotonic() + state.upcoming_sleep >= ends_at,
        wait=WAIT,
        reraise=True,
    )
    try:
        content = Downloaded(attempts(_joined, read, address, ends_at))
    except FileNotFoundError as exc:
        raise ImageError(f"Image {shown!r} does not exist.", hint="Check the address.") from exc
    except (_Temporary, OSError, ValueError) as exc:
        raise ImageError(f"Image {shown!r} cannot be downloaded: {exc}.", hint="Check the address, or try again later.") from exc
    content.name = shown
    return content


def _joined(read: Callable[[str], Generator[bytes, None, None]], address: str, ends_at: float) -> bytes:
    """All parts of a content, within `MAX_DOWNLOAD` and the time."""
    content = bytearray()
    with closing(read(address)) as parts:
        for part in parts:
            content += part
            if len(content) > MAX_DOWNLOAD:
                raise ValueError(f"it is larger than {MAX_DOWNLOAD >> 20} MB")
            if time.monotonic() > ends_at:
                raise ValueError(f"it takes longer than {DOWNLOAD_SECONDS:.0f} seconds")
    return bytes(content)


@cache
def _client() -> "httpx2.Client":
    import httpx2

    return httpx2.Client(
        headers={"user-agent": "cascadevlm", "accept-encoding": "identity"},
        timeout=httpx2.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE),
    )


def _http_parts(address: str) -> Generator[bytes, None, None]:
    import httpx2

    try:
        url = httpx2.URL(address)
        for _ in range(MOST_REDIRECTS + 1):
            with _client().stream("GET", url) as response:
                if not response.has_redirect_location:
                    yield from _body(response)
                    return
                url = _redirected(url, url.join(response.headers["location"]))
        raise ValueError(f"the server redirects more than {MOST_REDIRECTS} times")
    except httpx2.InvalidURL as exc:
        raise ValueError("the address is not valid") from exc
    except httpx2.TimeoutException as exc:
        raise _Temporary("the server does not answer in time") from exc
    except httpx2.HTTPError as exc:
        raise _Temporary(f"the connection fails ({type(exc).__name__})") from exc


def _body(response: "httpx2.Response") -> Iterator[bytes]:
    status = response.status_code
    if status in (404, 410):
        raise FileNotFoundError
    if status == 429 or status >= 500:
        raise _Temporary(f"the server answers with status {status}")
    if status != 200:
        raise ValueError(f"the server answers with status {status}")
    return response.iter_bytes()


def _redirected(url: "httpx2.URL", target: "httpx2.URL") -> "httpx2.URL":
    """The target of a redirect, on the same server.

    Raises:
        ValueError: if the target is on another server, or is less secure.
    """
    upgrade = (url.scheme, target.scheme) == ("http", "https") and url.port == target.port is None
    if target.host != url.host or ((target.scheme, target.port) != (url.scheme, url.port) and not upgrade):
        raise ValueError(f"the server redirects to another server, {target.scheme}://{target.netloc.decode()}")
    return target


def _file_parts(address: str) -> Generator[bytes, None, None]:
    system, path = file_system(address)
    try:
        with system.open(path, "rb") as file:
            while part := file.read(PART_BYTES):
                yield part
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except OSError as exc:
        raise _Temporary(_reason(exc, address)) from exc
    except Exception as exc:  # every file system has its own errors
        raise ValueError(_reason(exc, address)) from exc


def _reason(exc: Exception, address: str) -> str:
    """The first line of an error, without the credentials of the address."""
    said = f"{type(exc).__name__}: {exc}".partition("\n")[0].rstrip(".:")
    return scrubbed(said, credentials_of(address))


@contextmanager
def _asking(address: str) -> Iterator[None]:
    """Turn every error of a file system in the block into an OSError that contains no credentials."""
    try:
        yield
    except (CascadeError, FileNotFoundError, PermissionError):
        raise
    except Exception as exc:  # every file system has its own errors
        raise OSError(_reason(exc, address)) from exc


def scheme_of(address: str) -> str:
    """The scheme of an address in lower case."""
    found = _SCHEME.match(address)
    assert found is not None
    return found[1].lower()


def require_allowed(address: str) -> None:
    """Refuse an address on another machine if only this machine is allowed.

    Raises:
        BackendError: if ``$CASCADEVLM_LOCAL_ONLY`` is set and the address is not on this machine.
    """
    scheme = scheme_of(address)
    here = scheme in _ON_THIS_MACHINE or (scheme in _HTTP and urlsplit(address).hostname in _LOOPBACK)
    if os.environ.get(LOCAL_ONLY) and not here:
        raise BackendError(
            f"{shown_address(address)!r} is not on this machine, and {LOCAL_ONLY} is set.",
            hint=f"Unset {LOCAL_ONLY}, or use files on this machine.",
        )


def file_system(address: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of an address, and the path in the file system.

    Raises:
        BackendError: if a package is missing, the scheme is unknown, or the address is not allowed or contains another address.
        OSError: if the file system cannot be used.
    """
    from fsspec.core import url_to_fs

    require_allowed(address)
    scheme = scheme_of(address)
    if scheme in _HTTP:
        raise BackendError(
            f"{shown_address(address)!r} is not an image, and only images are read over https.", hint="Download it."
        )
    if "::" in address:  # fsspec would read the second address, and none of the rules for addresses would hold for it
        raise BackendError(
            f"{shown_address(address.partition('::')[0])!r} is followed by '::' and another address, which is not read.",
            hint="Download the archive, and unpack it.",
        )
    try:
        system, path = url_to_fs(address)
    except ImportError as exc:
        raise BackendError(f"{scheme}:// needs a package that is not installed: {exc}.", hint=INSTALL) from exc
    except ValueError as exc:
        raise BackendError(
            f"Addresses with {scheme}:// cannot be read: {_reason(exc, address)}.", hint="Use https://, s3://, gs:// or hf://."
        ) from exc
    except Exception as exc:  # every file system has its own errors
        raise OSError(_reason(exc, address)) from exc
    return system, str(path)


def opened(place: Place) -> IO[bytes]:
    """A file, opened for reading. Raises: OSError: if it cannot be read."""
    if isinstance(place, Path):
        return place.open("rb")
    system, path = file_system(place)
    with _asking(place):
        return io.BufferedReader(_RemoteFile(system.open(path, "rb"), place))


class _RemoteFile(io.RawIOBase):
    """A file of a file system, whose errors in the middle of the file are OSErrors without credentials, too."""

    def __init__(self, file: IO[bytes], address: str) -> None:
        self._file, self._address = file, address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        view = memoryview(buffer)
        with _asking(self._address):
            part = self._file.read(len(view))
        view[: len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with _asking(self._address):
            return self._file.seek(offset, whence)

    def close(self) -> None:
        self._file.close()
        super().close()


def is_folder(address: str) -> bool:
    """Returns True if there is a folder at an address. Raises: OSError: if the file system gives no answer."""
    system, path = file_system(address)
    with _asking(address):
        return bool(system.isdir(path))


def files_below(address: str) -> list[str]:
    """The addresses of all files below a folder, sorted.

    Raises:
        BackendError: if the names of files are not whole addresses in this file system.
        OSError: if the folder cannot be read.
    """
    system, path = file_system(address)
    if scheme_of(address) not in _WITH_FOLDERS:
        known = ", ".join(f"{scheme}://" for scheme in _WITH_FOLDERS)
        raise BackendError(
            f"The folder {shown_address(address)!r} is not read: folders are only read at {known}.",
            hint="Give a list with the addresses of the images.",
        )
    with _asking(address):
        return sorted(str(system.unstrip_protocol(each)) for each in system.find(path))
