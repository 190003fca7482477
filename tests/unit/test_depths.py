"""The gauges that alerts and dashboards are about."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import REGISTRY
from vigil_common.errors import Unavailable
from vigil_common.streams.memory import MemoryStreams
from vigil_storage import depths

MODEL = "measured"


def gauge(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"vigil_queue_{name}", {"model": MODEL})


async def streams_with_frames(count: int) -> MemoryStreams:
    streams = MemoryStreams()
    await streams.routing.promote(MODEL, version=1, digest="sha256:1", threshold=None)
    for number in range(count):
        await streams.queue.admit(
            MODEL, frame_id=f"f{number}", sha256=b"s", header=b"h", image=bytes(1000), reply_to=""
        )
    return streams


async def test_a_queue_is_told_as_it_is() -> None:
    streams = await streams_with_frames(3)
    await depths.measure(streams.queue, streams.routing)
    assert gauge("frames") == 3
    assert gauge("unjudged_frames") == 3
    assert (gauge("image_bytes") or 0) >= 3000
    assert gauge("unstored_frames") == 0
    assert gauge("dead_frames") == 0


async def test_a_queue_that_is_away_for_a_while_is_measured_again(monkeypatch: Any) -> None:
    streams = await streams_with_frames(1)
    monkeypatch.setattr(depths, "EVERY_S", 0.001)
    stop = asyncio.Event()
    looks = 0

    async def models() -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise Unavailable("QUEUE_UNAVAILABLE", "away")
        if looks == 3:
            stop.set()
        return [MODEL]

    monkeypatch.setattr(streams.routing, "models", models)
    await asyncio.wait_for(depths.run(streams.queue, streams.routing, stop), 5)
    assert looks == 3
    assert gauge("frames") == 1
