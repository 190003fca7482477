"""The whole path beside the bare model, in one run on the same cores and images.

    python -m tests.bench.bench [--seconds 10] [--rounds 5] [--out out/bench]

The bare model is what a user would write by hand: one process that decodes, prepares and runs, as many images at a time
as there are cores, which is what a worker does too. The whole path is client, ingest, Valkey (fsync on each write),
inference, storage and ReductStore. VIGIL_BENCH_EXPORT names a folder with an Anomalib export to judge with; without it
the built-in trainer makes a model. The client has its default window. Rounds of both alternate, since a shared
machine's speed drifts; the ratio is the median of the rounds' ratios, and each other figure that of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, StorageClient, VigilClient
from vigil_common.bundle import digest, open_bundle
from vigil_common.streams.ports import Emission
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import import_export, train

from tests.support.cells import Cells, load_cells

MODEL = "bench"
CAMERAS = ("c1", "c2", "c3", "c4")
STORAGE_FRAMES = 4000


def make_bundle(cells: Cells) -> tuple[bytes, str]:
    """The model to judge with, and what it is."""
    if export := os.environ.get("VIGIL_BENCH_EXPORT"):
        return import_export(Path(export), name=MODEL, parity_images=[]), Path(export).name
    return train(cells.train[:100], name=MODEL).bundle, "built-in trainer"


class Bare:
    """The bare model in a process of its own, asked for one measurement after another."""

    def __init__(self, folder: Path, bundle: bytes, images: list[bytes]) -> None:
        (folder / "bundle.tar").write_bytes(bundle)
        for index, image in enumerate(images):
            (folder / f"{index:04}.png").write_bytes(image)
        self._folder = folder

    def measure(self, seconds: float, rate: float) -> dict[str, Any]:
        """Closed loop for a rate of 0, else arrivals at that rate; latencies in ms."""
        command = [sys.executable, "-m", "tests.bench.bare", str(self._folder), str(seconds), str(rate)]
        return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


async def closed_loop(client: VigilClient, images: list[bytes], seconds: float) -> dict[str, Any]:
    """As many verdicts as the path gives, with as many frames in flight as the client allows."""
    end = time.monotonic() + seconds

    def frames() -> Any:
        index = 0
        while time.monotonic() < end:
            yield Frame(images[index % len(images)], MODEL, camera=CAMERAS[index % len(CAMERAS)])
            index += 1

    began, done = time.monotonic(), 0
    async for result in client.stream(frames()):
        if result.verdict is None:
            raise RuntimeError(f"a frame got no verdict: {result.error}")
        done += 1
    return {"rate": done / (time.monotonic() - began), "frames": done}


async def open_loop(client: VigilClient, images: list[bytes], seconds: float, rate: float) -> list[float]:
    """Frames at a rate, whatever the answers do; latencies in ms from when each was due."""
    due: dict[str, float] = {}
    schedule = arrivals(seconds, rate)
    began = time.monotonic()

    async def frames() -> Any:
        for index, at in enumerate(schedule):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            frame = Frame(images[index % len(images)], MODEL, camera=CAMERAS[index % len(CAMERAS)])
            due[frame.frame_id] = began + at
            yield frame

    return [(time.monotonic() - due[result.frame_id]) * 1000 async for result in client.stream(frames())]


def arrivals(seconds: float, rate: float) -> list[float]:
    """Seconds at which frames are due: evenly spaced with a tenth of jitter, as cameras are."""
    source = random.Random(0)
    return [(index + source.uniform(-0.1, 0.1)) / rate for index in range(1, int(seconds * rate))]


async def drained(stack: LocalStack, streams: RedisStreams) -> None:
    """Wait until storage has confirmed everything."""
    deadline = time.monotonic() + 120
    while (depth := await streams.queue.depth(MODEL)).unstored or depth.unjudged:
        if time.monotonic() > deadline:
            raise TimeoutError(f"storage did not finish: {depth}; see {stack.log_file('storage')}")
        await asyncio.sleep(0.1)


async def storage_rate(stack: LocalStack, streams: RedisStreams, images: list[bytes]) -> float:
    """Records per second that storage writes from a backlog."""
    await stack.stop("storage")
    from vigil.types.v1 import types_pb2  # noqa: PLC0415

    source = streams.source("backlog", "bench")
    await streams.routing.promote("backlog", version=1, digest="sha256:0", threshold=None)
    now_us = int(time.time() * 1e6)
    for start in range(0, STORAGE_FRAMES, 32):
        emissions = []
        for index in range(start, min(start + 32, STORAGE_FRAMES)):
            image = images[index % len(images)]
            header = types_pb2.FrameHeader(
                frame_id=f"b{index}", model="backlog", camera=CAMERAS[index % 4], content_type="image/png",
                sha256=index.to_bytes(32, "big"), width=300, height=300,
            )  # fmt: skip
            header.captured_at.FromMicroseconds(now_us + index)
            header.received_at.FromMicroseconds(now_us + index)
            await streams.queue.admit(
                "backlog", frame_id=f"b{index}", sha256=b"", header=header.SerializeToString(), image=image, reply_to=""
            )
        for frame in await source.read(count=32, block_ms=100):
            header = types_pb2.FrameHeader.FromString(frame.header)
            version = types_pb2.ModelVersion(name="backlog", version=1, digest="sha256:0")
            verdict = types_pb2.Verdict(
                frame_id=header.frame_id, model=version, score=0.25, label=types_pb2.LABEL_NORMAL, threshold=0.5
            )
            data = types_pb2.Outcome(frame_id=header.frame_id, verdict=verdict).SerializeToString()
            emissions.append(Emission(frame.entry_id, header.frame_id, data, data))
        await source.emit(emissions)
    counting = asyncio.create_task(count_rate(stack, "vigil-frames", "backlog/"))
    await stack.start("storage")
    rate = await counting
    await drained(stack, streams)
    return rate


async def count_rate(stack: LocalStack, bucket: str, prefix: str) -> float:
    """How fast records appear in entries of this prefix, from the first tenth to the last."""
    from reduct import Client  # noqa: PLC0415

    async with Client(stack.store_url) as client:
        found = await client.create_bucket(bucket, exist_ok=True)
        seen: list[tuple[float, int]] = []
        while not seen or seen[-1][1] < STORAGE_FRAMES:
            entries = await found.get_entry_list()
            count = sum(entry.record_count for entry in entries if entry.name.startswith(prefix))
            seen.append((time.monotonic(), count))
            await asyncio.sleep(0.02)
        first = next(point for point in seen if point[1] >= STORAGE_FRAMES // 10)
        return (seen[-1][1] - first[1]) / (seen[-1][0] - first[0])


async def bare_storage_rate(stack: LocalStack, folder: Path) -> float:
    """Records per second that a bare reduct-py loop writes, counted the same way."""
    counting = asyncio.create_task(count_rate(stack, "bench-bare", ""))
    command = [sys.executable, "-m", "tests.bench.bare_store", str(folder), stack.store_url, str(STORAGE_FRAMES)]
    process = await asyncio.create_subprocess_exec(*command)
    rate = await counting
    await process.wait()
    return rate


async def bytes_moved(streams: RedisStreams) -> tuple[int, int]:
    """Bytes that Valkey received and sent since its start."""
    text = (await streams.queue._connection.command("INFO", "stats")).decode()
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(values["total_net_input_bytes"]), int(values["total_net_output_bytes"])


async def run(seconds: float, rounds: int, out: Path) -> dict[str, Any]:
    """Measure everything."""
    cells = load_cells()
    images = cells.test_images
    bundle, what = make_bundle(cells)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare = Bare(folder, bundle, images)
        async with LocalStack(folder / "stack", log=print, log_level="WARNING") as stack:
            async with StorageClient(stack.storage_address) as storage:
                model = await storage.models_publish(bundle, name=MODEL)
            streams = await RedisStreams.connect(stack.redis_url, budget_bytes=400 << 20)
            manifest = open_bundle(bundle).manifest
            await streams.routing.promote(MODEL, version=model.version, digest=digest(bundle), threshold=None)
            await stack.add_worker(MODEL, model.version)
            result: dict[str, Any] = {"model": what, "fixed_batch": manifest.fixed_batch, "cores": os.cpu_count()}
            bare_rates, path_rates, added = [], [], []
            async with VigilClient(stack.ingest_address) as client:
                await closed_loop(client, images, 3)
                before, frames = await bytes_moved(streams), 0
                for index in range(rounds):
                    bare_rates.append(bare.measure(seconds, 0)["rate"])
                    found = await closed_loop(client, images, seconds)
                    path_rates.append(found["rate"])
                    frames += found["frames"]
                    await drained(stack, streams)
                    print(f"round {index + 1}: bare {bare_rates[-1]:.1f}/s, whole path {path_rates[-1]:.1f}/s")
                after = await bytes_moved(streams)
                half = statistics.median(bare_rates) / 2
                for index in range(rounds):
                    alone = np.percentile(bare.measure(seconds, half)["latencies_ms"], [50, 99])
                    path = np.percentile(await open_loop(client, images, seconds, half), [50, 99])
                    added.append(path - alone)
                    print(f"half load {index + 1}: bare p50/p99 {alone.round(2)}, whole path {path.round(2)} ms")
                    await drained(stack, streams)
            mean_bytes = statistics.mean(len(image) for image in images)
            result |= {
                "bare_per_s": bare_rates,
                "path_per_s": path_rates,
                "throughput_ratio": statistics.median(
                    path / alone for path, alone in zip(path_rates, bare_rates, strict=True)
                ),
                "added_p50_ms": float(np.median([value[0] for value in added])),
                "added_p99_ms": float(np.median([value[1] for value in added])),
                "added_ms": [value.tolist() for value in added],
                "valkey_in_per_image_byte": (after[0] - before[0]) / frames / mean_bytes,
                "valkey_out_per_image_byte": (after[1] - before[1]) / frames / mean_bytes,
            }
            if stack.store_url.startswith("http"):
                ours = await storage_rate(stack, streams, images)
                plain = await bare_storage_rate(stack, folder)
                result |= {"storage_per_s": ours, "bare_storage_per_s": plain, "storage_ratio": ours / plain}
            await streams.close()
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(result, indent=2))
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of both sides."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    axes[0].bar(["bare model", "Vigil"], [statistics.median(result[k]) for k in ("bare_per_s", "path_per_s")])
    axes[0].set_title("frames per second")
    axes[1].bar(["p50", "p99"], [result["added_p50_ms"], result["added_p99_ms"]])
    axes[1].set_title("added latency at half load, ms")
    if "storage_ratio" in result:
        axes[2].bar(["bare reduct-py", "Vigil storage"], [result["bare_storage_per_s"], result["storage_per_s"]])
    axes[2].set_title("records stored per second")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    result = uvloop.run(run(options.seconds, options.rounds, options.out))
    plot(result, options.out / "bench.png")
    print(f"details in {options.out}/bench.json, picture in {options.out}/bench.png")
    print(
        f"bench: throughput_ratio={result['throughput_ratio']:.2f} added_p50_ms={result['added_p50_ms']:.1f} "
        f"added_p99_ms={result['added_p99_ms']:.1f} storage_ratio={result.get('storage_ratio', float('nan')):.2f}"
    )


if __name__ == "__main__":
    main()
