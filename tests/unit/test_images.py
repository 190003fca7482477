"""Each kind of image has one defined meaning, and each kind of rubbish one reason."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from vigil_common import images, pixels
from vigil_common.bundle import ModelInput
from vigil_common.errors import InvalidInput
from vigil_common.images import ImageInfo, inspect, plain_png
from vigil_common.pixels import decode, to_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PIXELS = 10_000
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP"]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def several(kind: str) -> bytes:
    return saved(NOISE, kind, save_all=True, append_images=[NOISE.rotate(180)])


def read(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decode(data, max_pixels=MAX_PIXELS)


def reason_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidInput) as caught:
        act()
    return caught.value.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_colour_comes_out_as_pillow_decodes_it(kind: str) -> None:
    data = saved(NOISE, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(read(data), expected)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of one row of four pixels, made by hand: Pillow does not write every kind that it reads."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        saved(NOISE.convert("L"), "PNG"),
        saved(NOISE, "PNG", transparency=(1, 2, 3)),
        saved(NOISE.convert("L"), "PNG", transparency=7),
        saved(NOISE, "PNG", dpi=(72, 72), compress_level=0),
        png(2, 0, b"\x1b"),
        png(4, 0, b"\x0f\xf0"),
        png(16, 2, bytes(range(24))),
    ],
    ids=["grey", "see-through", "see-through-grey", "stored", "two-bits", "four-bits", "deep-colour"],
)
def test_a_png_comes_out_as_pillow_decodes_it(data: bytes) -> None:
    expected = Image.open(io.BytesIO(data))
    assert expected.mode in {"L", "RGB"}
    assert np.array_equal(read(data), np.asarray(expected))


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks after its header."""
    added = b"".join(chunk(kind, content) for kind, content in chunks)
    return data[:33] + added + data[33:]


GAMMA = (b"gAMA", struct.pack(">I", 45_455))


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (saved(NOISE, "PNG"), "RGB"),
        (saved(NOISE.convert("L"), "PNG"), "L"),
        (saved(NOISE, "PNG", dpi=(72, 72)), "RGB"),
        (with_chunks(saved(NOISE, "PNG"), GAMMA, (b"tIME", bytes(7))), "RGB"),
    ],
    ids=["colour", "grey", "resolution", "gamma"],
)
def test_a_plain_png_is_known_by_its_first_bytes(data: bytes, mode: str) -> None:
    assert plain_png(data, max_bytes=1 << 20, max_pixels=MAX_PIXELS) == (*NOISE.size, mode)
    assert np.array_equal(read(data), np.asarray(Image.open(io.BytesIO(data))))
    with pytest.raises(InvalidInput, match="pixels"):
        plain_png(data, max_bytes=1 << 20, max_pixels=NOISE.width * NOISE.height - 1)


@pytest.mark.parametrize(
    "data",
    [
        saved(NOISE, "JPEG"),
        with_chunks(saved(NOISE, "PNG"), (b"eXIf", b"MM\0*")),
        saved(NOISE, "PNG", transparency=(1, 2, 3)),
        saved(NOISE.convert("RGBA"), "PNG"),
        saved(NOISE.convert("P"), "PNG"),
        with_chunks(saved(NOISE, "PNG"), (b"acTL", struct.pack(">II", 2, 0))),
        with_chunks(saved(NOISE, "PNG"), (b"tEXt", b"Raw profile type exif\0")),
        with_chunks(saved(NOISE, "PNG"), *[GAMMA] * 9),
        saved(NOISE, "PNG")[:20] + b"\1" + saved(NOISE, "PNG")[21:],
        png(2, 0, b"\x1b"),
        png(16, 2, bytes(range(24))),
        saved(NOISE, "PNG")[:35],
        b"\x89PNG",
    ],
    ids=[
        "jpeg", "turned", "see-through", "alpha", "palette", "animated", "profile", "many-chunks", "checksum",
        "two-bits", "deep", "cut", "start",
    ],
)  # fmt: skip
def test_what_may_mean_more_is_left_to_pillow(data: bytes) -> None:
    assert plain_png(data, max_bytes=1 << 20, max_pixels=MAX_PIXELS) is None


def test_pillow_reads_a_png_that_the_quick_decoder_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As Rust's, which is no Exception."""

    asked = []

    def panics(*arguments: object) -> None:
        asked.append(arguments)
        raise Panic

    monkeypatch.setattr(pixels, "decode_image_png_u8", panics)
    assert np.array_equal(read(saved(NOISE, "PNG")), np.asarray(NOISE))
    assert len(asked) == 1
    monkeypatch.setattr(pixels, "QUICK_PIXELS", NOISE.width * NOISE.height - 1)
    assert np.array_equal(read(saved(NOISE, "PNG")), np.asarray(NOISE))
    assert len(asked) == 1  # a large one would hold up all other threads


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    deep = np.array([[0, 128, 129, 257], [32_768, 65_279, 65_407, 65_535]], dtype=np.uint16)
    assert read(saved(Image.fromarray(deep), kind)).tolist() == [[0, 0, 1, 1], [128, 254, 255, 255]]


def test_big_endian_sixteen_bits_are_the_same() -> None:
    image = Image.frombytes("I;16B", (2, 1), b"\x01\x01\xff\xff")
    assert read(saved(image, "TIFF")).tolist() == [[1, 255]]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 77), [[77]]),
        (Image.new("1", (1, 1), 1), [[255]]),
        (Image.new("LA", (1, 1), (77, 0)), [[77]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), [[[1, 2, 3]]]),
        (Image.new("RGB", (1, 1), (1, 2, 3)).quantize(2), [[[1, 2, 3]]]),
    ],
    ids=["grey", "bits", "grey-alpha", "alpha", "palette"],
)
def test_grey_keeps_one_channel_and_alpha_is_dropped(image: Image.Image, expected: list[Any]) -> None:
    assert read(saved(image, "PNG")).tolist() == expected


def test_cmyk_becomes_rgb() -> None:
    pixels = read(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert pixels.shape == (8, 8, 3)
    assert np.allclose(pixels, [255, 0, 0], atol=2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("L", (30, 20))
    upright.paste(255, (0, 0, 15, 20))
    pixels = read(saved(upright.convert("RGB"), kind, exif=exif))
    assert pixels.shape == (30, 20, 3)
    assert pixels[:10].mean() > 200
    assert pixels[-10:].mean() < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(10))
def test_the_header_tells_the_size_that_people_and_models_see(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    data = saved(image, kind, exif=exif)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = inspect(data, max_bytes=1 << 20, max_pixels=MAX_PIXELS)
    assert (found.width, found.height) == seen.size == ((20, 30) if turn in range(5, 9) else (30, 20))
    assert np.array_equal(read(data), np.asarray(seen))


def test_the_size_of_a_turned_png_is_known_without_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(NOISE.resize((64, 32)), "PNG", exif=exif)
    found = inspect(data[: len(data) // 2], max_bytes=1 << 20, max_pixels=MAX_PIXELS)
    assert (found.width, found.height) == (32, 64)


def test_an_orientation_that_is_no_number_turns_nothing() -> None:
    tag = struct.pack(">HHI4s", 0x0112, 2, 2, b"6")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + tag + bytes(4)
    data = saved(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    found = inspect(data, max_bytes=1 << 20, max_pixels=MAX_PIXELS)
    assert (found.width, found.height) == (30, 20)
    assert read(data).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_pixels_are_truncated(kind: str) -> None:
    data = saved(NOISE, kind)
    assert reason_of(lambda: read(data[: len(data) * 2 // 3])) == "IMAGE_TRUNCATED"


@pytest.mark.parametrize("look", [read, lambda data: inspect(data, max_bytes=1 << 20, max_pixels=MAX_PIXELS)])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "IMAGE_EMPTY"),
        (b"no image at all", "IMAGE_UNREADABLE"),
        (saved(NOISE, "PNG")[:20], "IMAGE_UNREADABLE"),
        (saved(NOISE, "GIF"), "IMAGE_FORMAT_UNSUPPORTED"),
        (b"\0\0\0\x1cftypavif", "IMAGE_FORMAT_UNSUPPORTED"),
        (b"%PDF-1.7", "IMAGE_FORMAT_UNSUPPORTED"),
        (several("TIFF"), "IMAGE_ANIMATED"),
        (several("PNG"), "IMAGE_ANIMATED"),
        (several("WEBP"), "IMAGE_ANIMATED"),
        (saved(Image.new("1", (101, 100)), "PNG"), "IMAGE_TOO_LARGE"),
    ],
    ids=["empty", "text", "header", "gif", "avif", "pdf", "pages", "apng", "webp", "pixels"],
)
def test_the_header_tells_what_is_wrong(look: Callable[[bytes], object], data: bytes, reason: str) -> None:
    assert reason_of(lambda: look(data)) == reason


def test_floats_are_refused_rather_than_shown_black() -> None:
    data = saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    assert reason_of(lambda: read(data)) == "IMAGE_FORMAT_UNSUPPORTED"


def test_a_bomb_is_refused_by_its_header_with_the_limit() -> None:
    header = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(InvalidInput) as caught:
        read(bytes(header))
    assert (caught.value.reason, caught.value.metadata) == ("IMAGE_TOO_LARGE", {"max_pixels": str(MAX_PIXELS)})


def in_parts(kind: str, count: int) -> bytes:
    """An image with so many empty parts before its pixels, or with so many directories."""
    data = saved(NOISE, kind)
    if kind == "JPEG":
        return data[:2] + b"\xff\xe9\0\2" * count + data[2:]
    if kind == "PNG":
        chunk = b"\0\0\0\0vgIl" + zlib.crc32(b"vgIl").to_bytes(4, "big")
        return data[:33] + chunk * count + data[33:]
    first = int.from_bytes(data[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    chain = b"".join(b"\0\0" + (len(data) + 6 * (index + 1)).to_bytes(4, "little") for index in range(count))
    return data[:end] + len(data).to_bytes(4, "little") + data[end + 4 :] + chain


@pytest.mark.parametrize(("kind", "reason"), [("JPEG", "UNREADABLE"), ("PNG", "UNREADABLE"), ("TIFF", "ANIMATED")])
def test_an_image_of_very_many_parts_is_refused_before_they_cost_much(kind: str, reason: str) -> None:
    data = in_parts(kind, 200_000)
    began = time.process_time()
    assert reason_of(lambda: inspect(data, max_bytes=1 << 30, max_pixels=MAX_PIXELS)) == f"IMAGE_{reason}"
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_some_parts_is_read(kind: str) -> None:
    assert np.array_equal(read(in_parts(kind, 1000)), read(saved(NOISE, kind)))


def test_pixels_of_very_many_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(NOISE.convert("LA"), "PNG")
    at = whole.index(b"IDAT")
    size = int.from_bytes(whole[at - 4 : at], "big")
    parts = [b"IDAT" + whole[start : start + 10] for start in range(at + 4, at + 4 + size - size % 10, 10)]
    chunks = b"".join(struct.pack(">I", 10) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    data = whole[: at - 4] + chunks + whole[at + 8 + size :]
    monkeypatch.setattr(images, "READS", 50)
    with pytest.raises(InvalidInput, match="too many parts") as caught:
        read(data)
    assert caught.value.reason == "IMAGE_TRUNCATED"


def test_too_many_bytes_are_refused_before_anything_is_read() -> None:
    assert reason_of(lambda: inspect(b"x" * 11, max_bytes=10, max_pixels=MAX_PIXELS)) == "IMAGE_TOO_LARGE"


@pytest.mark.parametrize("kind", FORMATS)
def test_inspect_names_type_and_size(kind: str) -> None:
    found = inspect(saved(NOISE, kind), max_bytes=1 << 20, max_pixels=MAX_PIXELS)
    assert found == ImageInfo(f"image/{kind.lower()}", 60, 40)


@given(kind=st.sampled_from(FORMATS), place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=16))
def test_broken_files_raise_invalid_input_and_nothing_else(kind: str, place: float, junk: bytes) -> None:
    data = bytearray(saved(NOISE.resize((12, 8)), kind))
    at = round(place * (len(data) - 1))
    data[at : at + len(junk)] = junk
    try:
        pixels = read(bytes(data))
    except InvalidInput as error:
        assert error.reason.startswith("IMAGE_")  # noqa: PT017 - any of them
    else:
        assert pixels.dtype == np.uint8


def test_a_tensor_is_the_image_by_255_in_planes() -> None:
    pixels = np.asarray(NOISE)
    tensor = to_tensor(pixels, ModelInput())
    assert tensor.shape == (1, 3, 40, 60)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    assert np.array_equal(tensor[0], pixels.astype(np.float32).transpose(2, 0, 1) / 255)


def test_grey_fills_three_equal_planes() -> None:
    tensor = to_tensor(np.array([[0, 51], [102, 255]], dtype=np.uint8), ModelInput())
    assert np.allclose(tensor[0, 0], [[0, 0.2], [0.4, 1]])
    assert np.array_equal(tensor[0, 0], tensor[0, 2])


def test_the_range_of_the_manifest_is_kept() -> None:
    tensor = to_tensor(np.array([[0, 255]], dtype=np.uint8), ModelInput(value_range=(-1, 1)))
    assert tensor[0, 1].tolist() == [[-1, 1]]


def test_a_free_size_is_left_to_the_graph() -> None:
    assert to_tensor(np.zeros((64, 48), dtype=np.uint8), ModelInput()).shape == (1, 3, 64, 48)


def test_a_fixed_size_is_resized_to_and_antialias_decides_what_a_thin_line_leaves() -> None:
    line = np.zeros((64, 64), dtype=np.uint8)
    line[:, 0] = 255
    smooth = to_tensor(line, ModelInput(width=16, height=8))
    points = to_tensor(line, ModelInput(width=16, height=8, antialias=False))
    assert smooth.shape == points.shape == (1, 3, 8, 16)
    assert smooth[0, 0, 0, 0] > 0.1
    assert points.max() == 0
