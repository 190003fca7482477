"""Masks as people bring them, and as they are kept: grey PNG, 0 normal, 255 anomalous."""

from __future__ import annotations

import io

from vigil_common import images
from vigil_common.errors import InvalidInput

MAX_BYTES = 2 << 20
MAX_PIXELS = 100_000_000
HALF = 128


def canonical(mask: bytes, *, width: int, height: int) -> bytes:
    """The mask as it is kept.

    Args:
        mask: A PNG, 1-bit or 8-bit grey; what is 128 or more is anomalous.
        width: Of the image as people see it, in pixels: after EXIF rotation.
        height: Of the image.

    Raises:
        InvalidInput: MASK_TOO_LARGE, MASK_FORMAT_INVALID, MASK_SIZE_MISMATCH, MASK_MODE_INVALID, MASK_UNREADABLE or
            MASK_EMPTY.
    """
    if len(mask) > MAX_BYTES:
        raise InvalidInput("MASK_TOO_LARGE", f"the mask has {len(mask)} bytes; at most {MAX_BYTES}")
    try:
        image = images.open_header(mask, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    except InvalidInput as error:
        raise InvalidInput("MASK_UNREADABLE", f"the mask can't be read: {error.message}") from error
    if image.format != "PNG":
        raise InvalidInput("MASK_FORMAT_INVALID", f"the mask is a {image.format}; save it as PNG")
    size = images.upright_size(image)
    if size != (width, height):
        found = f"{size[0]} x {size[1]}"
        raise InvalidInput("MASK_SIZE_MISMATCH", f"the mask has {found} pixels, the image {width} x {height}")
    if image.mode not in ("1", "L"):
        raise InvalidInput(
            "MASK_MODE_INVALID",
            f"the mask's pixels are {image.mode}; save it as 8-bit grey (GIMP: Image, Mode, Grayscale; no alpha)",
        )
    try:
        grey = images.upright(image).convert("L")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("MASK_UNREADABLE", f"the mask is cut short or broken ({error})") from error
    marked = grey.point([0] * HALF + [255] * (256 - HALF))
    if marked.getbbox() is None:
        _, brightest = grey.getextrema()
        what = f"the mask marks nothing: its brightest pixel is {brightest}, and marked is what has {HALF} or more"
        raise InvalidInput("MASK_EMPTY", f"{what}; save it in 0 and 255, leave it out, or label the frame normal")
    kept = io.BytesIO()
    marked.save(kept, "PNG")
    return kept.getvalue()
