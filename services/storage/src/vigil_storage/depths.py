"""Tells Prometheus how full each model's queue is: storage knows every model, the queue has no process of ours."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from vigil_common.errors import Unavailable
from vigil_common.logging import get_logger

from vigil_storage import metrics

if TYPE_CHECKING:
    from vigil_common.streams.ports import FrameQueue, RoutingTable

EVERY_S = 5.0

log = get_logger()


async def measure(queue: FrameQueue, routing: RoutingTable) -> None:
    """Read every model's queue once.

    Raises:
        Unavailable: Redis is away.
    """
    for model in await routing.models():
        depth = await queue.depth(model)
        metrics.QUEUE_FRAMES.labels(model).set(depth.frames)
        metrics.QUEUE_BYTES.labels(model).set(depth.image_bytes)
        metrics.QUEUE_UNJUDGED.labels(model).set(depth.unjudged)
        metrics.QUEUE_UNSTORED.labels(model).set(depth.unstored)
        metrics.QUEUE_DEAD.labels(model).set(depth.dead)


async def run(queue: FrameQueue, routing: RoutingTable, stop: asyncio.Event) -> None:
    """Measure until stopped."""
    while not stop.is_set():
        try:
            await measure(queue, routing)
        except Unavailable as error:
            log.warning("queue_not_measured", reason=error.reason, message=error.message)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), EVERY_S)
