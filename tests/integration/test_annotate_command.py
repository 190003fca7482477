"""`vigil annotate` before a real storage."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.review import M, Site, form_of, image, labels, record, review_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PLACE = f"/m/{M}/f/line-1/f1"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with review_site(tmp_path) as found:
        yield found


async def annotate(site: Site, *words: str) -> str:
    where = ("--storage-address", f"127.0.0.1:{site.storage.port}", "--token", site.tokens["Ann"])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vigil_cli", "annotate", "f1", "-m", M, *words, *where),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode()


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
