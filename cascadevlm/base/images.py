"""Reading images: anything a caller may hold becomes an upright RGB ``PIL.Image.Image``."""

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

from cascadevlm.base.errors import ImageError
from cascadevlm.base.files import valid_text

T = TypeVar("T")

ImageSource: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".jp2"}
    | {".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".pcx", ".sgi", ".tga"}
)
"""What the names of the files end in that are taken from folders."""

OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ico", ".icns", ".eps", ".dds", ".exr", ".hdr", ".pfm"}
    | {".wmf", ".emf", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf"}
)
"""Those of images that are not read."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "TGA")
"""The formats that are opened, by Pillow's names. Pillow's other decoders run programs (EPS), or are for what no camera writes.
TGA is last: its files have no signature."""

CHANNELS = (3, 4)
"""Numbers of channels that an array of an image in colour may have, as its last dimension."""

MAX_PIXELS = 178_956_970
"""The size above which Pillow refuses an image as a decompression bomb: twice its ``MAX_IMAGE_PIXELS``; we refuse at the
same size, whatever its warning filters."""

MOST_STRETCHED = 2_000
"""The most that one side may be longer than the other: a scorer that brings the short side to 224 pixels would make 100 million
of such an image."""

PIXELS_AT_ONCE = 150_000_000
"""The most pixels that all threads together decode at once: 1.8 GB, at 12 bytes a pixel (read, turned and converted). An image
that is larger is decoded while no other one is."""

HUGE_PIXELS = 25_000_000
"""From the first image on that is larger, Pillow asks for blocks of `HUGE_BLOCK` bytes. The C library gives these back when they
are freed; smaller ones it keeps for the thread that freed them, and every thread would keep the memory of a huge image."""

HUGE_BLOCK = 1 << 26

MAX_BYTES = 1 << 31
"""The size above which a file is not read."""

LARGE_PIXELS = 1_000_000
"""From this size on, shrinking and encoding an image takes longer than a thread is worth, and many of them fill the memory."""

ORIENTATION = 0x0112
"""The tag of EXIF and TIFF that says how an image is turned."""

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
"""How many bits the numbers of a grey image of more than 8 bits may have."""

_OPENING = threading.Lock()


class _Room:
    """Room for so many pixels, which threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait for room, and hold it. What is larger than all of it waits until nobody else holds any."""
        with self._turn, self._changed:  # whoever waits for much room is not overtaken by those who want little
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
    """Read an image: EXIF orientation applied, transparency flattened onto white, converted to RGB.

    Grey images of more than 8 bits are taken to have 8, 12, 16 or 31: the fewest that hold their largest number.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array of H x W (grey), H x W x 3 or H x W x 4 uint8.

    Raises:
        ImageError: if it cannot be found or decoded, is truncated, is no regular file, or is a decompression bomb.
    """
    with decoded(source) as image:
        return image


@contextmanager
def decoded(source: ImageSource) -> Iterator[Image.Image]:
    """`load_image`, for who needs memory of the image's size: until the block ends, other threads decode only as much as
    `PIXELS_AT_ONCE` leaves. Do not read another image in the block.

    Raises:
        ImageError: as `load_image` does.
    """
    with ExitStack() as room:
        with _told(source):
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
        ImageError: if the image does not exist or is no image.
    """
    with _told(source):
        return _read(source, lambda image: image.size)


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file.

    Raises:
        ImageError: if it does not exist, is no regular file, is larger than `MAX_BYTES` or cannot be read.
    """
    with _told(path):
        _require_file(path)
        return Path(path).read_bytes()


@contextmanager
def _told(source: ImageSource) -> Iterator[None]:
    """One of our errors, that names the image, for all that reading one raises: decoders raise errors of every kind."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as exc:
        raise ImageError(f"Image {str(source)!r} does not exist.") from exc
    except UnidentifiedImageError as exc:  # whose message holds an address in memory
        raise ImageError(f"Image {_describe(source)} is no image, or of an unknown format.") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"Image {_describe(source)} is too large to be decoded: {exc}.", hint="Shrink it first.") from exc
    except Exception as exc:
        reason = " ".join(str(exc).split()).removesuffix(".") or type(exc).__name__
        raise ImageError(f"Image {_describe(source)} cannot be decoded: {reason}.") from exc


def _require_file(path: str | Path) -> None:
    """Raises ValueError for what may be read without end (pipes, devices, sockets) and for what is too large."""
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size} bytes; the most is {MAX_BYTES}")


def _decode(source: ImageSource, room: ExitStack) -> Image.Image:
    if isinstance(source, Image.Image):
        return _upright_rgb(source, room)
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), room)
    return _read(source, partial(_upright_rgb, room=room))


def _read(source: str | Path | bytes, use: Callable[[Image.Image], T]) -> T:
    """What is made of an image or, if that fails, of its pixels alone: bad metadata is no reason to refuse them."""
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
    if not isinstance(source, bytes):
        _require_file(source)
    with _quiet():
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can read: AVIF depends on how it was built."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of bad tags; one thread at a time, as warning filters belong to the process, not to a thread."""
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
        raise ValueError(f"it has {image.width} x {image.height} pixels; one side may be {MOST_STRETCHED} times the other")
    room.close()  # of an attempt before
    room.enter_context(_ROOM.take(short * long))
    if short * long > HUGE_PIXELS:
        Image.core.set_block_size(HUGE_BLOCK)  # type: ignore[attr-defined]
    with _quiet() if short * long > MAX_PIXELS // 2 else nullcontext():  # Pillow warns of these
        image.load()
    turn = _turn(image)
    return _flatten(image if turn is None else image.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; nothing, where no orientation can be read."""
    exif = image.info.get("exif")
    orientation = _orientation(exif) if isinstance(exif, bytes) else None
    if orientation is None:
        try:
            with _quiet():
                orientation = image.getexif().get(ORIENTATION)  # in XMP, or where old PNG files have it
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
    """A JPEG, PNG or TIFF file with what the pixels need and, of the rest, the orientation alone; None of other files."""
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _bare_jpeg(content)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return _bare_png(content)
        return _bare_tiff(content) if content[:4] in (b"II*\0", b"MM\0*") else None
    except (IndexError, struct.error):  # it ends too soon
        return None


def _directory(tiff: bytes) -> tuple[str, int, list[bytes]]:
    """Of a TIFF file, which EXIF is too: its byte order, as `struct` has it, and the place and the entries of its first
    directory, as far as they are there.

    Raises:
        struct.error: if it ends before.
    """
    order = "<" if tiff[:1] == b"I" else ">"
    (place,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, place)
    entries = [tiff[start : start + 12] for start in range(place + 2, place + 2 + 12 * count, 12)]
    return order, place, [entry for entry in entries if len(entry) == 12]


def _orientation(exif: bytes) -> int | None:
    """Read here, since Pillow reads nothing after a bad tag."""
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
    """EXIF of nothing but the orientation."""
    bare = Image.Exif()
    bare[ORIENTATION] = _orientation(exif) or 1
    return bare.tobytes()


def _bare_jpeg(content: bytes) -> bytes:
    """Without APP segments, but for Adobe's, which says how colours are to be read, and without comments."""
    kept, place = [content[:2]], 2
    while (marker := content[place + 1]) != 0xDA:  # the scan begins
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
    """Without ancillary chunks, but for transparency; what is cut off is left to the decoder."""
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
"""What pixels need: size, layout, compression and colours."""


def _bare_tiff(content: bytes) -> bytes:
    """Its first image with `_TIFF_TAGS` alone, and the orientation, if it is one."""
    order, place, entries = _directory(content)
    kept = []
    for entry in entries:
        tag, kind, count, short = struct.unpack(f"{order}HHIH2x", entry)
        if tag in _TIFF_TAGS or ((tag, kind, count) == (ORIENTATION, 3, 1) and short in _TURNS):
            kept.append(entry)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:place] + directory + content[place + len(directory) :]


def _describe(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return repr(str(source)) if isinstance(source, str | Path) else f"({type(source).__name__})"


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def images_left_out(folder: Path) -> Counter[str]:
    """How many files below a folder look like images and are not read, by suffix: they are of other formats, or are pipes and the
    like. A link is read wherever it leads to: to nothing, it is an image that is missing."""
    found: Counter[str] = Counter()
    for below, _, names in os.walk(folder):
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  # a folder may hold millions
            path = Path(below, name)
            if suffix in OTHER_SUFFIXES or (suffix in SUFFIXES and not (path.is_symlink() or path.is_file())):
                found[suffix] += 1
    return found


def file_name(path: Path) -> str:
    """The path as text that any file can hold."""
    return valid_text(str(path))


def path_of(source: ImageSource) -> str:
    """The path of an image, or "" where it is none."""
    return str(source) if isinstance(source, str | Path) else ""


def is_large(image: Image.Image) -> bool:
    """Whether work on it is better done beside the event loop, and it is better read again than kept."""
    return image.width * image.height > LARGE_PIXELS


def pixel_digest(image: Image.Image) -> str:
    """sha256 over mode, size and pixels, in hexadecimal: the identity of an image however it was stored."""
    header = f"{image.mode}:{image.width}x{image.height}:".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()
