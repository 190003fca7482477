"""Wires storage: every client and clock enters here."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from vigil.storage.v1 import storage_pb2_grpc
from vigil_common.access import Role
from vigil_common.errors import Unavailable
from vigil_common.grpc.server import create_server
from vigil_common.logging import get_logger
from vigil_common.store.open import open_annotations, open_retained, open_stores
from vigil_common.store.retained import RetainedFrameStore
from vigil_common.streams.redis import RedisStreams

from vigil_storage import depths, domain, retention
from vigil_storage.annotations import AnnotationKeeper, Heard
from vigil_storage.app import Storage
from vigil_storage.reviews import Reviews
from vigil_storage.routes import Routes
from vigil_storage.servicer import FrameServicer, ModelServicer, RouteServicer
from vigil_storage.writer import WriterOptions, Writers

if TYPE_CHECKING:
    from vigil_common.grpc.security import Access
    from vigil_common.store.ports import FrameStore, ModelStore

    from vigil_storage.config import Settings

# What changes something is the reviewer's or publisher's; the rest whoever has to do with models and frames may read.
READ = frozenset({Role.REVIEW, Role.PUBLISH, Role.SERVE})
ACCESS: Access = {
    "vigil.storage.v1.FrameService": {
        "Query": frozenset({Role.REVIEW, Role.SERVE}),
        "Get": frozenset({Role.REVIEW, Role.SERVE}),
        "*": frozenset({Role.REVIEW}),
    },
    "vigil.storage.v1.ModelService": {"List": READ, "GetModel": READ, "Download": READ, "*": frozenset({Role.PUBLISH})},
    # A change is an admin's alone: who publishes does not decide what is live.
    "vigil.storage.v1.RouteService": {"ListRoutes": READ, "*": frozenset()},
}
RETRY_S = 1.0
WINDOW_BYTES = 4 << 20

log = get_logger()


async def _stores(settings: Settings, stop: asyncio.Event) -> tuple[FrameStore, ModelStore, FrameStore] | None:
    """Wait for the stores; None where the process is stopped before they come."""
    token = None
    if settings.store_token_file is not None:
        token = (await asyncio.to_thread(settings.store_token_file.read_text)).strip()
    while not stop.is_set():
        try:
            frames, models = await open_stores(settings.store_url, token, settle_s=settings.confirm_after_s)
            if settings.retention_normal_bytes:
                await frames.close()
                quota_bytes = settings.retention_normal_bytes
                frames = await open_retained(settings.store_url, token, quota_bytes=quota_bytes, stays=domain.stays)
            return frames, models, await open_annotations(settings.store_url, token)
        except Unavailable as error:
            log.warning("store_unavailable", message=error.message)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RETRY_S)
    return None


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve and write until stopped; what is written and not confirmed by then, the next owner takes over."""
    stores = await _stores(settings, stop)
    if stores is None:
        return
    frames, models, annotations = stores
    streams = await RedisStreams.connect(settings.redis_url, security=settings)
    app = Storage(frames, models)
    heard = Heard()
    reviews = Reviews(frames, annotations, streams.reviews, heard=heard)
    handle = create_server(settings.storage_bind, access=ACCESS, security=settings, stream_window_bytes=WINDOW_BYTES)
    storage_pb2_grpc.add_FrameServiceServicer_to_server(FrameServicer(app, reviews), handle.server)
    storage_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(app), handle.server)
    routes = RouteServicer(Routes(models, streams.routing))
    storage_pb2_grpc.add_RouteServiceServicer_to_server(routes, handle.server)
    consumer = uuid.uuid4().hex
    options = WriterOptions(
        batch_size=settings.batch_size, flush_ms=settings.flush_ms, confirm_after_s=settings.confirm_after_s
    )

    def keeper(model: str) -> AnnotationKeeper:
        log_of, confirm_after_s = streams.reviews, settings.confirm_after_s
        return AnnotationKeeper(model, log_of, annotations, frames, confirm_after_s=confirm_after_s, heard=heard)

    writers = Writers(
        streams.routing,
        lambda model: streams.outcomes(model, consumer),
        frames,
        options,
        streams.comparisons,
        keeper=keeper,
        normal_fraction=settings.retention_normal_fraction,
    )
    beside = [writers.run(stop), depths.run(streams.queue, streams.routing, stop)]
    if isinstance(frames, RetainedFrameStore):
        beside.append(retention.count_dropped(frames, stop))
    running = [asyncio.create_task(work) for work in beside]
    await handle.start()
    await handle.ready()
    log.info("ready", port=handle.port)
    await stop.wait()
    await handle.drain(settings.drain_s)
    await asyncio.gather(*running)
    for part in (streams, frames, models, annotations):
        await part.close()
    log.info("drained")
