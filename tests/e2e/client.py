"""What a camera's program does, run inside a pod: streams cells, writes down each answer, asks what is stored.

    python client.py stream --model M --count N --rate R --log FILE [--until FILE]
    python client.py stored --model M          prints {frame id: how often it is stored}
    python client.py settled --model M         waits until the queue is empty and everything is confirmed
    python client.py live --model M --version V --digest D

Addresses, certificates and tokens come from the environment, as for `vigil`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigil_client import Frame, StorageClient, VigilClient
from vigil_common.config import SecuritySettings
from vigil_common.streams.redis import RedisStreams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CELLS = Path("/data/cells")
SETTLE_DEADLINE_S = 120.0
_INGEST, _STORAGE = os.environ["VIGIL_ADDRESS"], os.environ["VIGIL_STORAGE_ADDRESS"]


def _token() -> str | None:
    path = os.environ.get("VIGIL_TOKEN_FILE")
    return Path(path).read_text().strip() if path else None


async def _stream(model: str, count: int, rate: float, log: Path, until: Path | None) -> dict[str, Any]:
    cells = [path.read_bytes() for path in sorted(CELLS.iterdir())]
    sent: list[str] = []
    started = time.monotonic()

    async def frames() -> AsyncIterator[Frame]:
        for number, cell in zip(range(count), itertools.cycle(cells), strict=False):
            if until is not None and until.exists():
                return
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            frame = Frame(cell, model, camera=f"line-{number % 2}")
            sent.append(frame.frame_id)
            yield frame

    answered: dict[str, int] = {}
    errors: dict[str, str] = {}
    versions: dict[str, int] = {}
    latencies = []
    with log.open("w") as lines:
        async with VigilClient(_INGEST, window=32, token=_token(), max_retry_s=300.0, silence_s=10.0) as client:
            async for result in client.stream(frames()):
                answered[result.frame_id] = answered.get(result.frame_id, 0) + 1
                if result.verdict is None:
                    errors[result.frame_id] = str(result.error)
                else:
                    latencies.append(result.latency_s)
                    version = str(result.verdict.version)
                    versions[version] = versions.get(version, 0) + 1
                print(result.frame_id, result.verdict.score if result.verdict else result.error, file=lines, flush=True)
    latencies.sort()
    return {
        "sent": sent,
        "unanswered": [name for name in sent if name not in answered],
        "answered_twice": [name for name, times in answered.items() if times > 1],
        "errors": errors,
        "versions": versions,
        "seconds": time.monotonic() - started,
        "p50_s": latencies[len(latencies) // 2] if latencies else None,
        "p99_s": latencies[len(latencies) * 99 // 100] if latencies else None,
        "max_s": latencies[-1] if latencies else None,
    }


async def _stored(model: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    async with StorageClient(_STORAGE, token=_token()) as storage:
        async for frame in storage.frames_query(model):
            counts[frame.frame_id] = counts.get(frame.frame_id, 0) + 1
    return counts


async def _settled(model: str) -> dict[str, int]:
    streams = await RedisStreams.connect(os.environ["VIGIL_REDIS_URL"], security=SecuritySettings())
    deadline = time.monotonic() + SETTLE_DEADLINE_S
    try:
        while True:
            depth = await streams.queue.depth(model)
            if not depth.unjudged and not depth.unstored:
                return {"dead": depth.dead}
            if time.monotonic() > deadline:
                sys.exit(f"not settled: {depth}")
            await asyncio.sleep(0.2)
    finally:
        await streams.close()


async def _live(model: str, version: int, digest: str) -> dict[str, int]:
    streams = await RedisStreams.connect(os.environ["VIGIL_REDIS_URL"], security=SecuritySettings())
    try:
        route = await streams.routing.promote(model, version=version, digest=digest, threshold=None)
    finally:
        await streams.close()
    return {"version": route.live.version}


def main() -> None:
    """Run one command and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("stream", "stored", "settled", "live"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--log", type=Path, default=Path("/data/stream.log"))
    parser.add_argument("--until", type=Path)
    parser.add_argument("--version", type=int, default=0)
    parser.add_argument("--digest", default="")
    chosen = parser.parse_args()
    match chosen.command:
        case "stream":
            work: Any = _stream(chosen.model, chosen.count, chosen.rate, chosen.log, chosen.until)
        case "stored":
            work = _stored(chosen.model)
        case "settled":
            work = _settled(chosen.model)
        case _:
            work = _live(chosen.model, chosen.version, chosen.digest)
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
