"""Images as the inference service decodes them; a parity sample read otherwise would fail where it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from vigil_common.errors import InvalidInput
from vigil_common.images import open_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 1 << 28
MAX_PIXELS = 50_000_000


def decode(data: bytes) -> NDArray[np.uint8]:
    """Height x width x 3 (RGB); sixteen bits are scaled to eight, and EXIF rotation is applied.

    Raises:
        InvalidInput: As `vigil_common.images.open_header`, or IMAGE_TRUNCATED.
    """
    image = open_header(data, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("IMAGE_TRUNCATED", f"the image is cut short or broken ({error})") from error
    if image.mode.startswith(("I", "F")):
        grey = np.clip(np.rint(np.asarray(image, dtype=np.float64) / 257), 0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    return np.asarray(image.convert("RGB"))


def to_tensor(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels as [1, 3, height, width] from 0 to 1."""
    tensor = np.empty((1, 3, *pixels.shape[:2]), dtype=np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=tensor[0], dtype=np.float32)
    return tensor
