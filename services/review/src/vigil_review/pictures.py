"""Pictures between browser and platform."""

from __future__ import annotations

import io

from vigil_common import images
from vigil_common.errors import InvalidInput

MAX_MASK_BYTES = 8 << 20
MAX_PIXELS = 100_000_000
# What every browser shows as it is.
SHOWN = frozenset({"image/jpeg", "image/png", "image/bmp"})


def shown(image: bytes, content_type: str) -> tuple[bytes, str]:
    """An image as a browser can show it.

    Raises:
        InvalidInput: IMAGE_UNREADABLE and its like, where it must be converted and can't be read.
    """
    if content_type in SHOWN:
        return image, content_type
    opened = images.open_header(image, max_bytes=len(image), max_pixels=MAX_PIXELS)
    # How its EXIF data say it is to be turned, Chromium does not look: masks would be drawn in the wrong place.
    if content_type == "image/webp" and images.orientation(opened) == 1:
        return image, content_type
    try:
        upright = images.upright(opened)
        # Sixteen bits, which a mere conversion would cut off at white.
        deep = upright.mode.startswith("I")
        converted = upright.point(lambda value: value * (1 / 256)).convert("L") if deep else upright.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("IMAGE_UNREADABLE", f"the image can't be read: {error}") from error
    file = io.BytesIO()
    converted.save(file, "PNG")
    return file.getvalue(), "image/png"


def drawn(canvas: bytes) -> bytes:
    """The mask on a canvas, marked where it is more opaque than not, as an 8-bit grey PNG; empty where nothing is.

    Raises:
        InvalidInput: MASK_UNREADABLE.
    """
    try:
        opened = images.open_header(canvas, max_bytes=MAX_MASK_BYTES, max_pixels=MAX_PIXELS)
        marked = opened.convert("RGBA").getchannel("A").point([0] * 128 + [255] * 128)
    except (InvalidInput, OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("MASK_UNREADABLE", f"the drawn mask can't be read: {error}") from error
    if marked.getbbox() is None:
        return b""
    file = io.BytesIO()
    marked.save(file, "PNG")
    return file.getvalue()
