"""Image and mask as layers for GIMP 2, whose OpenRaster plug-in needs Python 2, which systems no longer bring.

GIMP makes its own XCF of two PNG files before, and takes the layer out of it afterwards, each without a window.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from typing import TYPE_CHECKING

from PIL import Image
from vigil_common.errors import InvalidInput

from vigil_cli import openraster
from vigil_cli.sources import SourceError

if TYPE_CHECKING:
    from pathlib import Path

_HEADLESS = ("gimp", "--new-instance", "--no-interface", "--no-data", "--no-fonts")
_BATCH_S = 120.0
_VERSION = re.compile(rb"\bversion (\d+)\.")
_MAKE = """
(let* ((image (car (gimp-file-load RUN-NONINTERACTIVE {image} {image})))
       (layer (car (gimp-file-load-layer RUN-NONINTERACTIVE image {mask}))))
  (gimp-item-set-name layer {name})
  (gimp-image-insert-layer image layer 0 0)
  (gimp-layer-set-opacity layer 50)
  (gimp-image-set-active-layer image layer)
  (gimp-xcf-save RUN-NONINTERACTIVE image layer {xcf} {xcf}))
"""
_TAKE = """
(let* ((image (car (gimp-file-load RUN-NONINTERACTIVE {xcf} {xcf})))
       (layer (car (gimp-image-get-layer-by-name image {name}))))
  (gimp-layer-resize-to-image-size layer)
  (file-png-save RUN-NONINTERACTIVE image layer {mask} {mask} 0 1 0 0 0 0 0))
"""


async def is_second() -> bool:
    """Whether the GIMP here is of version 2; `SourceError` where there is none."""
    try:
        process = await asyncio.create_subprocess_exec("gimp", "--version", stdout=asyncio.subprocess.PIPE)
    except OSError as error:
        raise SourceError(f"gimp can't be started: {error.strerror}") from error
    said, _ = await process.communicate()
    found = _VERSION.search(said)
    return found is not None and int(found[1]) == 2  # noqa: PLR2004 - version 2


async def write(path: Path, image: bytes, mask: bytes | None) -> None:
    """Write an XCF with the layers of `openraster.write`.

    Raises:
        SourceError: Where GIMP does not do it.
        InvalidInput: Where the image can't be read.
    """
    picture, paint = await asyncio.to_thread(openraster.layers, image, mask)
    files = {"image": path.with_suffix(".image.png"), "mask": path.with_suffix(".paint.png")}
    await asyncio.to_thread(picture.save, files["image"])
    await asyncio.to_thread(paint.save, files["mask"])
    await _run(_MAKE, made=path, xcf=path, **files)


async def read_mask(path: Path) -> bytes | None:
    """The mask of an XCF that a person saved; as `openraster.read_mask`.

    Raises:
        InvalidInput: MASK_LAYER_MISSING.
        SourceError: Where GIMP can't be started, or does not end.
    """
    taken = path.with_suffix(".mask.png")
    try:
        await _run(_TAKE, made=taken, xcf=path, mask=taken)
    except FileNotFoundError as error:
        raise InvalidInput("MASK_LAYER_MISSING", openraster.MISSING) from error
    with Image.open(io.BytesIO(await asyncio.to_thread(taken.read_bytes))) as painted:
        return openraster.marked(painted.convert("RGBA").getchannel("A"))


async def _run(script: str, *, made: Path, **files: Path) -> None:
    """Have GIMP carry out a script; `FileNotFoundError` where it then has not made its file."""
    words = {name: json.dumps(str(file), ensure_ascii=False) for name, file in files.items()}
    command = script.format(name=json.dumps(openraster.MASK), **words).replace("\n", " ").strip()
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *_HEADLESS, "-b", command, "-b", "(gimp-quit 0)", stdout=quiet, stderr=quiet
    )
    try:
        async with asyncio.timeout(_BATCH_S):
            await process.wait()
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise SourceError(f"gimp did not end within {_BATCH_S:.0f} s") from error
    if not await asyncio.to_thread(made.exists):
        raise FileNotFoundError(made)
