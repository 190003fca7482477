"""What an encoded image is, from its header alone: limits are checked before any pixel is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

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
ORIENTATION_TAG = 0x0112
# What an EXIF orientation asks for.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset({5, 6, 7, 8})
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_HEADER, PNG_CHUNK = struct.Struct(">8xI4sIIBBBBBI"), struct.Struct(">I4s")
BITS = 8
PNG_MODES = {0: "L", 2: "RGB"}
# What may stand before a PNG's pixels and changes none of them, and how much of it is looked at.
PNG_SILENT = frozenset({b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"tIME"})
PNG_SILENT_AT_MOST = 8
# Reads of a file until its header is known, and of its pixels: one made of a million empty parts would cost seconds.
HEADER_READS, READS = 10_000, 100_000
# Our own limit is checked on every image; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None
# What Pillow finds odd in a sender's file is no concern of the logs. Set once: per call it would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says; width and height in pixels, as people and models see it: after EXIF rotation."""

    content_type: str
    width: int
    height: int


class _TooManyReadsError(Exception):
    """The file is made of more parts than an image of a camera."""


class _Reads(io.BytesIO):
    """A file that may be read only so many times."""

    left = HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        self.left -= 1
        if self.left < 0:
            raise _TooManyReadsError("it is made of too many parts")
        return super().read(size)


def open_header(data: bytes, *, max_bytes: int, max_pixels: int) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        InvalidInput: IMAGE_EMPTY, IMAGE_TOO_LARGE, IMAGE_FORMAT_UNSUPPORTED, IMAGE_UNREADABLE, IMAGE_TRUNCATED (WebP,
            whose length stands in its header) or IMAGE_ANIMATED.
    """
    _check_bytes(data, max_bytes)
    try:
        file = _Reads(data)
        image = Image.open(file, formats=FORMATS)
        animated = getattr(image, "is_animated", False)  # not `n_frames`, which reads all of a TIFF's directories
        file.left = READS
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except _TooManyReadsError as error:
        raise InvalidInput("IMAGE_UNREADABLE", f"the image's header can't be read: {error}") from None
    except Exception as error:
        if _is_cut_webp(data):
            raise InvalidInput("IMAGE_TRUNCATED", "the image is cut short; send the whole file") from error
        raise InvalidInput("IMAGE_UNREADABLE", f"the image's header is broken ({type(error).__name__})") from error
    _check_pixels(*image.size, max_pixels)
    if animated:
        raise InvalidInput("IMAGE_ANIMATED", "the file holds several images; send each as a frame of its own")
    return image


def plain_png(data: bytes, *, max_bytes: int, max_pixels: int) -> tuple[int, int, str] | None:
    """Width, height and mode ("L" or "RGB") of a PNG of eight bits with nothing special before its pixels.

    None for everything else, which `open_header` looks at. That takes ten times as long, and most frames are such.

    Raises:
        InvalidInput: IMAGE_EMPTY or IMAGE_TOO_LARGE.
    """
    _check_bytes(data, max_bytes)
    if not data.startswith(PNG_START) or len(data) < PNG_HEADER.size:
        return None
    _, _, width, height, bits, colour, *others, checksum = PNG_HEADER.unpack_from(data)
    mode = PNG_MODES.get(colour)
    if bits != BITS or mode is None or any(others) or not width * height or zlib.crc32(data[12:29]) != checksum:
        return None
    at = PNG_HEADER.size
    for _ in range(PNG_SILENT_AT_MOST):
        if at + PNG_CHUNK.size > len(data):
            return None
        length, kind = PNG_CHUNK.unpack_from(data, at)
        if kind == b"IDAT":
            _check_pixels(width, height, max_pixels)
            return width, height, mode
        if kind not in PNG_SILENT:
            return None
        at += 12 + length
    return None


def _check_bytes(data: bytes, max_bytes: int) -> None:
    if not data:
        raise InvalidInput("IMAGE_EMPTY", "the image has no bytes")
    if len(data) > max_bytes:
        raise InvalidInput(
            "IMAGE_TOO_LARGE",
            f"the image has {len(data)} bytes, at most {max_bytes} are taken",
            metadata={"max_bytes": str(max_bytes)},
        )


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidInput(
            "IMAGE_TOO_LARGE",
            f"the image has {width} x {height} pixels, at most {max_pixels} in all are decoded",
            metadata={"max_pixels": str(max_pixels)},
        )


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
    if plain := plain_png(data, max_bytes=max_bytes, max_pixels=max_pixels):
        width, height, _ = plain
        return ImageInfo(CONTENT_TYPES["PNG"], width, height)
    image = open_header(data, max_bytes=max_bytes, max_pixels=max_pixels)
    return ImageInfo(CONTENT_TYPES[image.format or ""], *upright_size(image))


def orientation(image: Image.Image) -> int:
    """How the header says that the image is to be turned, 1 to 8 as in EXIF; 1 where it says nothing with a meaning.

    Asked before the pixels are decoded. What stands behind the pixels of a PNG is not looked at: nobody could know the
    image's size before decoding it.
    """
    try:
        if isinstance(image, TiffImageFile):
            said = image.tag_v2.get(ORIENTATION_TAG, 1)
        else:  # not its own `getexif`, which for a PNG decodes the pixels
            said = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - Pillow's parser raises anything on hostile data, which then turns nothing
        return 1
    return said if isinstance(said, int) and said in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once it is turned; Pillow gives a TIFF's so by itself."""
    if orientation(image) in SIDEWAYS and not isinstance(image, TiffImageFile):
        return image.height, image.width
    return image.size


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its header says; what `open_header` gave, and nothing done with it yet.

    Raises:
        Exception: Whatever Pillow's decoders raise on broken pixels.
    """
    turn = TURNS.get(orientation(image))
    image.load()
    return image if turn is None or isinstance(image, TiffImageFile) else image.transpose(turn)
