"""Masks drawn with the programs that people use."""

from __future__ import annotations

import io
import sys
import zipfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from vigil_cli import openraster
from vigil_cli.review import edit
from vigil_cli.sources import SourceError
from vigil_client import ReviewedFrame, StoredFrame
from vigil_common.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (12, 9)
# Does what GIMP does: cuts the layer to what is painted, with an offset, under a name of its own.
PROGRAM = """
import io, sys, zipfile
from xml.etree import ElementTree as ET
from PIL import Image
path = sys.argv[1]
with zipfile.ZipFile(path) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
root = ET.fromstring(parts["stack.xml"])
layer = next(one for one in root.iter("layer") if one.get("name") == "mask")
paint = Image.open(io.BytesIO(parts[layer.get("src")]))
paint.paste((0, 0, 255, 255), (7, 5, 11, 8))
box = paint.getchannel("A").getbbox()
out = io.BytesIO()
paint.crop(box).save(out, "PNG")
layer.set("src", "data/001.png"); layer.set("x", str(box[0])); layer.set("y", str(box[1]))
parts["data/001.png"] = out.getvalue(); parts["stack.xml"] = ET.tostring(root)
with zipfile.ZipFile(path, "w") as archive:
    for name, body in parts.items():
        archive.writestr(name, body)
"""


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def grey(box: tuple[int, int, int, int]) -> bytes:
    mask = Image.new("L", SIZE)
    mask.paste(255, box)
    return png(mask)


def frame(image: bytes) -> ReviewedFrame:
    when = datetime(2026, 11, 24, tzinfo=UTC)
    stored = StoredFrame("f1", "cells", "cam1", when, when, "image/png", *SIZE, len(image), {}, None)
    return ReviewedFrame(stored, image, ())


def boxes(mask: bytes | None) -> tuple[int, int, int, int] | None:
    assert mask is not None
    with Image.open(io.BytesIO(mask)) as image:
        assert (image.mode, image.size) == ("L", SIZE)
        return image.getbbox()


def test_a_file_is_what_the_format_asks_for() -> None:
    with zipfile.ZipFile(io.BytesIO(openraster.write(png(Image.new("RGB", SIZE)), grey((1, 2, 4, 5))))) as archive:
        first = archive.infolist()[0]
        assert (first.filename, first.compress_type, archive.read("mimetype")) == ("mimetype", 0, b"image/openraster")
        root = ET.fromstring(archive.read("stack.xml"))  # noqa: S314 - our own
        assert (root.get("w"), root.get("h")) == ("12", "9")
        names = [layer.get("name") for layer in root.iter("layer")]
        assert names == ["mask", "image"]
        sizes = {Image.open(io.BytesIO(archive.read(str(layer.get("src"))))).size for layer in root.iter("layer")}
        assert sizes == {SIZE}
        assert {"mergedimage.png", "Thumbnails/thumbnail.png"} <= set(archive.namelist())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16", "CMYK"])
def test_the_mask_comes_back_as_it_went_whatever_the_image(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, SIZE).save(out, "TIFF")
    assert boxes(openraster.read_mask(openraster.write(out.getvalue(), grey((1, 2, 4, 5))))) == (1, 2, 4, 5)


def test_sixteen_bits_are_shown_by_their_upper_eight() -> None:
    file = openraster.write(png(Image.new("I;16", SIZE, 0x8000)), None)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert Image.open(io.BytesIO(archive.read("data/image.png"))).getpixel((0, 0)) == (128, 128, 128)


def test_a_turned_image_is_painted_on_as_it_is_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    out = io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(out, "JPEG", exif=exif)
    file = openraster.write(out.getvalue(), grey((1, 2, 4, 5)))
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert {Image.open(io.BytesIO(archive.read(f"data/{name}.png"))).size for name in ("mask", "image")} == {SIZE}
    assert boxes(openraster.read_mask(file)) == (1, 2, 4, 5)


def test_nothing_painted_is_no_mask() -> None:
    assert openraster.read_mask(openraster.write(png(Image.new("RGB", SIZE)), None)) is None


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "OPENRASTER_UNREADABLE"),
        (png(Image.new("RGB", SIZE)), "OPENRASTER_UNREADABLE"),
        (
            openraster.write(png(Image.new("RGB", SIZE)), None).replace(b'name="mask"', b'name="xxxx"'),
            "OPENRASTER_UNREADABLE",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(file: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        openraster.read_mask(file)
    assert refused.value.reason == reason


def test_a_file_without_the_mask_s_layer_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("stack.xml", '<image w="12" h="9"><stack><layer name="paint" src="x"/></stack></image>')
    with pytest.raises(InvalidInput) as refused:
        openraster.read_mask(out.getvalue())
    assert refused.value.reason == "MASK_LAYER_MISSING"


async def test_what_a_program_paints_is_taken_back_when_it_closes(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    found = frame(png(Image.new("RGB", SIZE, "gray")))
    assert boxes(await edit(f"{sys.executable} {script}", found, None)) == (7, 5, 11, 8)
    assert boxes(await edit(f"{sys.executable} {script} {{}}", found, grey((1, 2, 4, 5)))) == (1, 2, 11, 8)


async def test_a_program_that_fails_or_is_missing_is_named() -> None:
    found = frame(png(Image.new("RGB", SIZE)))
    with pytest.raises(SourceError, match="can't be started"):
        await edit("no-such-program", found, None)
    with pytest.raises(SourceError, match="ended with code 1"):
        await edit("false", found, None)
