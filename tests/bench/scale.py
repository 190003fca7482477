"""How it scales: 1, 2 and 4 workers with a model that sleeps, beside what the costs per frame foretell.

    python -m tests.bench.scale [--sleep-ms 100] [--seconds 10] [--rounds 3] [--workers 1 2 4] [--out out/bench]

A model that sleeps needs no core, so workers beyond the cores of one machine can be measured on it. The costs (CPU per
frame of each part, bytes in Redis per frame) are measured on the way; from them follow the rates, checked here, and
what a million images a second would take, which is arithmetic and no measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from vigil_cli.local.stack import LocalStack
from vigil_client import VigilClient
from vigil_common.streams.redis import RedisStreams

from tests.bench.bench import MODEL, closed_loop, drained
from tests.support.cells import load_cells
from tests.support.cpu import cpu_s

DIGEST = "sha256:" + "0" * 64
WAITING = "waiting"
PARTS = ("ingest", "valkey", "storage", "reductstore")
TARGETS = (1_000, 10_000, 100_000, 1_000_000)
# Frames in Redis at a time: judged ones stay until the store has confirmed them.
CONFIRM_S = 5.0


def foretold(workers: int, sleep_s: float, cpu_us: float, cores: int) -> float:
    """Frames per second: what the models sleep allows, or what the cores do."""
    return min(workers / sleep_s, cores * 1e6 / cpu_us)


async def redis_bytes_per_frame(streams: RedisStreams, client: VigilClient, images: list[bytes]) -> float:
    """What Valkey's memory grows by for a frame that waits, image included."""
    from vigil_client import Frame, WaitFor  # noqa: PLC0415

    async def used() -> int:
        text = (await streams.queue._connection.command("INFO", "memory")).decode()
        return int(next(line for line in text.splitlines() if line.startswith("used_memory:")).partition(":")[2])

    before, count = await used(), 200
    # Of a model that nobody serves, so that they wait.
    frames = (Frame(images[index % len(images)], WAITING) for index in range(count))
    async for result in client.stream(frames, wait_for=WaitFor.ACCEPTED):
        if result.error is not None:
            raise RuntimeError(f"not accepted: {result.error}")
    return (await used() - before) / count


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    images = load_cells().test_images
    sleep_s = options.sleep_ms / 1000
    with tempfile.TemporaryDirectory() as name:
        async with LocalStack(Path(name), log=print, log_level="WARNING") as stack:
            streams = await RedisStreams.connect(stack.redis_url)
            for model in (MODEL, WAITING):
                await streams.routing.promote(model, version=1, digest=DIGEST, threshold=None)
            await stack.stop("shadow")  # nothing is compared here
            rates: dict[int, list[float]] = {count: [] for count in options.workers}
            costs: list[dict[str, float]] = []
            async with VigilClient(stack.ingest_address, window=8 * max(options.workers)) as client:
                waiting_bytes = await redis_bytes_per_frame(streams, client, images)
                for _ in range(options.rounds):
                    for count in options.workers:
                        command = [sys.executable, "-m", "tests.bench.sleeping_worker", MODEL, DIGEST]
                        command += [stack.redis_url, str(options.sleep_ms)]
                        processes = [await asyncio.create_subprocess_exec(*command) for _ in range(count)]
                        try:
                            await closed_loop(client, images, 3)
                            pids = {part: pid for part in PARTS if (pid := stack.pid(part)) is not None}
                            pids |= {f"worker {one.pid}": one.pid for one in processes} | {"client": os.getpid()}
                            before = {part: cpu_s(pid) for part, pid in pids.items()}
                            found = await closed_loop(client, images, options.seconds)
                            rates[count].append(found["rate"])
                            await drained(stack, streams)
                            used = {
                                part: (cpu_s(pid) - before[part]) / found["frames"] * 1e6 for part, pid in pids.items()
                            }
                            cost = {part: value for part, value in used.items() if not part.startswith("worker")}
                            costs.append({**cost, "worker": sum(v for p, v in used.items() if p.startswith("worker"))})
                        finally:
                            for process in processes:
                                process.terminate()
                            await asyncio.gather(*(process.wait() for process in processes))
                        print(f"{count} workers: {rates[count][-1]:.2f} frames/s")
            await streams.close()
    cost = {part: statistics.median(one[part] for one in costs) for part in costs[0]}
    cores = os.cpu_count() or 1
    rows = []
    one = statistics.median(rates[min(rates)]) / min(rates)
    for count, measured in rates.items():
        rate, expected = statistics.median(measured), foretold(count, sleep_s, sum(cost.values()), cores)
        rows.append({"workers": count, "per_s": rate, "of_linear": rate / (one * count), "foretold": expected})
    image_bytes = statistics.mean(len(image) for image in images)
    return {
        "sleep_ms": options.sleep_ms,
        "rows": rows,
        "cpu_us_per_frame": cost,
        "image_bytes": image_bytes,
        "redis_bytes_per_frame": waiting_bytes,
        "paper": [needed(rate, cost, waiting_bytes, image_bytes) for rate in TARGETS],
    }


def needed(rate: int, cost: dict[str, float], waiting_bytes: float, image_bytes: float) -> dict[str, float]:
    """What a rate takes, each core used to seven tenths; a Redis shard is one core, models spread by their hash tag."""
    usable = 0.7e6
    return {
        "images_per_s": rate,
        "ingest_cores": math.ceil(rate * cost["ingest"] / usable),
        "redis_shards": math.ceil(rate * cost["valkey"] / usable),
        "storage_cores": math.ceil(rate * cost["storage"] / usable),
        "reductstore_cores": math.ceil(rate * cost.get("reductstore", 0.0) / usable),
        "worker_cores_beside_model": math.ceil(rate * cost["worker"] / usable),
        "redis_gb": rate * CONFIRM_S * waiting_bytes / 1e9,
        "network_gbit_per_s": rate * image_bytes * 5 * 8 / 1e9,  # in, to Redis, to the worker, to storage, to the store
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sleep-ms", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    result = asyncio.run(run(options))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.json").write_text(json.dumps(result, indent=2))
    print("| workers | frames/s | of linear | foretold |\n| --- | --- | --- | --- |")
    for row in result["rows"]:
        print(f"| {row['workers']} | {row['per_s']:.2f} | {row['of_linear']:.3f} | {row['foretold']:.2f} |")
    print("CPU µs per frame: " + ", ".join(f"{part} {value:.0f}" for part, value in result["cpu_us_per_frame"].items()))
    print(f"Redis bytes per waiting frame: {result['redis_bytes_per_frame']:.0f}, image {result['image_bytes']:.0f}")
    for row in result["paper"]:
        print(", ".join(f"{name} {value:,.4g}" for name, value in row.items()))
    worst = max(abs(row["per_s"] / row["foretold"] - 1) for row in result["rows"])
    least = min(row["of_linear"] for row in result["rows"])
    print(f"scale: least_of_linear={least:.2f} model_off_by={worst:.2f}")


if __name__ == "__main__":
    main()
