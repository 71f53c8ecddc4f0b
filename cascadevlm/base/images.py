"""Reads images: every `ImageSource` becomes an upright RGB ``PIL.Image.Image``."""

import hashlib
import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cascadevlm.base.errors import BackendError, ImageError
from cascadevlm.base.remote import Downloaded, download, is_address, name_of

T = TypeVar("T")

ImageSource: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""An image: a path, an address such as ``https://…`` or ``s3://…``, the bytes of a file, a PIL image, or an array."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".jp2"}
    | {".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".pcx", ".sgi", ".tga"}
)
"""Suffixes of the image files that are read from folders."""

OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ico", ".icns", ".eps", ".dds", ".exr", ".hdr", ".pfm"}
    | {".wmf", ".emf", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf"}
)
"""Suffixes of image files that are not read."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "TGA")
"""The formats that are opened, by Pillow's names. Pillow's other decoders run programs (EPS), or read formats that no camera
writes. TGA is last, because TGA files have no signature."""

CHANNELS = (3, 4)
"""Numbers of channels that an array of an image in colour may have, as its last dimension."""

MAX_PIXELS = 178_956_970
"""Maximum number of pixels of an image. Pillow refuses a larger image as a decompression bomb: its limit is twice its
``MAX_IMAGE_PIXELS``. We use the same limit, and do not depend on Pillow's settings."""

MOST_STRETCHED = 2_000
"""Maximum ratio of the long side to the short side. A scorer that resizes the short side to 224 pixels would make 100 million
pixels of an image with this ratio."""

PIXELS_AT_ONCE = 150_000_000
"""Maximum number of pixels that all threads together decode at the same time: 1.8 GB, at 12 bytes per pixel (read, turned and
converted). A larger image is decoded only while no other image is decoded."""

HUGE_PIXELS = 25_000_000
"""After the first image with more pixels than this, Pillow allocates blocks of `HUGE_BLOCK` bytes. The C library returns large
blocks to the system when they are freed. It keeps smaller blocks per thread, so every thread would keep the memory of a huge
image."""

HUGE_BLOCK = 1 << 26

MAX_BYTES = 1 << 31
"""Maximum size, in bytes, of a file that is read."""

LARGE_PIXELS = 1_000_000
"""Above this number of pixels, an image is resized and encoded in another thread, and is read again later instead of kept."""

ORIENTATION = 0x0112
"""The tag of EXIF and TIFF that contains the orientation of an image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DEPTHS = (8, 12, 16, 31)
"""Numbers of bits that the values of a grey image may have if the image has more than 8 bits per pixel."""

_OPENING = threading.Lock()


class _Room:
    """A number of pixels that threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until this number of pixels is free, then reserve it in the block. A number above the maximum waits until all
        pixels are free.
        """
        with self._turn, self._changed:  # a thread that waits for many pixels is not overtaken by threads that need few
            self._changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.size)
            self.taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self.taken -= pixels
                self._changed.notify_all()


_ROOM = _Room(PIXELS_AT_ONCE)


def load_image(source: ImageSource) -> Image.Image:
    """Read an image: apply the EXIF orientation, put transparent images on white, and convert to RGB.

    A grey image of more than 8 bits is treated as an image of 8, 12, 16 or 31 bits: the smallest depth that can hold its largest
    value.

    Args:
        source: a path, an address, the bytes of a file, a PIL image, or a ``uint8`` array of shape ``(H, W)`` (grey),
            ``(H, W, 3)`` or ``(H, W, 4)``.

    Raises:
        ImageError: if the image is not found, cannot be decoded, is truncated, is not a regular file, or is too large.
    """
    with decoded(source) as image:
        return image


@contextmanager
def decoded(source: ImageSource) -> Iterator[Image.Image]:
    """The same as `load_image`, for code that needs more memory of the image's size.

    The pixels of the image count against `PIXELS_AT_ONCE` until the block ends. Do not read another image in the block.

    Raises:
        ImageError: in the same cases as `load_image`.
    """
    with ExitStack() as room:
        with _naming_errors(source):
            image = _decode(source, room)
        yield image


class WithoutPixels(Image.Image):
    """An RGB image that has a size and no pixels."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size  # what plug-ins of Pillow set


def size_of(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height in pixels, without reading the pixels. The orientation that EXIF names is not applied.

    Raises:
        ImageError: if the image does not exist or is not an image.
    """
    with _naming_errors(source):
        return _read(source, lambda image: image.size)


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file, on this machine or at an address.

    Raises:
        ImageError: if the file does not exist, is not a regular file, is larger than `MAX_BYTES` or cannot be read.
    """
    if is_address(path):
        return download(path)
    with _naming_errors(path):
        _require_file(path)
        return Path(path).read_bytes()


@contextmanager
def _naming_errors(source: ImageSource) -> Iterator[None]:
    """Turn every error in the block into an ImageError that names the image. Decoders raise errors of many types."""
    try:
        yield
    except (ImageError, BackendError):
        raise
    except FileNotFoundError as exc:
        raise ImageError(f"Image {str(source)!r} does not exist.", hint="Check the path.") from exc
    except UnidentifiedImageError as exc:  # its message contains an address in memory
        raise ImageError(
            f"Image {_describe(source)} is not an image, or has an unknown format.", hint="Save it as JPEG or PNG."
        ) from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"Image {_describe(source)} is too large to be decoded: {exc}.", hint="Make it smaller.") from exc
    except Exception as exc:
        reason = " ".join(str(exc).split()).removesuffix(".") or type(exc).__name__
        raise ImageError(
            f"Image {_describe(source)} cannot be decoded: {reason}.", hint="Replace the image, or save it as JPEG or PNG."
        ) from exc


def _require_file(path: str | Path) -> None:
    """Raise ValueError for a folder, for a special file (pipe, device, socket) and for a file above `MAX_BYTES`."""
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size} bytes; the maximum is {MAX_BYTES}")


def _decode(source: ImageSource, room: ExitStack) -> Image.Image:
    if isinstance(source, Image.Image):
        return _upright_rgb(source, room)
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), room)
    return _read(source, partial(_upright_rgb, room=room))


def _read(source: str | Path | bytes, use: Callable[[Image.Image], T]) -> T:
    """Apply ``use`` to an image. If this fails, try again without the metadata: bad metadata must not make an image unusable."""
    if is_address(source):
        source = download(source)
    try:
        with _open(source) as image:
            return use(image)
    except (FileNotFoundError, Image.DecompressionBombError):
        raise
    except Exception:
        bare = _without_metadata(source if isinstance(source, bytes) else read_bytes(source))
        if bare is None:
            raise
        with _open(bare) as image:
            return use(image)


def _open(source: str | Path | bytes) -> Image.Image:
    if source == b"":
        raise ImageError("There is no image: the row of the table is empty.", hint="Add the image, or remove the row.")
    if not isinstance(source, bytes):
        _require_file(source)
    with _quiet():
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow can read. AVIF depends on how Pillow was built."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no warnings about bad tags. Only one thread at a time enters, because warning filters belong to the whole process."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"its dtype is {array.dtype}, not uint8")
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in CHANNELS):
        raise ValueError(f"its shape is {array.shape}, not (H, W), (H, W, 3) or (H, W, 4)")
    return Image.fromarray(array)


def _upright_rgb(image: Image.Image, room: ExitStack) -> Image.Image:
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if long > short * MOST_STRETCHED:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels; one side may be at most {MOST_STRETCHED} times as long as the other"
        )
    room.close()  # frees the pixels of an earlier attempt
    room.enter_context(_ROOM.take(short * long))
    if short * long > HUGE_PIXELS:
        Image.core.set_block_size(HUGE_BLOCK)  # type: ignore[attr-defined]
    with _quiet() if short * long > MAX_PIXELS // 2 else nullcontext():  # Pillow warns about images of this size
        image.load()
    turn = _turn(image)
    return _flatten(image if turn is None else image.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The operation that turns an image upright; None if no orientation can be read or the image is already upright."""
    exif = image.info.get("exif")
    orientation = _orientation(exif) if isinstance(exif, bytes) else None
    if orientation is None:
        try:
            with _quiet():
                orientation = image.getexif().get(ORIENTATION)  # in XMP, or in the place that old PNG files use
        except Exception:
            return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _flatten(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        clear = image if image.mode == "RGBA" else image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(clear, mask=clear)
        return flat
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).clip(0)
        depth = next(depth for depth in _DEPTHS if int(grey.max()) < 1 << depth)
        return Image.fromarray((grey >> depth - 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _without_metadata(content: bytes) -> bytes | None:
    """A JPEG, PNG or TIFF file without metadata, except its orientation and what the pixels need; None for other files."""
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _bare_jpeg(content)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return _bare_png(content)
        return _bare_tiff(content) if content[:4] in (b"II*\0", b"MM\0*") else None
    except (IndexError, struct.error):  # the file is truncated
        return None


def _directory(tiff: bytes) -> tuple[str, int, list[bytes]]:
    """Read the first directory of a TIFF file, or of EXIF data, which have the same format.

    Returns:
        The byte order in the notation of `struct`, the offset of the directory, and its complete entries.

    Raises:
        struct.error: if the data ends before the directory.
    """
    order = "<" if tiff[:1] == b"I" else ">"
    (place,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, place)
    entries = [tiff[start : start + 12] for start in range(place + 2, place + 2 + 12 * count, 12)]
    return order, place, [entry for entry in entries if len(entry) == 12]


def _orientation(exif: bytes) -> int | None:
    """The orientation in EXIF data; None if it is missing or not valid. (Pillow itself reads nothing after a bad tag.)"""
    try:
        order, _, entries = _directory(exif[exif.rfind(b"Exif\0\0", 0, 12) + 6 :] if exif[:4] == b"Exif" else exif)
    except struct.error:
        return None
    for entry in entries:
        tag, kind, count, short = struct.unpack(f"{order}HHIH2x", entry)
        if (tag, kind, count) == (ORIENTATION, 3, 1):
            return int(short)
    return None


def _bare_exif(exif: bytes) -> bytes:
    """EXIF data that contains only the orientation."""
    bare = Image.Exif()
    bare[ORIENTATION] = _orientation(exif) or 1
    return bare.tobytes()


def _bare_jpeg(content: bytes) -> bytes:
    """A JPEG file without comments and APP segments. The Adobe segment is kept, because it defines how colours are decoded."""
    kept, place = [content[:2]], 2
    while (marker := content[place + 1]) != 0xDA:  # 0xDA: the pixel data begins
        if content[place] != 0xFF or marker == 0xFF:
            place += 1
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        segment = content[place : place + 2 + length]
        place += 2 + length
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = _bare_exif(segment[4:])
            kept.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (segment[4:9] == b"Adobe" and length >= 14):
            kept.append(segment)
    return b"".join([*kept, content[place:]])


def _bare_png(content: bytes) -> bytes:
    """A PNG file without ancillary chunks, except transparency. A truncated chunk is kept; the decoder decides about it."""
    kept, place = [content[:8]], 8
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        place += 12 + length
        if kind == b"eXIf":
            exif = kind + _bare_exif(chunk[8:-4])
            kept.append(struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif)))
        elif kind[:1].isupper() or kind == b"tRNS":
            kept.append(chunk)
        if kind == b"IEND":
            break
    return b"".join(kept)


_TIFF_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, 529, 530, 532}
)
"""Tags that are needed to decode the pixels: size, layout, compression and colours."""


def _bare_tiff(content: bytes) -> bytes:
    """The first image of a TIFF file, with only `_TIFF_TAGS` and a valid orientation."""
    order, place, entries = _directory(content)
    kept = []
    for entry in entries:
        tag, kind, count, short = struct.unpack(f"{order}HHIH2x", entry)
        if tag in _TIFF_TAGS or ((tag, kind, count) == (ORIENTATION, 3, 1) and short in _TURNS):
            kept.append(entry)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:place] + directory + content[place + len(directory) :]


def _describe(source: ImageSource) -> str:
    if isinstance(source, Downloaded):
        return repr(source.name)
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return repr(name_of(source)) if isinstance(source, str | Path) else f"({type(source).__name__})"


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def images_left_out(folder: Path) -> Counter[str]:
    """The number of files below a folder that have the suffix of an image but are not read, per suffix.

    Such a file has a format that is not read, or is a special file, such as a pipe. A link is not counted, even a broken link,
    which is reported as a missing image.
    """
    found: Counter[str] = Counter()
    for below, _, names in os.walk(folder):
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  # a folder may hold millions
            path = Path(below, name)
            if suffix in OTHER_SUFFIXES or (suffix in SUFFIXES and not (path.is_symlink() or path.is_file())):
                found[suffix] += 1
    return found


def path_of(source: ImageSource) -> str:
    """The path of an image, or its address without credentials; "" if the source is neither."""
    return name_of(source) if isinstance(source, str | Path) else ""


def is_large(image: Image.Image) -> bool:
    """Returns True if an image has more than `LARGE_PIXELS` pixels."""
    return image.width * image.height > LARGE_PIXELS


def pixel_digest(image: Image.Image) -> str:
    """The sha256 of mode, size and pixels, in hexadecimal. It does not depend on the format in which the image was stored."""
    header = f"{image.mode}:{image.width}x{image.height}:".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()
