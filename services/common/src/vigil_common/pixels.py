"""Encoded image to tensor: every kind of image has one defined meaning."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from kornia_rs.io import decode_image_png_u8
from numpy.typing import NDArray
from PIL import Image

from vigil_common.errors import InvalidInput
from vigil_common.images import open_header, orientation, plain_png, upright

if TYPE_CHECKING:
    from vigil_common.bundle import ModelInput

Pixels = NDArray[np.uint8]
Tensor = NDArray[np.float32]

RESIZE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
MAX_BYTES = 1 << 30
# Decoding a PNG in Rust takes a third of Pillow's time but, other than Pillow, lets no other thread run meanwhile: only
# where that is a few milliseconds.
QUICK_PIXELS = 1 << 18
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
QUICK_MODES = {"L": "mono", "RGB": "rgb"}


def decode(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an image.

    Sixteen bits are scaled to eight, alpha is dropped, CMYK and palettes become RGB, EXIF rotation is applied.

    Returns:
        Height x width for grey images, height x width x 3 (RGB) for the others.

    Raises:
        InvalidInput: As `vigil_common.images.open_header`, or IMAGE_TRUNCATED.
    """
    plain = plain_png(data, max_bytes=MAX_BYTES, max_pixels=max_pixels)
    if plain and (pixels := _quick(data, *plain)) is not None:
        return pixels
    image = open_header(data, max_bytes=MAX_BYTES, max_pixels=max_pixels)
    if image.mode == "F":
        raise InvalidInput(
            "IMAGE_FORMAT_UNSUPPORTED", "floating-point pixels have no defined brightness; send 8 or 16 bits"
        )
    if image.format == "PNG" and not plain and orientation(image) == 1:
        pixels = _quick(data, *image.size, image.mode)
        if pixels is not None:
            return pixels
    try:
        image = upright(image)
        if image.mode.startswith("I"):
            return _to_eight_bits(image)
        target = "L" if image.mode in {"L", "1", "LA"} else "RGB"
        return np.asarray(image if image.mode == target else image.convert(target))
    except MemoryError:  # ours, not the sender's
        raise
    except Exception as error:  # Pillow's decoders raise anything on hostile data
        raise InvalidInput(
            "IMAGE_TRUNCATED", f"the image's pixels are cut short or broken ({error}); send the whole file"
        ) from error


def as_shown(data: bytes, *, max_pixels: int) -> bytes | None:
    """The image as people see it, as PNG, for readers that know neither EXIF data nor sixteen bits, such as Anomalib's.

    Returns:
        None where it is read so as it is stored, or is none.
    """
    try:
        image = open_header(data, max_bytes=len(data), max_pixels=max_pixels)
        deep = image.mode.startswith("I")
        if orientation(image) == 1 and not deep:
            return None
        shown = Image.fromarray(decode(data, max_pixels=max_pixels)) if deep else upright(image)
        out = io.BytesIO()
        (shown if shown.mode in PNG_MODES else shown.convert("RGB")).save(out, "PNG")
    except (InvalidInput, OSError, ValueError, SyntaxError):  # such as a frame that could not be judged for it
        return None
    return out.getvalue()


def _quick(data: bytes, width: int, height: int, mode: str) -> Pixels | None:
    """The same pixels as Pillow's, of a small PNG of eight bits; None where Pillow must look, and say what is wrong."""
    if width * height > QUICK_PIXELS or mode not in QUICK_MODES:
        return None
    try:
        pixels: Pixels = decode_image_png_u8(data, (height, width), QUICK_MODES[mode])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a panic of Rust's is no Exception
        return None
    return pixels[..., 0] if mode == "L" else pixels


def _to_eight_bits(image: Image.Image) -> Pixels:
    """Grey of 16 bits (or of 32 that hold 16) by 257; Pillow's own conversion would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    return np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8)


def flat(pixels: Pixels) -> Pixels:
    """Height x width, as of a mask: the brightest channel."""
    return pixels if pixels.ndim == 2 else pixels.max(axis=2)  # noqa: PLR2004 - grey has two axes


def tensor_size(pixels: Pixels, spec: ModelInput) -> tuple[int, int]:
    """Height and width that the pixels have as a tensor."""
    if spec.height and spec.width:
        return spec.height, spec.width
    height, width = pixels.shape[:2]
    return height, width


def to_tensor(pixels: Pixels, spec: ModelInput, *, out: Tensor | None = None) -> Tensor:
    """Pixels as the graph takes them: [1, 3, height, width] in the manifest's range.

    Resized only where the graph's size is fixed; otherwise the graph does it.

    Args:
        pixels: As `decode` gives them.
        spec: The graph's.
        out: Filled instead of new memory, [3, height, width] with the numbers of `tensor_size`.
    """
    height, width = tensor_size(pixels, spec)
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(_resized(Image.fromarray(pixels), width, height, spec))
    planes = np.empty((3, height, width), dtype=np.float32) if out is None else out
    # Divided, not multiplied by the inverse: bit for bit what a direct run computes.
    if pixels.ndim == 2:  # noqa: PLR2004 - grey has two axes, and one plane to compute
        np.divide(pixels, np.float32(255.0), out=planes[0], dtype=np.float32)
        planes[1:] = planes[0]
    else:
        np.divide(pixels.transpose(2, 0, 1), np.float32(255.0), out=planes, dtype=np.float32)
    low, high = spec.value_range
    if (low, high) != (0.0, 1.0):
        planes *= high - low
        planes += low
    return planes[None]


def _resized(image: Image.Image, width: int, height: int, spec: ModelInput) -> Image.Image:
    resample = RESIZE[spec.resize]
    if spec.antialias:
        return image.resize((width, height), resample)
    # An affine transform samples points, as interpolation without antialias does.
    scale = (image.width / width, 0.0, 0.0, 0.0, image.height / height, 0.0)
    return image.transform((width, height), Image.Transform.AFFINE, scale, resample)
