"""`vigil demo-loop`: what the model finds hard is reviewed, exported, learned, and comes back as the next version.

Version 1 learns from 50 normal solar cells. They and 260 unknown ones go through the platform; the 60 that the review
queue picks get their label from the data set, as from a person who is always right. Version 2 learns from the export
alone. Both are then asked about cells that neither has seen, through their workers.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import typer
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_client import Frame, HumanLabel, StorageClient
from vigil_client.channel import connect

from vigil_cli.demo import MODEL, mono_cells, stream_all, told, wait_stored
from vigil_cli.export import ABNORMAL, NORMAL, Format, write_export
from vigil_cli.local import LocalStack, StackError
from vigil_cli.models import make_live
from vigil_cli.options import console, errors
from vigil_cli.sources import find_images

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vigil_client import Model

REVIEWED = 60
_TAUGHT, _NORMAL, _DEFECTIVE, _HELD = 50, 200, 60, 200
_PREDICT_S = 30.0
_APPLIED_S = 60.0
# Annotations in flight at once.
_SPEAKERS = 16

Cells = tuple[tuple["Path", bool], ...]


@dataclass(frozen=True, slots=True)
class LoopSplit:
    """Cells, each with whether it is defective.

    Attributes:
        taught: Normal ones that version 1 learns from.
        unknown: What the platform sees; the queue picks from them.
        held: What neither version sees before it is asked.
    """

    taught: Cells
    unknown: Cells
    held: Cells


def split_loop() -> LoopSplit:
    """The same split each time."""
    chance = random.Random(0)  # noqa: S311 - a reproducible split, no secret
    rows = mono_cells()
    normal = [(path, False) for path, probability in rows if probability == 0.0]
    defective = [(path, True) for path, probability in rows if probability == 1.0]
    chance.shuffle(normal)
    chance.shuffle(defective)
    taught, seen = normal[:_TAUGHT], normal[_TAUGHT : _TAUGHT + _NORMAL]
    unknown = [*seen, *defective[:_DEFECTIVE]]
    held = [*normal[_TAUGHT + _NORMAL :][:_HELD], *defective[_DEFECTIVE:][:_HELD]]
    chance.shuffle(unknown)
    return LoopSplit(tuple(taught), tuple(unknown), tuple(held))


async def run_demo_loop(out: Path) -> int:
    """Run it all.

    Args:
        out: Gets the platform's data and logs, and the export.

    Returns:
        The exit code: 0 where version 2 is better than version 1.
    """
    return await told(_loop(out))


async def _loop(out: Path) -> int:
    from vigil_trainer import train  # noqa: PLC0415 - loads the runtimes

    split = split_loop()
    with console.status(f"training version 1 on {len(split.taught)} normal cells"):
        first = await asyncio.to_thread(train, [path for path, _ in split.taught], name=MODEL)
    await asyncio.to_thread(shutil.rmtree, out, ignore_errors=True)
    async with LocalStack(out / "platform", log=_say) as stack, StorageClient(stack.storage_address) as storage:
        v1 = await storage.models_publish(first.bundle)
        await make_live(stack.storage_address, MODEL, v1.version)
        workers = [await stack.add_worker(MODEL, v1.version)]
        truth = await _seen(stack, storage, split)
        reviewed = await _review(storage, truth)
        export = out / "export"
        summary = await write_export(
            storage.frames_export(MODEL, decided=True), export, Format.FOLDER, {"model": MODEL}
        )
        _say(f"exported {summary.images} cells ({summary.normal} normal) to {export}")
        normal, abnormal = find_images(export / NORMAL), find_images(export / ABNORMAL)
        with console.status(f"training version 2 on {len(normal)} normal and {len(abnormal)} defective cells"):
            second = await asyncio.to_thread(train, normal, abnormal, name=MODEL)
        v2 = await storage.models_publish(second.bundle)
        workers.append(await stack.add_worker(MODEL, v2.version))
        asked = zip(workers, (v1, v2), strict=True)
        areas = [await _area(stack.worker_addresses[name], split.held, model) for name, model in asked]
        await make_live(stack.storage_address, MODEL, v2.version)
    if areas[1] <= areas[0]:
        errors.print("version 2 is no better than version 1")
    typer.echo(f"loop: v1={areas[0]:.3f} v2={areas[1]:.3f} reviewed={reviewed}")
    return 0 if areas[1] > areas[0] and reviewed == REVIEWED else 1


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


async def _seen(stack: LocalStack, storage: StorageClient, split: LoopSplit) -> dict[str, bool]:
    """Put every known and unknown cell through the platform; whether each is defective, by frame id."""
    frames: list[Frame] = []
    truth: dict[str, bool] = {}
    taught: list[str] = []
    for camera, cells in (("taught", split.taught), ("line", split.unknown)):
        for path, defective in cells:
            frame = Frame(await asyncio.to_thread(path.read_bytes), MODEL, camera=camera)
            frames.append(frame)
            truth[frame.frame_id] = defective
            if camera == "taught":
                taught.append(frame.frame_id)
    await stream_all(stack.ingest_address, frames)
    found = await wait_stored(storage, set(truth))
    if len(found) < len(truth):
        raise StackError(f"{len(truth) - len(found)} frames did not reach the store: {stack.folder / 'logs'} says why")
    # What version 1 was taught keeps the label it had.
    await _annotate(storage, dict.fromkeys(taught, False), "data set")
    return truth


async def _review(storage: StorageClient, truth: dict[str, bool]) -> int:
    items = await storage.frames_review_queue(MODEL, "demo", size=REVIEWED)
    picked = {item.frame.frame_id: truth[item.frame.frame_id] for item in items}
    await _annotate(storage, picked, "demo")
    deadline = time.monotonic() + _APPLIED_S
    while True:
        said = {frame.frame_id: frame.annotation async for frame in storage.frames_query(MODEL, reviewed=True)}
        right = [
            frame_id
            for frame_id, annotation in said.items()
            if frame_id in picked
            and annotation is not None
            and (annotation.label is HumanLabel.ANOMALOUS) == truth[frame_id]
        ]
        if len(right) == len(picked) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    _say(f"reviewed {len(right)} cells, {sum(picked.values())} of them defective")
    return len(right)


async def _annotate(storage: StorageClient, labels: dict[str, bool], author: str) -> None:
    turns = asyncio.Semaphore(_SPEAKERS)

    async def say(frame_id: str, *, defective: bool) -> None:
        async with turns:
            label = HumanLabel.ANOMALOUS if defective else HumanLabel.NORMAL
            await storage.frames_annotate(MODEL, frame_id, label, author=author)

    await asyncio.gather(*(say(frame_id, defective=defective) for frame_id, defective in labels.items()))


async def _area(address: str, cells: Sequence[tuple[Path, bool]], model: Model) -> float:
    """AUROC of a version as its worker judges."""
    from vigil_trainer.metrics import auroc  # noqa: PLC0415 - loads the runtimes

    scores: dict[bool, list[float]] = {False: [], True: []}
    async with connect(address) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        with console.status(f"asking version {model.version} about {len(cells)} cells it has never seen"):
            for path, defective in cells:
                request = inference_pb2.PredictRequest(image=await asyncio.to_thread(path.read_bytes))
                verdict = (await stub.Predict(request, timeout=_PREDICT_S)).verdict
                if verdict.model.digest != model.digest:
                    raise StackError(f"version {verdict.model.version} answered for version {model.version}")
                scores[defective].append(verdict.score)
    return auroc(np.array(scores[False]), np.array(scores[True]))
