"""`vigil demo`: real solar cells through every service, and an honest count of what came out.

The cells are the ELPV data set's (CC BY-NC-SA 4.0): electroluminescence images of monocrystalline cells, some with
cracks and dead regions.
"""

from __future__ import annotations

import asyncio
import csv
import io
import random
import shutil
import statistics
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from PIL import Image, ImageDraw
from rich.table import Table
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_client import Frame, Result, StorageClient, VigilClient
from vigil_client.channel import connect

from vigil_cli.local import LocalStack, StackError
from vigil_cli.models import make_live
from vigil_cli.options import console, errors
from vigil_cli.stream import progress_bar

if TYPE_CHECKING:
    from collections.abc import Coroutine

MODEL = "solar-cells"
LEAST_AUROC = 0.92
_TRAIN, _TEST = 350, 150
_WINDOW = 16
_STORED_DEADLINE_S = 90.0
_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_CELL = 4, 3, 320


@dataclass(frozen=True, slots=True)
class Split:
    """Cells to learn from, and cells to judge.

    Attributes:
        train: Normal cells.
        test: Cells with whether they are defective, shuffled.
    """

    train: tuple[Path, ...]
    test: tuple[tuple[Path, bool], ...]


def mono_cells() -> list[tuple[Path, float]]:
    """Every monocrystalline cell, with how likely people found it to be defective."""
    folder = Path(str(resources.files("elpv_dataset"))) / "data"
    with (folder / "labels.csv").open() as table:
        return [(folder / row[0], float(row[1])) for row in csv.reader(_squeezed(table.read())) if row[2] == "mono"]


def split_cells() -> Split:
    """The same split each time: 350 normal to train; 150 normal and 150 defective to test."""
    rows = mono_cells()
    normal = [path for path, probability in rows if probability == 0.0]
    defective = [path for path, probability in rows if probability == 1.0]
    shuffled = random.Random(0)  # noqa: S311 - a reproducible split, no secret
    shuffled.shuffle(normal)
    shuffled.shuffle(defective)
    test = [(path, False) for path in normal[_TRAIN : _TRAIN + _TEST]] + [(path, True) for path in defective[:_TEST]]
    shuffled.shuffle(test)
    return Split(tuple(normal[:_TRAIN]), tuple(test))


async def told(demo: Coroutine[None, None, int]) -> int:
    """A demo's exit code: its own, or 1 with a word on the part that did not come up."""
    try:
        return await demo
    except StackError as error:
        errors.print(str(error))
        return 1


async def run_demo(out: Path) -> int:
    """Run it all.

    Args:
        out: Gets the platform's data and logs, and the pictures.

    Returns:
        The exit code: 0 where nothing was lost and the model is as good as it should be.
    """
    return await told(_demo(out))


async def _demo(out: Path) -> int:
    from vigil_trainer import train  # noqa: PLC0415 - loads the runtimes
    from vigil_trainer.metrics import auroc  # noqa: PLC0415

    split = split_cells()
    with console.status(f"training on {len(split.train)} normal cells"):
        trained = await asyncio.to_thread(train, split.train, name=MODEL)
    console.print(f"trained on {len(split.train)} normal cells in {trained.fit_s:.1f} s")
    platform = out / "platform"
    shutil.rmtree(platform, ignore_errors=True)
    async with LocalStack(platform, log=lambda text: console.print(text, soft_wrap=True)) as stack:
        async with StorageClient(stack.storage_address) as storage:
            model = await storage.models_publish(trained.bundle)
            console.print(f"published {model.name} version {model.version}: {model.digest}", soft_wrap=True)
            await make_live(stack.storage_address, MODEL, model.version)
            worker = await stack.add_worker(model.name, model.version)
            frames = {}
            for path, defective in split.test:
                frame = Frame(await asyncio.to_thread(path.read_bytes), MODEL, camera="demo")
                frames[frame.frame_id] = (frame, defective)
            started = time.monotonic()
            results = await stream_all(stack.ingest_address, [frame for frame, _ in frames.values()])
            streamed_s = time.monotonic() - started
            stored = await wait_stored(storage, set(frames))
        judged = {result.frame_id: result.verdict for result in results if result.verdict is not None}
        scores = {
            truth: [verdict.score for name, verdict in judged.items() if frames[name][1] == truth]
            for truth in (False, True)
        }
        area = auroc(np.array(scores[False]), np.array(scores[True])) if all(scores.values()) else 0.0
        worst = sorted(judged.values(), key=lambda verdict: -verdict.score)[: _SHEET_COLUMNS * _SHEET_ROWS]
        picked = [(*frames[verdict.frame_id], verdict.score) for verdict in worst]
        pictures = await _overlays(stack.worker_addresses[worker], [frame for frame, _, _ in picked])
    sheet = out / "most_anomalous.png"
    captions = [f"{score:.3f}  {'defective' if defective else 'normal'}" for _, defective, score in picked]
    await asyncio.to_thread(_contact_sheet, sheet, list(zip(pictures, captions, strict=True)))
    lost = len(frames) - len(stored)
    _show(results, streamed_s, stored=len(stored), lost=lost, area=area)
    console.print(f"most anomalous cells: {sheet}   logs: {platform / 'logs'}", soft_wrap=True)
    if area < LEAST_AUROC:
        errors.print(f"the model separates worse than it should: AUROC {area:.3f}, at least {LEAST_AUROC} expected")
    if lost or len(judged) < len(frames):
        errors.print(f"frames are missing: {platform / 'logs'} says why", soft_wrap=True)
    typer.echo(f"demo: frames={len(frames)} verdicts={len(judged)} stored={len(stored)} lost={lost} auroc={area:.3f}")
    return 0 if lost == 0 and len(judged) == len(stored) == len(frames) and area >= LEAST_AUROC else 1


async def stream_all(address: str, frames: list[Frame]) -> list[Result]:
    """Send all frames, with a progress bar; what fails is said."""
    results: list[Result] = []
    async with VigilClient(address, window=_WINDOW) as client:
        with progress_bar() as progress:
            task = progress.add_task("streaming", total=len(frames))
            async for result in client.stream(frames):
                results.append(result)
                progress.advance(task)
                if result.error is not None:
                    errors.print(f"{result.frame_id}: {result.error.reason}: {result.error.message}")
    return results


async def wait_stored(storage: StorageClient, wanted: set[str]) -> set[str]:
    """Which of these frames the store holds with their verdict, once all do or time is up."""
    deadline = time.monotonic() + _STORED_DEADLINE_S
    with console.status("waiting until every frame is in the store"):
        while True:
            found = {frame.frame_id async for frame in storage.frames_query(MODEL) if frame.verdict is not None}
            if wanted <= found or time.monotonic() > deadline:
                return wanted & found
            await asyncio.sleep(0.25)


async def _overlays(address: str, frames: list[Frame]) -> list[bytes]:
    outputs = types_pb2.OutputOptions(visualization=types_pb2.VISUALIZATION_FULL)
    async with connect(address) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = [
            await stub.Predict(inference_pb2.PredictRequest(image=frame.image, outputs=outputs), timeout=30.0)
            for frame in frames
        ]
    return [answer.verdict.visualization.data for answer in answers]


def _contact_sheet(path: Path, cells: list[tuple[bytes, str]]) -> None:
    line = 24
    sheet = Image.new("RGB", (_SHEET_COLUMNS * _SHEET_CELL, _SHEET_ROWS * (_SHEET_CELL + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(cells):
        left = place % _SHEET_COLUMNS * _SHEET_CELL
        top = place // _SHEET_COLUMNS * (_SHEET_CELL + line)
        with Image.open(io.BytesIO(picture)) as image:
            sheet.paste(image.convert("RGB").resize((_SHEET_CELL, _SHEET_CELL)), (left, top))
        draw.text((left + 8, top + _SHEET_CELL + 6), caption, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _show(results: list[Result], streamed_s: float, *, stored: int, lost: int, area: float) -> None:
    verdicts = sum(result.verdict is not None for result in results)
    latencies_ms = [result.latency_s * 1000 for result in results]
    cuts = statistics.quantiles(latencies_ms, n=100) if len(latencies_ms) > 1 else [0.0] * 99
    table = Table(title="solar cells")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in (
        ("frames", f"{len(results)}"),
        ("verdicts", f"{verdicts}"),
        ("stored", f"{stored}"),
        ("lost", f"{lost}"),
        ("AUROC", f"{area:.3f}"),
        (f"latency p50, {_WINDOW} in flight", f"{cuts[49]:.0f} ms"),
        (f"latency p99, {_WINDOW} in flight", f"{cuts[98]:.0f} ms"),
        ("throughput", f"{len(results) / streamed_s:.0f} frames/s"),
    ):
        table.add_row(name, value)
    console.print(table)


def _squeezed(text: str) -> list[str]:
    return [",".join(line.split()) for line in text.splitlines()]
