"""Client to ReductStore through real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vigil_client import Frame, Result, VigilClient, Visualization, WaitFor
from vigil_common.bundle import Runtime, digest, open_bundle
from vigil_trainer import import_export

from tests.support.cells import load_cells
from tests.support.platform import MODEL, platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXPORTS = Path(os.environ.get("VIGIL_TEST_MODELS", "models"))
TRITON = Path(__file__).parent / "triton_client.py"


async def test_every_streamed_image_gets_a_verdict_and_is_stored_with_its_labels(tmp_path: Path) -> None:
    cells = load_cells()
    images = cells.normal[:20] + cells.defective[:20]
    async with platform(tmp_path) as vigil:
        frames = [
            Frame(image, MODEL, camera=f"c{index % 3}", labels={"line": "a"}) for index, image in enumerate(images)
        ]
        async with VigilClient(vigil.stack.ingest_address) as client:
            results = {result.frame_id: result async for result in client.stream(frames)}
        await vigil.settled()
        assert await vigil.stored() == dict.fromkeys(results, 1)
        for frame in frames[:5]:
            stored, image = await vigil.storage.frames_get(MODEL, frame.frame_id)
            verdict = results[frame.frame_id].verdict
            assert verdict is not None
            assert image == frame.image
            assert stored.labels["line"] == "a"
            assert stored.labels["camera"] == frame.camera
            assert stored.labels["digest"] == verdict.digest
            assert float(stored.labels["score"]) == pytest.approx(verdict.score, abs=1e-6)
            assert stored.labels["anomalous"] == str(verdict.anomalous).lower()
            assert int(stored.labels["latency_us"]) > 0


async def test_pictures_come_on_request_and_a_truncated_image_is_answered_and_kept(tmp_path: Path) -> None:
    image = load_cells().defective[0]
    async with platform(tmp_path) as vigil, VigilClient(vigil.stack.ingest_address) as client:
        full = Frame(image, MODEL, visualization=Visualization.FULL, anomaly_map=True, mask=True)
        verdict = (await client.submit(full)).verdict
        assert verdict is not None
        for picture in (verdict.visualization, verdict.anomaly_map, verdict.mask):
            assert picture is not None
            assert picture.startswith(b"\x89PNG")
        broken = Frame(image[: len(image) // 2], MODEL)
        result = await client.submit(broken)
        assert result.error is not None
        assert (result.error.code, result.error.reason) == ("INVALID_ARGUMENT", "IMAGE_TRUNCATED")
        await vigil.settled()
        stored, body = await vigil.storage.frames_get(MODEL, broken.frame_id)
        assert body == broken.image
        assert stored.labels["reason"] == "IMAGE_TRUNCATED"


async def test_a_stranger_infers_with_the_open_inference_protocol(tmp_path: Path) -> None:
    path = tmp_path / "cell.png"
    path.write_bytes(load_cells().defective[0])
    async with platform(tmp_path) as vigil:
        # `uv run` says where it is: on a fresh machine it is not on the path.
        command = [os.environ.get("UV", "uv"), "run", "--no-project", "--python", sys.executable, str(TRITON)]
        process = await asyncio.create_subprocess_exec(
            *command, vigil.stack.ingest_address, MODEL, str(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode() + vigil.logs()
        assert out.decode().startswith("score=")


@pytest.mark.skipif(not EXPORTS.is_dir(), reason="VIGIL_TEST_MODELS names no folder of Anomalib exports")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("export", ["elpv-stfpm", "elpv-patchcore"])
async def test_real_exports_judge_through_the_whole_path_as_their_runtime_does(
    tmp_path: Path, export: str, engine: Runtime
) -> None:
    images = load_cells().test_images[:12]
    bundle = import_export(EXPORTS / export, name=MODEL, parity_images=[])
    expected = direct_scores(bundle, engine, images)
    async with platform(tmp_path, bundle=bundle, ENGINE=engine) as vigil:
        frames = [Frame(image, MODEL) for image in images]
        async with VigilClient(vigil.stack.ingest_address) as client:
            results = {result.frame_id: result async for result in client.stream(frames)}
    for frame, score in zip(frames, expected, strict=True):
        verdict = results[frame.frame_id].verdict
        assert verdict is not None
        assert verdict.digest == digest(bundle)
        assert verdict.score == pytest.approx(score, abs=1e-4)


def direct_scores(bundle: bytes, engine: Runtime, images: list[bytes]) -> list[float]:
    """The same runtime on the same files, without any of our code between."""
    import io  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    opened = open_bundle(bundle)
    batch = opened.manifest.fixed_batch or 1
    tensors = [
        np.repeat(
            np.asarray(Image.open(io.BytesIO(i)).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255, batch, 0
        )
        for i in images
    ]
    with tempfile.TemporaryDirectory() as name:
        opened.extract(Path(name))
        path = str(Path(name) / opened.manifest.artefacts[engine].path)
        if engine == "onnxruntime":
            import onnxruntime  # noqa: PLC0415

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return [float(session.run(["pred_score"], {"input": t})[0].reshape(-1)[0]) for t in tensors]
        import openvino  # noqa: PLC0415

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return [float(compiled(t)["pred_score"].reshape(-1)[0]) for t in tensors]


async def test_with_storage_stopped_the_queue_stays_in_its_budget_and_nothing_accepted_is_lost(tmp_path: Path) -> None:
    budget = 8 << 20
    cells = load_cells()
    async with platform(tmp_path, QUEUE_BUDGET_BYTES=str(budget)) as vigil:
        await vigil.stack.stop("storage")
        async with VigilClient(vigil.stack.ingest_address, window=128, max_retry_s=0) as client:
            frames = (Frame(cells.test_images[index % 300], MODEL, camera=f"c{index % 4}") for index in range(20_000))
            accepted, refused, highest = [], set(), 0
            async for result in client.stream(frames, wait_for=WaitFor.ACCEPTED):
                if result.error is None:
                    accepted.append(result.frame_id)
                else:
                    refused.add((result.error.code, result.error.reason, result.error.retry_after_s is not None))
                if len(accepted) % 50 == 0:
                    highest = max(highest, (await vigil.streams.queue.depth(MODEL)).image_bytes)
        assert refused == {("RESOURCE_EXHAUSTED", "QUEUE_FULL", True)}
        assert 0 < highest <= budget
        await vigil.stack.start("storage")
        await vigil.settled(120)
        assert await vigil.stored() == dict.fromkeys(accepted, 1)


@pytest.mark.parametrize("part", ["ingest", "worker", "storage", "valkey", "reductstore"])
async def test_killed_ten_times_in_mid_stream_every_accepted_frame_is_stored_once(tmp_path: Path, part: str) -> None:
    images = load_cells().test_images
    async with platform(tmp_path) as vigil:
        if part == "reductstore" and not vigil.stack.store_url.startswith("http"):
            pytest.skip("the embedded store is no process")
        name = vigil.worker if part == "worker" else part
        ended = asyncio.Event()
        accepted: list[str] = []
        errors: list[Result] = []

        async def frames() -> AsyncIterator[Frame]:
            index = 0
            while not ended.is_set():
                yield Frame(images[index % 300], MODEL, camera=f"c{index % 4}")
                index += 1
                await asyncio.sleep(0.02)

        async def kill() -> None:
            for _ in range(10):
                # Each kill falls into a stream that flows.
                goal, deadline = len(accepted) + 15, time.monotonic() + 30
                while len(accepted) < goal and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
                vigil.stack.kill(name)
                await vigil.stack.start(name)
            ended.set()

        killer = asyncio.create_task(kill())
        async with VigilClient(vigil.stack.ingest_address, max_retry_s=60) as client:
            async for result in client.stream(frames(), wait_for=WaitFor.ACCEPTED):
                if result.error is None:
                    accepted.append(result.frame_id)
                else:
                    errors.append(result)
        await killer
        await vigil.settled(120)
        stored = await vigil.stored()
        missing = set(accepted) - stored.keys()
        assert not errors
        assert not missing, vigil.logs()
        assert set(stored.values()) == {1}
        assert len(accepted) >= 150
