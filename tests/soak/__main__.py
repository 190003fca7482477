"""`make soak MINUTES=…`: a long stream through the whole platform, and what each process holds more and more of.

After a warm-up each process's memory, file descriptors and threads are read every few seconds, and Valkey's memory; a
line is laid through each (Theil-Sen: the median of slopes, which a burst does not bend). The run is green where every
process grows by less than 1 MB per 10,000 frames, or by too little to tell from noise, and nothing else grows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from vigil_client import Frame, VigilClient

from tests.support.cells import load_cells
from tests.support.platform import MODEL, Platform, platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

OUT = Path("out/soak")
WARM_UP_FRACTION = 0.25
SAMPLES = 60
MAX_SLOPE_BYTES = 1_000_000  # per 10,000 frames
# What a process may be more at the end than at the beginning whatever the slope: allocators breathe.
NOISE_BYTES = 6_000_000
MAX_MORE_FDS, MAX_MORE_THREADS = 8, 3
RATE = 60.0


def measured(pid: int) -> dict[str, float]:
    """Memory, descriptors and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "memory": float(status["VmRSS"].split()[0]) * 1024,
        "descriptors": float(len(os.listdir(f"/proc/{pid}/fd"))),  # noqa: PTH208 - names alone
        "threads": float(status["Threads"]),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs."""
    pairs = itertools.combinations(points, 2)
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])


class Soak:
    """One run.

    Args:
        vigil: The platform.
        seconds: How long to stream.
    """

    def __init__(self, vigil: Platform, seconds: float) -> None:
        self._vigil = vigil
        self._deadline = time.monotonic() + seconds
        self._every_s = seconds * (1 - WARM_UP_FRACTION) / SAMPLES
        self._warm = time.monotonic() + seconds * WARM_UP_FRACTION
        self.frames = 0
        self.failed = 0
        self.series: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    async def run(self) -> None:
        """Stream and measure."""
        measuring = asyncio.create_task(self._measure())
        async with VigilClient(self._vigil.stack.ingest_address) as client:
            async for result in client.stream(self._source()):
                self.frames += 1
                self.failed += result.verdict is None
        await measuring

    async def _source(self) -> AsyncIterator[Frame]:
        images = load_cells().test_images
        while time.monotonic() < self._deadline:
            yield Frame(random.choice(images), MODEL, camera=f"c{random.randrange(4)}")
            await asyncio.sleep(1 / RATE)

    async def _measure(self) -> None:
        await asyncio.sleep(max(0.0, self._warm - time.monotonic()))
        while time.monotonic() < self._deadline:
            stack = self._vigil.stack
            for name in stack._processes:
                if (pid := stack.pid(name)) is not None:
                    for what, value in measured(pid).items():
                        self.series[name, what].append((self.frames, value))
            info = await self._vigil.streams._connection.command("INFO", "memory")
            used = next(line for line in info.decode().splitlines() if line.startswith("used_memory:"))
            self.series["valkey", "used_memory"].append((self.frames, float(used.split(":")[1])))
            await asyncio.sleep(self._every_s)

    def report(self) -> int:
        """Print each process's slope; returns how many grow too fast."""
        bad = 0
        for (name, what), points in sorted(self.series.items()):
            per_10k = slope(points) * 10_000
            third = max(1, len(points) // 3)
            first, last = (statistics.median(v for _, v in part) for part in (points[:third], points[-third:]))
            if what in ("memory", "used_memory"):
                grows = per_10k > MAX_SLOPE_BYTES and last - first > NOISE_BYTES
                text = f"{per_10k / 1e6:+8.3f} MB per 10,000 frames, {first / 1e6:.1f} to {last / 1e6:.1f} MB"
            else:
                grows = last - first > (MAX_MORE_FDS if what == "descriptors" else MAX_MORE_THREADS)
                text = f"{first:.0f} to {last:.0f}"
            bad += grows
            print(f"  {name:22} {what:12} {text}{'  GROWS' if grows else ''}")
        return bad


async def soak(minutes: float) -> int:
    """Run and report."""
    shutil.rmtree(OUT, ignore_errors=True)
    async with platform(OUT) as vigil:
        run = Soak(vigil, minutes * 60)
        await run.run()
        await vigil.settled(120)
    bad = run.report()
    print(f"soak: minutes={minutes:g} frames={run.frames} failed={run.failed} growing={bad}")
    return 1 if bad or run.failed else 0


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=30)
    return asyncio.run(soak(parser.parse_args().minutes))


if __name__ == "__main__":
    sys.exit(main())
