"""Where the time goes: a flame graph per process of one run, and CPU microseconds per frame by step.

    python -m tests.bench.profile [--seconds 10] [--window 64] [--out out/profile]

First the run is measured by itself: frames per second, and each process' CPU time as the kernel counted it. Then py-spy
samples every Python process while the same goes on, which slows them: its shares are laid on the first numbers. A
thread that waits is not counted. Valkey and ReductStore are no Python: they are one number each.
VIGIL_BENCH_EXPORT is as in `tests.bench.bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from vigil_cli.local.stack import LocalStack
from vigil_client import StorageClient, VigilClient
from vigil_common.streams.redis import RedisStreams

from tests.bench.bench import MODEL, closed_loop, drained, make_bundle
from tests.support.cells import load_cells
from tests.support.cpu import cpu_s

if TYPE_CHECKING:
    from collections.abc import Iterable

RATE = 250
# The first that stands in a stack, seen from the innermost call, names the step.
STEPS = (
    ("waiting", ("Semaphore.acquire", "Condition.wait", "Thread.run (")),
    ("decode", ("decode (", "ImageFile.load")),
    ("tensor", ("to_tensor (",)),
    ("model", ("onnxruntime/", "OnnxEngine.run", "OpenVinoEngine.run")),
    ("log", ("structlog/",)),
    ("check the image", ("inspect (", "open_header (")),
    ("metrics", ("prometheus_client/",)),
    ("Redis", ("/redis/", "vigil_common/streams/")),
    ("ReductStore", ("/reduct/", "/aiohttp/", "vigil_common/store/")),
    ("gRPC", ("/grpc/",)),
    ("protobuf", ("google/protobuf", "convert.py")),
    # The loop's own frames: its callbacks into gRPC's and uvloop's native code have none of their own.
    ("loop and native gRPC", ("Runner.run (", "BaseEventLoop", "EpollSelector")),
)


def step(stack: str) -> str:
    """Which step a sampled stack, outermost first and parted by ";", belongs to."""
    frames = stack.split(";")
    if not frames[-1].startswith(("Runner.run", "BaseEventLoop", "EpollSelector")):
        for frame in reversed(frames):
            for name, marks in STEPS[:-1]:
                if any(mark in frame for mark in marks):
                    return name
        return "own code"
    return STEPS[-1][0]


def shares(raw: str) -> dict[str, float]:
    """Step to share, from py-spy's raw lines "stack count"."""
    counted: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if (name := step(stack)) != "waiting":
            counted[name] += int(count)
    total = counted.total() or 1
    return {name: count / total for name, count in counted.most_common()}


async def sample(pids: dict[str, int], seconds: float, out: Path) -> dict[str, dict[str, float]]:
    """Shares per process, and a flame graph of each."""
    spy = Path(sys.executable).parent / "py-spy"
    running = {}
    for name, pid in pids.items():
        command = [str(spy), "record", "-p", str(pid), "-d", f"{seconds:.0f}", "-r", str(RATE), "--full-filenames"]
        command += ["--format", "raw", "-o", str(out / f"{name}.txt"), "--nonblocking"]
        running[name] = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    for name, process in running.items():
        if await process.wait() != 0:
            raise RuntimeError(f"py-spy could not sample {name}; it needs the right to trace processes")
    found = {}
    for name in pids:
        raw = (out / f"{name}.txt").read_text()
        found[name] = shares(raw)
        flame(raw, out / f"{name}.html", name)
    return found


def flame(raw: str, path: Path, title: str) -> None:
    """A flame graph as one page without scripts: every box is as wide as its share, with its name when pointed at."""
    tree: dict[str, Any] = {"count": 0, "below": {}}
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        node = tree
        node["count"] += int(count)
        for frame in stack.split(";"):
            node = node["below"].setdefault(frame, {"count": 0, "below": {}})
            node["count"] += int(count)
    total, boxes, deepest = max(1, tree["count"]), [], 0

    def draw(node: dict[str, Any], left: float, depth: int) -> None:
        nonlocal deepest
        for frame, child in sorted(node["below"].items()):
            width = child["count"] / total * 1200
            if width >= 1:
                deepest = max(deepest, depth)
                name = frame.replace("&", "&amp;").replace("<", "&lt;")
                short = name.rpartition("/")[2] if "/" in name else name
                label = short[: int(width / 6.5)] if width > 20 else ""
                colour = f"hsl({hash(frame.partition(' ')[2]) % 50}, 80%, 65%)"
                boxes.append(
                    f'<g><title>{name}: {child["count"] / total:.1%}</title><rect x="{left:.1f}" y="{depth * 17}" '
                    f'width="{width:.1f}" height="16" fill="{colour}"/><text x="{left + 2:.1f}" y="{depth * 17 + 12}">'
                    f"{label}</text></g>"
                )
                draw(child, left, depth + 1)
            left += width

    draw(tree, 0.0, 0)
    style = "text{font:11px monospace;pointer-events:none}rect{stroke:#fff;stroke-width:.5}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="{(deepest + 1) * 17}">{"".join(boxes)}</svg>'
    path.write_text(f"<!doctype html><title>{title}</title><style>{style}</style><h3>{title}</h3>{svg}")


def pids_of(stack: LocalStack, names: Iterable[str]) -> dict[str, int]:
    """Process ids of parts that run."""
    return {name: pid for name in names if (pid := stack.pid(name)) is not None}


async def run(seconds: float, window: int, out: Path) -> dict[str, Any]:
    """Measure, then sample."""
    cells = load_cells()
    bundle, what = make_bundle(cells)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        async with LocalStack(Path(name), log=print, log_level="WARNING") as stack:
            async with StorageClient(stack.storage_address) as storage:
                model = await storage.models_publish(bundle, name=MODEL)
            streams = await RedisStreams.connect(stack.redis_url, budget_bytes=400 << 20)
            await streams.routing.promote(MODEL, version=model.version, digest=model.digest, threshold=None)
            worker = await stack.add_worker(MODEL, model.version)
            python = {"client": os.getpid(), **pids_of(stack, ("ingest", worker, "storage"))}
            every = {**python, **pids_of(stack, ("valkey", "reductstore"))}
            async with VigilClient(stack.ingest_address, window=window) as client:
                await closed_loop(client, cells.test_images, 3)
                before = {part: cpu_s(pid) for part, pid in every.items()}
                began = time.monotonic()
                found = await closed_loop(client, cells.test_images, seconds)
                await drained(stack, streams)
                took = time.monotonic() - began
                used = {part: (cpu_s(pid) - before[part]) / found["frames"] * 1e6 for part, pid in every.items()}
                load = asyncio.create_task(closed_loop(client, cells.test_images, seconds + 1))
                by_step = await sample(python, seconds, out)
                await load
            await streams.close()
    return {
        "model": what,
        "window": window,
        "frames_per_s": found["rate"],
        "frames": found["frames"],
        "drained_after_s": took,
        "cpu_us_per_frame": used,
        "steps_us_per_frame": {
            part: {name: share * used[part] for name, share in steps.items()} for part, steps in by_step.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """CPU microseconds per frame: a row per process, with its steps, largest first."""
    lines = [f"{'process':<16}{'CPU µs/frame':>13}  by step"]
    for part, used in result["cpu_us_per_frame"].items():
        steps = result["steps_us_per_frame"].get(part, {})
        shown = ", ".join(f"{name} {value:.0f}" for name, value in steps.items() if value >= 0.01 * used)
        lines.append(f"{part:<16}{used:>13.0f}  {shown}")
    lines.append(f"{'all':<16}{sum(result['cpu_us_per_frame'].values()):>13.0f}")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out/profile"))
    options = parser.parse_args()
    result = uvloop.run(run(options.seconds, options.window, options.out))
    (options.out / "profile.json").write_text(json.dumps(result, indent=2))
    print(table(result))
    print(f"flame graphs in {options.out}/*.html")
    used = sum(result["cpu_us_per_frame"].values())
    print(f"profile: frames_per_s={result['frames_per_s']:.0f} cpu_us_per_frame={used:.0f}")


if __name__ == "__main__":
    main()
