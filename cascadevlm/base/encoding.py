"""Encodes images for hosted judges, within the limits of a provider. Each image is encoded once."""

import base64
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image

LOSSLESS_PIXELS = 256 * 256
"""Images of up to this number of pixels are sent as PNG, because JPEG would blur their few details."""

JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The largest image that a provider accepts.

    Attributes:
        longest_side: maximum length of the longer side, in pixels.
        max_bytes: maximum size of the encoded image, in bytes.
    """

    longest_side: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image in the form that is sent to a judge. Width and height are in pixels."""

    data: bytes
    media_type: Literal["image/png", "image/jpeg"]
    width: int
    height: int

    @cached_property
    def digest(self) -> str:
        """The sha256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{self.base64}"


def size_within(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int]:
    """The width and height, in pixels, after the image is shrunk to ``longest_side``.

    `encode_image` makes an image smaller than this if it still has too many bytes.
    """
    scale = min(1.0, limits.longest_side / max(size))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def encode_image(image: Image.Image, limits: ImageLimits) -> EncodedImage:
    """Shrink an RGB image to the limits and encode it. Small images are encoded without loss."""
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
