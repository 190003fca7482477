"""Image and mask as the layers of one OpenRaster file, which GIMP, Krita and MyPaint open and save.

The mask is a layer named "mask" over the image: what is painted there, in whatever colour, is anomalous; what is
transparent is not. Programs save layers cut to what is painted, with an offset.
"""

from __future__ import annotations

import io
import zipfile
from xml.etree import ElementTree as ET

from PIL import Image
from vigil_common.errors import InvalidInput
from vigil_common.pixels import decode

MASK, IMAGE = "mask", "image"
MISSING = f'no layer is named "{MASK}": paint on that one, and keep it'
COLOUR = (255, 40, 40)
HALF = 128
MAX_PIXELS = 100_000_000
THUMBNAIL = (256, 256)


def layers(image: bytes, mask: bytes | None) -> tuple[Image.Image, Image.Image]:
    """The image in RGB, and the paint that lies over it in RGBA; see `write`."""
    picture = Image.fromarray(decode(image, max_pixels=MAX_PIXELS)).convert("RGB")
    paint = Image.new("RGBA", picture.size, (*COLOUR, 0))
    if mask:
        with Image.open(io.BytesIO(mask)) as drawn:
            paint.putalpha(drawn.convert("L").resize(picture.size, Image.Resampling.NEAREST))
    return picture, paint


def write(image: bytes, mask: bytes | None) -> bytes:
    """An OpenRaster file.

    Args:
        image: Encoded, in any format that is read here; it stands there as people see it, turned as its EXIF data say.
        mask: Grey PNG of that size, white where it is anomalous; None for an empty layer.

    Raises:
        InvalidInput: As `vigil_common.pixels.decode`.
    """
    picture, paint = layers(image, mask)
    width, height = picture.size
    stack = ET.Element("image", {"version": "0.0.3", "w": str(width), "h": str(height)})
    tree = ET.SubElement(stack, "stack")
    for name, opacity in ((MASK, "0.5"), (IMAGE, "1.0")):
        ET.SubElement(tree, "layer", {"name": name, "src": f"data/{name}.png", "x": "0", "y": "0", "opacity": opacity})
    thumbnail = picture.copy()
    thumbnail.thumbnail(THUMBNAIL)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        # First and not compressed, so that the kind is known by the first bytes.
        archive.writestr("mimetype", "image/openraster")
        archive.writestr("stack.xml", ET.tostring(stack, "utf-8", xml_declaration=True))
        archive.writestr(f"data/{MASK}.png", _png(paint))
        archive.writestr(f"data/{IMAGE}.png", _png(picture))
        archive.writestr("mergedimage.png", _png(picture))
        archive.writestr("Thumbnails/thumbnail.png", _png(thumbnail))
    return out.getvalue()


def read_mask(file: bytes) -> bytes | None:
    """The mask of a file that a program saved, as grey PNG of the image's size; None where nothing is painted.

    Raises:
        InvalidInput: OPENRASTER_UNREADABLE, MASK_LAYER_MISSING.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            # Written a moment ago by the user's own program.
            root = ET.fromstring(archive.read("stack.xml"))  # noqa: S314
            size = int(root.attrib["w"]), int(root.attrib["h"])
            found = [layer for layer in root.iter("layer") if layer.get("name", "").strip().lower() == MASK]
            if not found:
                raise InvalidInput("MASK_LAYER_MISSING", MISSING)
            canvas = Image.new("L", size)
            for layer in found:
                with Image.open(io.BytesIO(archive.read(layer.attrib["src"]))) as painted:
                    alpha = painted.convert("RGBA").getchannel("A")
                canvas.paste(alpha, (_offset(layer, "x"), _offset(layer, "y")))
    except (zipfile.BadZipFile, ET.ParseError, KeyError, ValueError, OSError) as error:
        raise InvalidInput("OPENRASTER_UNREADABLE", f"the file saved is no OpenRaster image ({error})") from error
    return marked(canvas)


def marked(alpha: Image.Image) -> bytes | None:
    """What is painted more opaque than not, as grey PNG; None where nothing is."""
    mask = alpha.point([0] * HALF + [255] * (256 - HALF))
    return _png(mask) if mask.getbbox() else None


def _offset(layer: ET.Element, name: str) -> int:
    return round(float(layer.get(name, "0")))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
