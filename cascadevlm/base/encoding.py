"""Images as hosted judges are sent them: within a provider's limits, encoded once."""

import base64
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image

LOSSLESS_PIXELS = 256 * 256
"""Images up to this size go as PNG: JPEG would blur what little they show."""

JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a provider accepts: the longest side in pixels and the size of the encoded bytes."""

    longest_side: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it is sent."""

    data: bytes
    media_type: Literal["image/png", "image/jpeg"]
    width: int
    height: int

    @cached_property
    def digest(self) -> str:
        """sha256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{self.base64}"


def size_within(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int]:
    """The size, in pixels, that an image is shrunk to, but for a few whose bytes are too many even so."""
    scale = min(1.0, limits.longest_side / max(size))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def encode_image(image: Image.Image, limits: ImageLimits) -> EncodedImage:
    """Shrink an RGB image to the limits and encode it, small ones without loss."""
    if max(image.size) > limits.longest_side:
        image = image.copy()
        image.thumbnail((limits.longest_side, limits.longest_side), Image.Resampling.LANCZOS)
    while True:
        lossless = image.width * image.height <= LOSSLESS_PIXELS
        buffer = io.BytesIO()
        image.save(buffer, "PNG") if lossless else image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        if buffer.tell() <= limits.max_bytes:
            media_type: Literal["image/png", "image/jpeg"] = "image/png" if lossless else "image/jpeg"
            return EncodedImage(data=buffer.getvalue(), media_type=media_type, width=image.width, height=image.height)
        image = image.resize((max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)), Image.Resampling.LANCZOS)
