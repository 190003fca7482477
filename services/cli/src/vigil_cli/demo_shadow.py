"""`vigil demo-shadow`: a good candidate, a broken one and too few frames, beside the same live version.

The broken candidate is the good one with its scores turned round: what a swapped class or a wrong export does.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from typing import TYPE_CHECKING

import onnx
import typer
from vigil_client import Frame, RouteClient, StorageClient, VigilClient
from vigil_common.bundle import open_bundle, pack

from vigil_cli.demo import mono_cells, split_cells, told
from vigil_cli.local import LocalStack
from vigil_cli.models import make_live
from vigil_cli.options import console, errors
from vigil_cli.shadow import gates_of, show, stored_images
from vigil_cli.shadow_client import ShadowClient
from vigil_cli.shadow_html import PICTURES, write_html
from vigil_cli.shadow_lines import OUTCOMES
from vigil_cli.stream import progress_bar

if TYPE_CHECKING:
    from pathlib import Path

    from vigil.shadow.v1 import shadow_pb2
    from vigil_client import Model

MODEL = "solar-cells"
FRAMES, FEW = 600, 20
_FIRST_IMAGES = 300
_WINDOW = 16
_SETTLED_S = 120.0
# What a release of this model would ask, but for the time: ten minutes are too long for a demo.
_GATES = {
    "min_frames": 200,
    "min_anomalous": 20,
    "min_duration_s": 3,
    "max_flip_fraction": 0.05,
    "max_new_misses": 0.1,
    "max_latency_ratio": 2,
    "max_error_fraction": 0.01,
}


def inverted(bundle: bytes) -> bytes:
    """The bundle with the score turned round: 1 less what it was."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    path = manifest.artefacts["onnxruntime"].path
    model = onnx.load_from_string(opened.files[path])
    score, before = manifest.outputs.score, f"{manifest.outputs.score}_before"
    for node in model.graph.node:
        node.output[:] = [before if name == score else name for name in node.output]
        node.input[:] = [before if name == score else name for name in node.input]
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    model.graph.initializer.append(one)
    model.graph.node.append(onnx.helper.make_node("Sub", ["one", before], [score]))
    parity = tuple(sample.model_copy(update={"score": 1 - sample.score}) for sample in manifest.parity)
    changed = manifest.model_copy(update={"parity": parity})
    files = {name: data for name, data in opened.files.items() if name != "vigil.yaml"}
    return pack(changed, {**files, path: model.SerializeToString()})


async def run_demo_shadow(out: Path) -> int:
    """Run it all.

    Args:
        out: Gets the platform's data and logs, and the reports.

    Returns:
        The exit code: 0 where the good candidate passes, the broken one fails, the few are inconclusive, and live lost
        no frame.
    """
    return await told(_demo(out))


async def _demo(out: Path) -> int:
    from vigil_trainer import train  # noqa: PLC0415 - loads the runtimes

    learned = split_cells().train
    bundles: list[bytes] = []
    for images in (learned[:_FIRST_IMAGES], learned):
        with console.status(f"training on {len(images)} normal cells"):
            trained = await asyncio.to_thread(train, images, name=MODEL)
        console.print(f"version {len(bundles) + 1}: trained on {len(images)} normal cells in {trained.fit_s:.1f} s")
        bundles.append(trained.bundle)
    bundles.append(inverted(bundles[1]))
    seen = set(learned)
    cells = sorted(path for path, _ in mono_cells() if path not in seen)
    random.Random(0).shuffle(cells)  # noqa: S311 - a reproducible order, no secret
    platform = out / "platform"
    shutil.rmtree(platform, ignore_errors=True)
    async with LocalStack(platform, log=lambda text: console.print(text, soft_wrap=True)) as stack:
        async with StorageClient(stack.storage_address) as storage:
            live, good, broken = [await storage.models_publish(bundle) for bundle in bundles]
        await make_live(stack.storage_address, MODEL, live.version)
        await stack.add_worker(MODEL, live.version)
        demo = _Demo(stack, out, cells)
        outcomes = [
            await demo.compare("good", good, FRAMES),
            await demo.compare("broken", broken, FRAMES),
            await demo.compare("few", good, FEW),
        ]
        lost = await demo.lost()
    typer.echo(f"shadow: good={outcomes[0]} broken={outcomes[1]} few={outcomes[2]} live_lost={lost}")
    return 0 if (*outcomes, lost) == ("pass", "fail", "inconclusive", 0) else 1


class _Demo:
    """Comparisons one after the other on one platform."""

    def __init__(self, stack: LocalStack, out: Path, cells: list[Path]) -> None:
        self._stack = stack
        self._out = out
        self._cells = cells
        self._sent: set[str] = set()

    async def compare(self, name: str, candidate: Model, count: int) -> str:
        """Stream so many cells past live and this candidate; what the gates say of it."""
        worker = await self._stack.add_worker(MODEL, candidate.version)
        async with RouteClient(self._stack.storage_address) as routes:
            route = await routes.start_comparison(MODEL, candidate.version)
        console.rule(f"{name}: version {route.candidate} beside live version {route.live}, {count} cells")
        await self._stream(count)
        async with ShadowClient(self._stack.shadow_address) as shadow:
            found = await _settled(shadow, count)
            show(found)
            path = self._out / f"{name}.html"
            worst = await shadow.disagreements(MODEL, limit=PICTURES)
        await self.lost()
        images = await stored_images(self._stack.storage_address, None, MODEL, worst)
        await asyncio.to_thread(write_html, path, found, worst, images)
        console.print(f"report: {path}", soft_wrap=True)
        async with RouteClient(self._stack.storage_address) as routes:
            await routes.stop_comparison(MODEL)
        await self._stack.stop(worker)
        return OUTCOMES[found.decision.overall]

    async def _stream(self, count: int) -> None:
        frames = [Frame(await asyncio.to_thread(path.read_bytes), MODEL, camera="demo") for path in self._cells[:count]]
        self._sent |= {frame.frame_id for frame in frames}
        async with VigilClient(self._stack.ingest_address, window=_WINDOW) as client:
            with progress_bar() as progress:
                task = progress.add_task("streaming", total=count)
                async for result in client.stream(frames):
                    progress.advance(task)
                    if result.error is not None:
                        errors.print(f"{result.frame_id}: {result.error.reason}: {result.error.message}")

    async def lost(self) -> int:
        """Frames of live that are not in the store with their verdict, once all are or time is up."""
        deadline = time.monotonic() + _SETTLED_S
        async with StorageClient(self._stack.storage_address) as storage:
            while True:
                found = {frame.frame_id async for frame in storage.frames_query(MODEL) if frame.verdict is not None}
                if self._sent <= found or time.monotonic() > deadline:
                    return len(self._sent - found)
                await asyncio.sleep(0.25)


async def _settled(shadow: ShadowClient, count: int) -> shadow_pb2.GetReportResponse:
    """The report once it has every frame, or time is up."""
    deadline = time.monotonic() + _SETTLED_S
    gates = gates_of(**_GATES)
    while True:
        found = await shadow.report(MODEL, gates=gates, detail=True)
        report = found.report
        done = report.frames + report.candidate_failed + report.live_failed + report.both_failed
        if done >= count or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.25)
