"""`vigil export`: what people labelled, as folders that trainers read, with where each file comes from.

Anomalib's Folder data module (2.4.0dev, `data/datasets/image/folder.py` at 0aa3fc49) pairs the n-th abnormal image with
the n-th mask, both sorted by path, and then asks that the mask's stem holds the image's. So every name begins with a
number of fixed width, image and mask share it, and anomalous images without a mask stand in a folder of their own.

Masks lie over images as people see them. Anomalib reads an image as it is stored, whatever its EXIF data say of turning
it (`read_image` in data/utils/image.py at 35bbeaae: `Image.open(path).convert("RGB")`). So one that is to be turned is
written turned, as PNG without EXIF data; the manifest says so, and has the checksum of what is stored. Likewise one of
sixteen bits, which that conversion cuts off at 255, all but white, is written in eight, as the models here see it.
"""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from vigil_client import HumanLabel, ReviewedFrame, StorageClient

from vigil_cli.frames import said
from vigil_cli.options import DEFAULT_STORAGE, Since, StorageAddress, Token, Until, console, run
from vigil_cli.sources import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NORMAL, ABNORMAL, UNMASKED, MASKS, IMAGES = "normal", "abnormal", "abnormal_unmasked", "mask", "images"
MANIFEST, SUMS, COCO = "manifest.json", "SHA256SUMS", "annotations.json"
SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/bmp": ".bmp",
    "image/tiff": ".tiff",
    "image/webp": ".webp",
}
MAX_PIXELS = 100_000_000


class Format(Enum):
    """What reads it."""

    FOLDER = "folder"
    COCO = "coco"


@dataclass(frozen=True, slots=True)
class Summary:
    """What an export holds.

    Attributes:
        normal: Normal images.
        masked: Anomalous images with a mask.
        unmasked: Anomalous images without.
    """

    normal: int
    masked: int
    unmasked: int

    @property
    def images(self) -> int:
        """All of them."""
        return self.normal + self.masked + self.unmasked


def export(
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder that does not exist yet, or is empty.")],
    camera: Annotated[str | None, typer.Option(help="Only this camera.")] = None,
    since: Since = None,
    until: Until = None,
    form: Annotated[Format, typer.Option("--format", help="Anomalib's folders, or COCO.")] = Format.FOLDER,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Write the frames that people labelled normal or anomalous, with masks and provenance."""

    async def work() -> Summary:
        async with StorageClient(storage_address, token=token) as storage:
            frames = storage.frames_export(model, camera=camera, since=since, until=until, decided=True)
            asked = {"model": model, "camera": camera, "since": _iso(since), "until": _iso(until)}
            return await write_export(frames, output, form, asked)

    done = run(work())
    console.print(
        f"{output}: {done.images} images: {done.normal} normal, {done.masked} anomalous with a mask, "
        f"{done.unmasked} without",
        soft_wrap=True,
    )


async def write_export(
    frames: AsyncIterator[ReviewedFrame], output: Path, form: Format, asked: Mapping[str, object]
) -> Summary:
    """Write an export, whole or not at all.

    Args:
        frames: What people labelled.
        output: The folder; must be missing or empty.
        form: What shall read it.
        asked: What was asked for, for the manifest.

    Raises:
        SourceError: Where the folder holds something, or there is nothing to export.
        OSError: As on a full disk; nothing is left behind.
    """
    output = await asyncio.to_thread(_free, output)
    part = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.part")
    writing = _Writing(part, form, dict(asked))
    try:
        async for frame in frames:
            await asyncio.to_thread(writing.add, frame)
        summary = await asyncio.to_thread(writing.finish)
        await asyncio.to_thread(part.replace, output)  # which may be there, but is empty
    finally:
        await asyncio.to_thread(shutil.rmtree, part, ignore_errors=True)
    return summary


def _free(output: Path) -> Path:
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SourceError(f"{output} holds something already: name a folder that does not exist")
    return output


@dataclass(slots=True)
class _Writing:
    root: Path
    form: Format
    asked: dict[str, object]
    files: list[dict[str, Any]] = field(default_factory=list)
    sums: list[tuple[str, str]] = field(default_factory=list)
    coco_images: list[dict[str, Any]] = field(default_factory=list)
    coco_annotations: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {NORMAL: 0, ABNORMAL: 0, UNMASKED: 0})

    def add(self, found: ReviewedFrame) -> None:
        from vigil_common.pixels import as_shown  # noqa: PLC0415 - loads numpy, see below

        # Meanwhile somebody may have become unsure; what people said of a frame may also come after it.
        if not found.annotations or found.annotations[-1].label is HumanLabel.UNSURE:
            return
        frame, stands = found.frame, found.annotations[-1]
        number = len(self.coco_images) + 1
        stem = f"{number:06d}_{re.sub(r'[^A-Za-z0-9._-]', '_', frame.frame_id)}"
        kind = NORMAL if stands.label is HumanLabel.NORMAL else ABNORMAL if found.mask else UNMASKED
        self.counts[kind] += 1
        folder = kind if self.form is Format.FOLDER else IMAGES
        body, suffix = found.image, SUFFIXES.get(frame.content_type, ".img")
        turned = as_shown(found.image, max_pixels=MAX_PIXELS)
        if turned is not None:
            body, suffix = turned, ".png"
        image = f"{folder}/{stem}{suffix}"
        entry: dict[str, Any] = {
            "path": image,
            "sha256": self._write(image, body),
            "bytes": len(body),
            "label": stands.label.value,
            "frame_id": frame.frame_id,
            "camera": frame.camera,
            "captured_at": frame.captured_at.isoformat(),
            "annotations": [said(one) for one in found.annotations],
        }
        if turned is not None:
            entry["turned_from"] = {
                "content_type": frame.content_type,
                "sha256": hashlib.sha256(found.image).hexdigest(),
                "bytes": len(found.image),
            }
        if frame.verdict is not None:
            judged = frame.verdict
            entry["verdict"] = {"version": judged.version, "digest": judged.digest, "score": judged.score}
        if found.mask and kind == ABNORMAL:
            mask = f"{MASKS}/{stem}.png"
            entry |= {"mask": mask, "mask_sha256": self._write(mask, found.mask)}
            self._add_coco_mask(number, found.mask)
        self.files.append(entry)
        size = {"width": frame.width, "height": frame.height}
        self.coco_images.append(
            {
                "id": number,
                "file_name": image,
                **size,
                "date_captured": frame.captured_at.isoformat(),
                "label": stands.label.value,
            }
        )

    def _add_coco_mask(self, number: int, mask: bytes) -> None:
        import numpy as np  # noqa: PLC0415 - takes as long to load as all else here

        with Image.open(io.BytesIO(mask)) as image:
            marked = np.asarray(image) > 0
        rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        self.coco_annotations.append(
            {
                "id": len(self.coco_annotations) + 1,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,  # run lengths or not: trainers leave crowds out, and COCO's evaluation ignores them
                "area": int(marked.sum()),
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
                "segmentation": {"size": list(marked.shape), "counts": run_lengths(marked)},
            }
        )

    def finish(self) -> Summary:
        if not self.files:
            raise SourceError("nobody has labelled such frames normal or anomalous yet: there is nothing to export")
        if self.form is Format.FOLDER and not self.counts[ABNORMAL] and self.counts[UNMASKED]:
            self._rename(UNMASKED, ABNORMAL)
        if self.form is Format.COCO:
            document = {
                "info": {"description": "Vigil export", "date_created": datetime.now(UTC).isoformat()},
                "licenses": [],
                "categories": [{"id": 1, "name": "anomaly", "supercategory": "anomaly"}],
                "images": self.coco_images,
                "annotations": self.coco_annotations,
            }
            self._write(COCO, json.dumps(document).encode())
        manifest = {
            "format": "vigil-export/1",
            "layout": self.form.value,
            "exported_at": datetime.now(UTC).isoformat(),
            "asked": self.asked,
            "counts": self.counts,
            "files": self.files,
        }
        self._write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        self._write(SUMS, "".join(f"{digest}  {path}\n" for path, digest in self.sums).encode())
        return Summary(self.counts[NORMAL], self.counts[ABNORMAL], self.counts[UNMASKED])

    def _rename(self, old: str, new: str) -> None:
        """Without any mask there is nothing to pair: all anomalous images stand where trainers look for them."""
        (self.root / old).rename(self.root / new)

        def moved(path: str) -> str:
            return path.replace(f"{old}/", f"{new}/", 1)

        self.files = [{**one, "path": moved(one["path"])} for one in self.files]
        self.sums = [(moved(path), digest) for path, digest in self.sums]

    def _write(self, name: str, body: bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(body).hexdigest()
        self.sums.append((name, digest))
        return digest


def run_lengths(marked: "NDArray[np.bool_]") -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with how many are not marked."""
    import numpy as np  # noqa: PLC0415 - see above

    flat = np.concatenate([[False], marked.flatten(order="F")])
    edges = np.flatnonzero(np.diff(flat)).tolist()
    return [stop - start for start, stop in zip([0, *edges], [*edges, marked.size], strict=True)]


def _iso(time: datetime | None) -> str | None:
    return time.isoformat() if time else None
