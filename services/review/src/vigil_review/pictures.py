"""Pictures between browser and platform."""

from __future__ import annotations

import io

from PIL import Image
from vigil_common import images
from vigil_common.errors import InvalidInput

MAX_MASK_BYTES = 8 << 20
MAX_PIXELS = 100_000_000
ORIENTATION_TAG = 0x0112
# What takes an image back from how its EXIF orientation has it turned.
TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# What every browser shows as it is.
SHOWN = frozenset({"image/jpeg", "image/png", "image/bmp", "image/webp"})


def shown(image: bytes, content_type: str) -> tuple[bytes, str]:
    """An image as a browser can show it.

    Raises:
        InvalidInput: IMAGE_UNREADABLE and its like, where it must be converted and can't be read.
    """
    if content_type in SHOWN:
        return image, content_type
    opened = images.open_header(image, max_bytes=len(image), max_pixels=MAX_PIXELS)
    try:
        # Sixteen bits, which a mere conversion would cut off at white.
        deep = opened.mode.startswith("I")
        converted = opened.point(lambda value: value * (1 / 256)).convert("L") if deep else opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("IMAGE_UNREADABLE", f"the image can't be read: {error}") from error
    file = io.BytesIO()
    converted.save(file, "PNG")
    return file.getvalue(), "image/png"


def as_stored(picture: bytes, image: bytes) -> bytes:
    """A worker's picture over the image's pixels as they are stored: workers turn images as their EXIF data say.

    Raises:
        InvalidInput: The image can't be read.
    """
    opened = images.open_header(image, max_bytes=len(image), max_pixels=MAX_PIXELS)
    back = TURNED_BACK.get(opened.getexif().get(ORIENTATION_TAG, 1))
    if back is None or not picture:
        return picture
    file = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as turned:
        turned.transpose(back).save(file, "PNG")
    return file.getvalue()


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
