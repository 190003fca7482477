"""Wires shadow: every client and clock enters here."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from vigil.shadow.v1 import shadow_pb2_grpc
from vigil_common.access import Role
from vigil_common.grpc.security import connect
from vigil_common.grpc.server import create_server
from vigil_common.logging import get_logger
from vigil_common.streams.redis import RedisStreams

from vigil_shadow.app import Shadow
from vigil_shadow.clients import StorageArchive, StorageReviews, WorkerJudge
from vigil_shadow.comparer import ComparerOptions, Comparers
from vigil_shadow.servicer import ShadowServicer

if TYPE_CHECKING:
    from vigil_shadow.config import Settings

ACCESS = {
    "vigil.shadow.v1.ShadowService": {
        # Reaches out to a worker that the caller names.
        "Replay": frozenset({Role.PUBLISH}),
        "*": frozenset({Role.REVIEW, Role.PUBLISH, Role.SERVE}),
    }
}

log = get_logger()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve and compare until stopped; where the report stands then, the next owner goes on."""
    streams = await RedisStreams.connect(settings.redis_url, security=settings)
    channel = connect(settings.storage_address, settings) if settings.storage_address else None
    app = Shadow(
        streams.reports,
        streams.routing,
        StorageReviews(channel) if channel else None,
        StorageArchive(channel) if channel else None,
        lambda address: WorkerJudge(connect(address, settings)),
    )
    handle = create_server(settings.shadow_bind, access=ACCESS, security=settings)
    shadow_pb2_grpc.add_ShadowServiceServicer_to_server(ShadowServicer(app), handle.server)
    consumer = uuid.uuid4().hex
    options = ComparerOptions(settings.shadow_batch_size, settings.shadow_window, settings.shadow_lease_ms)
    comparers = Comparers(streams.routing, lambda model: streams.verdicts(model, consumer), streams.reports, options)
    comparing = asyncio.create_task(comparers.run(stop))
    await handle.start()
    await handle.ready()
    log.info("ready", port=handle.port)
    await stop.wait()
    await handle.drain(settings.drain_s)
    await comparing
    if channel is not None:
        await channel.close()
    await streams.close()
    log.info("drained")
