"""Pictures of a verdict: outline, heat map, map and mask, by numpy and Pillow alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vigil_common.pixels import Pixels

OUTLINE = np.array([255, 40, 40], dtype=np.uint8)
HEAT_SHARE = 0.45
# Pixels a side of what shadow compares: enough for where an anomaly is, small enough to travel with each verdict.
SMALL = 64
# Dark blue over green and yellow to red, a 256-entry table between these colours.
STOPS = np.array([[20, 20, 110], [0, 120, 200], [40, 190, 110], [250, 220, 50], [210, 30, 30]], dtype=np.float64)
HEAT = np.stack(
    [np.interp(np.linspace(0, len(STOPS) - 1, 256), np.arange(len(STOPS)), STOPS[:, c]) for c in range(3)], axis=1
).astype(np.uint8)


def encode(pixels: Pixels, *, jpeg: bool = False) -> bytes:
    """Pixels as PNG, or JPEG where asked for."""
    file = io.BytesIO()
    if jpeg:
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
    else:
        Image.fromarray(pixels).save(file, "PNG", compress_level=3)
    return file.getvalue()


def map_pixels(anomaly_map: NDArray[np.float32]) -> Pixels:
    """An anomaly map [H, W] as grey: 0 for 0, 255 for 1 and more."""
    grey = np.fmax(anomaly_map, np.float32(0))  # of a NaN and 0 it is 0
    np.minimum(grey, 1, out=grey)
    grey *= 255
    return np.rint(grey, out=grey).astype(np.uint8)


def mask_pixels(mask: NDArray[np.bool_]) -> Pixels:
    """A mask [H, W] as grey: 255 where anomalous."""
    return mask.astype(np.uint8) * np.uint8(255)


def small(pixels: Pixels) -> Pixels:
    """Grey pixels [H, W], averaged down to at most `SMALL` a side; fewer stay as they are."""
    height, width = pixels.shape
    if max(height, width) <= SMALL:
        return pixels
    factor, rest = divmod(max(height, width), SMALL)
    if not (rest or height % factor or width % factor):  # but for rounding the same, in a third of the time
        return np.asarray(Image.fromarray(pixels).reduce(factor))
    share = SMALL / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _outlined(canvas: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The canvas with the mask's inner edge drawn two pixels wide."""
    height, width = canvas.shape[:2]
    grown = np.asarray(Image.fromarray(mask_pixels(mask)).resize((width, height), Image.Resampling.NEAREST)) > 0
    inner = np.pad(grown, 2)
    eroded = grown.copy()
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        eroded &= inner[dy : dy + height, dx : dx + width]
    result = canvas.copy()
    result[grown & ~eroded] = OUTLINE
    return result


def _rgb(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels  # noqa: PLR2004 - grey has two axes


def simple(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The image with the outline of the anomalous region."""
    return _outlined(_rgb(pixels), mask)


def full(pixels: Pixels, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_], text: str) -> Pixels:
    """The image under its heat map, with the mask's outline and a line of text."""
    canvas = _rgb(pixels)
    height, width = canvas.shape[:2]
    grey = Image.fromarray(map_pixels(anomaly_map)).resize((width, height), Image.Resampling.BILINEAR)
    # By Pillow, byte by byte: as numbers of eight bytes a large image would be gigabytes.
    blended = Image.blend(Image.fromarray(canvas), Image.fromarray(HEAT[np.asarray(grey)]), HEAT_SHARE)
    picture = Image.fromarray(_outlined(np.asarray(blended), mask))
    draw = ImageDraw.Draw(picture)
    size = max(12, min(height, width) // 24)  # of a strip's length it would be larger than Pillow draws at all
    box = draw.textbbox((6, 4), text, font_size=size)
    draw.rectangle((box[0] - 4, box[1] - 2, box[2] + 4, box[3] + 2), fill=(0, 0, 0))
    draw.text((6, 4), text, fill=(255, 255, 255), font_size=size)
    return np.asarray(picture)
