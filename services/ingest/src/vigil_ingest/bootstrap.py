"""Wires ingest: every client and clock enters here."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from open_inference import grpc_predict_v2_pb2_grpc
from vigil.ingest.v1 import ingest_pb2_grpc
from vigil_common.access import Role
from vigil_common.errors import Unavailable
from vigil_common.grpc.server import create_server
from vigil_common.logging import get_logger
from vigil_common.streams.redis import RedisStreams

from vigil_ingest.app import Ingest, Limits
from vigil_ingest.limits import ClientLimits, Clients
from vigil_ingest.open_inference import OpenInferenceServicer
from vigil_ingest.servicer import IngestServicer

if TYPE_CHECKING:
    from vigil_ingest.config import Settings

STREAM = {"*": frozenset({Role.STREAM})}
ACCESS = {"vigil.ingest.v1.IngestService": STREAM, "inference.GRPCInferenceService": STREAM}

RETRY_S = 1.0

log = get_logger()


async def _queue_there(streams: RedisStreams, stop: asyncio.Event) -> bool:
    """Wait for the queue; false where the process is stopped before it comes."""
    while not stop.is_set():
        try:
            await streams.ping()
        except Unavailable as error:
            log.warning("queue_unavailable", message=error.message)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RETRY_S)
        else:
            return True
    return False


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until stopped; then take no more frames and let those under way be answered."""
    streams = await RedisStreams.connect(
        settings.redis_url, security=settings, budget_bytes=settings.queue_budget_bytes
    )
    limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.verdict_timeout_s)
    clients = Clients(
        ClientLimits(
            calls=settings.client_calls,
            frames_per_s=settings.client_frames_per_s,
            bytes_per_s=settings.client_bytes_per_s,
            held_bytes=settings.held_bytes,
            refused_per_s=settings.client_refused_per_s,
        )
    )
    app = Ingest(streams.queue, streams.routing, replica=uuid.uuid4().hex, limits=limits, clients=clients)
    stopping = asyncio.Event()
    handle = create_server(
        settings.ingest_bind, access=ACCESS, security=settings, max_message_bytes=settings.max_image_bytes
    )
    ingest_pb2_grpc.add_IngestServiceServicer_to_server(
        IngestServicer(app, window=settings.window, stopping=stopping), handle.server
    )
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        OpenInferenceServicer(app, stopping=stopping), handle.server
    )
    await handle.start()
    if await _queue_there(streams, stop):
        await handle.ready()
        log.info("ready", port=handle.port)
    await stop.wait()
    stopping.set()
    await handle.drain(settings.drain_s)
    await app.close()
    await streams.close()
    log.info("drained")
