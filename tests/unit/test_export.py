"""Exports: what trainers read, paired as they pair it, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from vigil_cli.export import Format, run_lengths, write_export
from vigil_cli.sources import SourceError
from vigil_client import Annotation, HumanLabel, ReviewedFrame, StoredFrame
from vigil_common.pixels import decode

from tests.support.anomalib import anomalib_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

T0 = datetime(2026, 11, 24, tzinfo=UTC)
HAZELNUTS = os.environ.get("VIGIL_TEST_HAZELNUTS")


def check_sums(root: Path) -> None:
    """As anybody would, with a program that is not ours."""
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=root, check=True)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def frame(
    name: str, label: HumanLabel, image: bytes, mask: bytes | None = None, *, kind: str = "image/png", at: int = 0
) -> ReviewedFrame:
    width, height = Image.open(io.BytesIO(image)).size
    when = T0 + timedelta(seconds=at)
    before = Annotation("a0", HumanLabel.UNSURE, "Bob", when, "who knows")
    said = Annotation("a1", label, "Zoë", when, "", masked=mask is not None)
    stored = StoredFrame(name, "cells", "cam1", when, when, kind, width, height, len(image), {}, None, "", said)
    return ReviewedFrame(stored, image, (before, said), mask)


async def given(frames: Sequence[ReviewedFrame]) -> AsyncIterator[ReviewedFrame]:
    for one in frames:
        yield one


def samples() -> list[ReviewedFrame]:
    images = [np.full((6, 8, 3), shade, np.uint8) for shade in range(6)]
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5] = 255
    masks = [np.roll(mask, step, axis=1) for step in range(3)]
    # Ids and suffixes that would sort differently as images and as masks.
    return [
        frame("n1", HumanLabel.NORMAL, encoded(images[0])),
        frame("f1", HumanLabel.ANOMALOUS, encoded(images[1], "JPEG"), encoded(masks[0]), kind="image/jpeg"),
        frame("f1.k", HumanLabel.ANOMALOUS, encoded(images[2], "JPEG"), encoded(masks[1]), kind="image/jpeg"),
        frame("f1-2", HumanLabel.ANOMALOUS, encoded(images[3]), encoded(masks[2])),
        frame("a:b", HumanLabel.ANOMALOUS, encoded(images[4])),
        frame("n:2", HumanLabel.NORMAL, encoded(images[5])),
    ]


async def test_anomalib_pairs_every_image_with_its_own_mask(tmp_path: Path) -> None:
    frames = samples()
    summary = await write_export(given(frames), tmp_path / "out", Format.FOLDER, {"model": "cells"})
    assert (summary.normal, summary.masked, summary.unmasked) == (2, 3, 1)
    truth = {one.image: one.mask for one in frames}
    pairs = anomalib_folder(tmp_path / "out")
    assert [label for _, label, _ in pairs] == ["normal"] * 2 + ["abnormal"] * 3
    for image, label, mask in pairs:
        assert truth[image.read_bytes()] == (mask.read_bytes() if mask else None)
        assert (label == "abnormal") == (mask is not None)
    (unmasked,) = (tmp_path / "out" / "abnormal_unmasked").iterdir()
    assert unmasked.read_bytes() == frames[4].image


async def test_sixteen_bits_are_written_as_models_see_them_for_who_reads_eight(tmp_path: Path) -> None:
    steps = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    deep = frame("deep", HumanLabel.NORMAL, encoded(steps))
    root = tmp_path / "out"
    await write_export(given([deep]), root, Format.FOLDER, {})
    check_sums(root)
    (entry,) = json.loads((root / "manifest.json").read_text())["files"]
    assert entry["turned_from"]["sha256"] == hashlib.sha256(deep.image).hexdigest()
    # As Anomalib's `read_image` does.
    image = np.asarray(Image.open(root / entry["path"]).convert("RGB"))
    assert (image == decode(deep.image, max_pixels=48)[..., None]).all()


async def test_what_became_unsure_or_is_not_there_yet_is_left_out(tmp_path: Path) -> None:
    kept, image = samples()[:2], encoded(np.zeros((6, 8, 3), np.uint8))
    silent = replace(frame("later", HumanLabel.NORMAL, image), annotations=())
    frames = [frame("doubt", HumanLabel.UNSURE, image), *kept, silent]
    summary = await write_export(given(frames), tmp_path / "out", Format.FOLDER, {})
    assert (summary.normal, summary.masked, summary.unmasked) == (1, 1, 0)


@pytest.mark.parametrize("form", Format)
async def test_a_turned_image_lies_under_its_mask_for_who_reads_no_exif(tmp_path: Path, form: Format) -> None:
    shown = Image.new("RGB", (40, 60), "gray")
    shown.paste("white", (2, 3, 14, 23))
    mask = Image.new("L", shown.size)
    mask.paste(255, (2, 3, 14, 23))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    shown.transpose(Image.Transpose.ROTATE_90).save(stored, "JPEG", exif=exif, quality=95)
    turned = frame("t", HumanLabel.ANOMALOUS, stored.getvalue(), encoded(np.asarray(mask)), kind="image/jpeg")
    others = samples()[:2]
    root = tmp_path / "out"
    await write_export(given([*others, turned]), root, form, {})
    check_sums(root)
    entry = next(one for one in json.loads((root / "manifest.json").read_text())["files"] if one["frame_id"] == "t")
    assert entry["turned_from"]["sha256"] == hashlib.sha256(stored.getvalue()).hexdigest()
    # As Anomalib's `read_image` does.
    image = np.asarray(Image.open(root / entry["path"]).convert("RGB"))
    marked = np.asarray(Image.open(root / entry["mask"]).convert("L")) > 0
    assert image.shape[:2] == marked.shape == (60, 40)
    assert image[marked].mean() > 240
    assert image[~marked].mean() < 140
    assert not Image.open(root / entry["path"]).getexif()
    if form is Format.FOLDER:
        assert [mask.name for _, _, mask in anomalib_folder(root) if mask][-1] == Path(entry["mask"]).name
    else:
        described = json.loads((root / "annotations.json").read_text())
        assert described["annotations"][-1]["segmentation"]["size"] == [60, 40]


async def test_without_any_mask_all_anomalous_images_stand_in_abnormal(tmp_path: Path) -> None:
    frames = [samples()[0], samples()[4]]
    await write_export(given(frames), tmp_path / "out", Format.FOLDER, {})
    assert [(path.read_bytes(), label, mask) for path, label, mask in anomalib_folder(tmp_path / "out")] == [
        (frames[0].image, "normal", None),
        (frames[1].image, "abnormal", None),
    ]
    check_sums(tmp_path / "out")


@pytest.mark.parametrize("form", Format)
async def test_every_file_has_its_checksum_and_its_story(tmp_path: Path, form: Format) -> None:
    await write_export(given(samples()), tmp_path / "out", form, {"model": "cells", "since": None})
    root = tmp_path / "out"
    check_sums(root)
    listed = {line.split("  ", 1)[1] for line in (root / "SHA256SUMS").read_text().splitlines()}
    present = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert present == listed | {"SHA256SUMS"}
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["asked"] == {"model": "cells", "since": None}
    assert {one["path"] for one in manifest["files"]} | {one["mask"] for one in manifest["files"] if "mask" in one} == (
        present - {"SHA256SUMS", "manifest.json", "annotations.json"}
    )
    first = manifest["files"][0]
    assert (first["frame_id"], first["camera"], first["label"]) == ("n1", "cam1", "normal")
    assert [(said["author"], said["note"]) for said in first["annotations"]] == [("Bob", "who knows"), ("Zoë", "")]
    assert first["sha256"] == hashlib.sha256(samples()[0].image).hexdigest()


async def test_coco_regions_are_the_masks(tmp_path: Path) -> None:
    frames = samples()
    await write_export(given(frames), tmp_path / "out", Format.COCO, {})
    document = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [image["label"] for image in document["images"]] == ["normal", *["anomalous"] * 4, "normal"]
    names = {image["id"]: image["file_name"] for image in document["images"]}
    assert len(document["annotations"]) == 3
    for region, reviewed in zip(document["annotations"], frames[1:4], strict=True):
        assert (tmp_path / "out" / names[region["image_id"]]).read_bytes() == reviewed.image
        height, width = region["segmentation"]["size"]
        flat: list[bool] = []
        for turn, count in enumerate(region["segmentation"]["counts"]):
            flat += [bool(turn % 2)] * count
        assert reviewed.mask
        truth = np.asarray(Image.open(io.BytesIO(reviewed.mask))) > 0
        assert (np.array(flat).reshape((height, width), order="F") == truth).all()
        assert not region["iscrowd"]  # else trainers leave it out
        left, top, wide, high = region["bbox"]
        assert truth[top : top + high, left : left + wide].sum() == truth.sum() == region["area"]


def test_run_lengths_begin_with_what_is_not_marked() -> None:
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


async def test_a_full_disk_leaves_no_half_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(_: int) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("vigil_cli.export.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        await write_export(given(samples()), tmp_path / "out", Format.FOLDER, {})
    assert list(tmp_path.iterdir()) == []


async def test_a_connection_lost_in_the_middle_leaves_no_half_export(tmp_path: Path) -> None:
    async def lost() -> AsyncIterator[ReviewedFrame]:
        yield samples()[0]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await write_export(lost(), tmp_path / "out", Format.FOLDER, {})
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SourceError, match="holds something"):
        await write_export(given(samples()), tmp_path, Format.FOLDER, {})
    with pytest.raises(SourceError, match="nothing to export"):
        await write_export(given([]), tmp_path / "out", Format.FOLDER, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(not HAZELNUTS, reason="VIGIL_TEST_HAZELNUTS names no copy of the hazelnut_toy data set")
async def test_a_hundred_hazelnuts_and_masks_are_paired(tmp_path: Path) -> None:
    root = Path(HAZELNUTS or "")
    frames = []
    for turn in range(2):
        good = sorted((root / "good").iterdir())
        frames += [
            frame(f"{path.stem}-{turn}", HumanLabel.NORMAL, path.read_bytes(), kind="image/jpeg") for path in good
        ]
        for path in sorted((root / "defect").iterdir()):
            drawn = (root / "mask" / f"{path.stem}.png").read_bytes()
            frames.append(
                frame(f"{path.stem}-{turn}", HumanLabel.ANOMALOUS, path.read_bytes(), drawn, kind="image/jpeg")
            )
    await write_export(given(frames), tmp_path / "out", Format.FOLDER, {})
    pairs = anomalib_folder(tmp_path / "out")
    assert len(pairs) == len(frames) >= 100
    truth = {one.frame.frame_id: (one.image, one.mask) for one in frames}
    for image, _, mask in pairs:
        expected = truth[image.stem.partition("_")[2]]
        assert (image.read_bytes(), mask.read_bytes() if mask else None) == expected
