"""Reading images: anything a caller may hold becomes an upright RGB ``PIL.Image.Image``."""

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cascadevlm.errors import ImageError
from cascadevlm.files import valid_text

ImageSource: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

MAX_PIXELS = 178_956_970
"""The size above which Pillow refuses an image as a decompression bomb: twice its ``MAX_IMAGE_PIXELS``; we refuse at the
same size, whatever its warning filters."""


LARGE_PIXELS = 1_000_000
"""From this size on, shrinking and encoding an image takes longer than a thread is worth, and many of them fill the memory."""

_OPENING = threading.Lock()


def load_image(source: ImageSource) -> Image.Image:
    """Read an image: EXIF orientation applied, transparency flattened onto white, converted to RGB.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array of H x W (grey), H x W x 3 or H x W x 4 uint8.

    Raises:
        ImageError: if it cannot be found or decoded, is truncated, or is a decompression bomb.
    """
    with _told(source):
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        if isinstance(source, np.ndarray):
            return _upright_rgb(_from_array(source))
        with _open(source) as image:
            return _upright_rgb(image)


def unread_image(source: str | Path | bytes) -> Image.Image:
    """An image that tells its size; its pixels are not read, nor turned upright.

    Raises:
        ImageError: if there is none.
    """
    with _told(source), _open(source) as image:
        return image


@contextmanager
def _told(source: ImageSource) -> Iterator[None]:
    """One of our errors, that names the image, for all that reading one raises."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ImageError(f"Image {str(source)!r} does not exist.") from exc
    except UnidentifiedImageError as exc:  # whose message holds an address in memory
        raise ImageError(f"Image {_describe(source)} is no image, or of an unknown format.") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"Image {_describe(source)} is too large to be decoded: {exc}.", hint="Shrink it first.") from exc
    except (OSError, ValueError, TypeError, SyntaxError, EOFError) as exc:
        raise ImageError(f"Image {_describe(source)} cannot be decoded: {exc}.") from exc


def _open(source: str | Path | bytes) -> Image.Image:
    with _OPENING, warnings.catch_warnings():  # warning filters belong to the process, not to a thread
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"its dtype is {array.dtype}, not uint8")
    return Image.fromarray(array)


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return _flatten(ImageOps.exif_transpose(image))


def _flatten(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _describe(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return repr(str(source)) if isinstance(source, str | Path) else f"({type(source).__name__})"


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


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
