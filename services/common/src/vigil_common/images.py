"""What an encoded image is, from its header alone: limits are checked before any pixel is decoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from vigil_common.errors import InvalidInput

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
CONTENT_TYPES = {name: f"image/{name.lower()}" for name in FORMATS}
# Formats people send by mistake, told from noise by where and how they begin.
OTHERS = (
    (0, b"GIF8", "GIF"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftyp", "HEIF, AVIF or video"),
)
# Our own limit is checked on every image; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None
# What Pillow finds odd in a sender's file is no concern of the logs. Set once: per call it would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says; width and height in pixels, before any EXIF rotation."""

    content_type: str
    width: int
    height: int


def open_header(data: bytes, *, max_bytes: int, max_pixels: int) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        InvalidInput: IMAGE_EMPTY, IMAGE_TOO_LARGE, IMAGE_FORMAT_UNSUPPORTED, IMAGE_UNREADABLE, IMAGE_TRUNCATED (WebP,
            whose length stands in its header) or IMAGE_ANIMATED.
    """
    if not data:
        raise InvalidInput("IMAGE_EMPTY", "the image has no bytes")
    if len(data) > max_bytes:
        raise InvalidInput(
            "IMAGE_TOO_LARGE",
            f"the image has {len(data)} bytes, at most {max_bytes} are taken",
            metadata={"max_bytes": str(max_bytes)},
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        animated = getattr(image, "n_frames", 1) > 1
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:
        if _is_cut_webp(data):
            raise InvalidInput("IMAGE_TRUNCATED", "the image is cut short; send the whole file") from error
        raise InvalidInput("IMAGE_UNREADABLE", f"the image's header is broken ({type(error).__name__})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidInput(
            "IMAGE_TOO_LARGE",
            f"the image has {width} x {height} pixels, at most {max_pixels} in all are decoded",
            metadata={"max_pixels": str(max_pixels)},
        )
    if animated:
        raise InvalidInput("IMAGE_ANIMATED", "the file holds several images; send each as a frame of its own")
    return image


def _unidentified(data: bytes) -> InvalidInput:
    taken = ", ".join(FORMATS)
    if _is_cut_webp(data):
        return InvalidInput("IMAGE_TRUNCATED", "the image is cut short; send the whole file")
    for start, signature, name in OTHERS:
        if data.startswith(signature, start):
            return InvalidInput("IMAGE_FORMAT_UNSUPPORTED", f"{name} is not read here; send one of {taken}")
    return InvalidInput("IMAGE_UNREADABLE", f"not an image that is read here: {taken}")


def _is_cut_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def inspect(data: bytes, *, max_bytes: int, max_pixels: int) -> ImageInfo:
    """Read the header; raises as `open_header`."""
    image = open_header(data, max_bytes=max_bytes, max_pixels=max_pixels)
    return ImageInfo(CONTENT_TYPES[image.format or ""], *image.size)
