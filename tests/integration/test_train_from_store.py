"""What people said of stored frames becomes the next version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from typer.testing import CliRunner
from vigil_cli.main import app
from vigil_client import Frame, HumanLabel, VigilClient
from vigil_common.bundle import read_manifest

from tests.support.cells import load_cells
from tests.support.platform import MODEL, platform

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_model_is_trained_on_what_people_reviewed_and_published_as_the_next_version(tmp_path: Path) -> None:
    cells = load_cells()
    images = {False: cells.normal[:8], True: cells.defective[:3]}
    frames = {
        frame.frame_id: (frame, anomalous)
        for anomalous, some in images.items()
        for frame in (Frame(image, MODEL, camera="c1") for image in some)
    }
    output = tmp_path / "next.tar"
    async with platform(tmp_path) as running:
        async with VigilClient(running.stack.ingest_address) as client:
            results = [result async for result in client.stream([frame for frame, _ in frames.values()])]
        assert not any(result.error for result in results)
        await running.settled()
        for frame_id, (_, anomalous) in frames.items():
            label = HumanLabel.ANOMALOUS if anomalous else HumanLabel.NORMAL
            await running.storage.frames_annotate(MODEL, frame_id, label, author="ada", camera="c1")
        words = ["train", "--from-store", "-m", MODEL, "--storage-address", running.stack.storage_address]
        trained = await asyncio.to_thread(CliRunner().invoke, app, [*words, "-o", str(output)])
        assert trained.exit_code == 0, trained.output
        assert "8 normal and 3 anomalous images, 0 masks, AUROC" in trained.output
        model = await running.storage.models_publish(output)
        assert (model.name, model.version, model.created) == (MODEL, 2, True)
    lineage = read_manifest(output.read_bytes()).lineage
    assert lineage["source"] == {"from_store": True, "reviewed": 11}
    assert lineage["images"] == {"normal": 8, "abnormal": 3, "masks": 0}
