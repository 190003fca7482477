"""Commands of people who review, before a real storage."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vigil_common.store.ports import ModelInfo

from tests.support.review import PLACE, M, Site, form_of, image, labels, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


async def vigil(site: Site, *words: str) -> tuple[int | None, str]:
    where = ("--storage-address", f"127.0.0.1:{site.storage.port}", "--token", site.tokens["Ann"])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vigil_cli", *words, *where),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TZ": "Asia/Tokyo", "COLUMNS": "120"},
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def annotate(site: Site, *words: str) -> str:
    code, said = await vigil(site, "annotate", "f1", "-m", M, *words)
    assert code == 0
    return said


async def test_the_mask_that_stands_outlives_a_label_without_one_until_somebody_says_otherwise(
    site: Site, tmp_path: Path
) -> None:
    await site.frames.write([record(1)])
    mask = tmp_path / "mask.png"
    mask.write_bytes(image(fill=255))
    assert ", with a mask," in await annotate(site, "--label", "anomalous", "--mask", str(mask))
    assert ", with the mask that stood," in await annotate(site, "--label", "anomalous")
    assert (await labels(site, "f1"))["human_mask"] == "true"
    client = await site.logged_in()
    form = {"label": "unsure", **await form_of(client, PLACE)}
    assert (await client.post(PLACE, data=form)).status == 200  # as without the script
    assert (await labels(site, "f1"))["human_mask"] == "true"
    assert "mask" not in await annotate(site, "--label", "anomalous", "--no-mask")
    assert (await labels(site, "f1"))["human_mask"] == "false"


async def test_a_frame_without_a_mask_is_shown_and_saved_before_that_is_said(site: Site, tmp_path: Path) -> None:
    await site.frames.write([record(1)])
    saved, mask = tmp_path / "image.png", tmp_path / "mask.png"
    code, said = await vigil(site, "frames", "get", M, "f1", "-o", str(saved), "--mask", str(mask))
    assert code == 1
    assert json.loads(said)["frame_id"] == "f1"
    assert saved.read_bytes() == record(1).body
    assert not mask.exists()


async def test_models_are_listed_with_local_times_as_frames_are(site: Site) -> None:
    at = datetime(2026, 1, 1, 20, 30, tzinfo=UTC)
    info = ModelInfo(
        name=M,
        version=1,
        digest=f"sha256:{1:064}",
        size_bytes=3,
        formats=("onnxruntime",),
        published_at_us=int(at.timestamp()) * 1_000_000,
        manifest=f"name: {M}\n",
        published_by="trainer",
    )

    async def bundle() -> AsyncIterator[bytes]:
        yield b"tar"

    await site.models.upload(M, info.digest, 3, bundle())
    await site.models.publish(info)
    code, said = await vigil(site, "model", "list")
    assert code == 0
    assert "2026-01-02 05:30" in said
