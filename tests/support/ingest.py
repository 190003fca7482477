"""Ingest as a client meets it, with the queue in memory."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from open_inference import grpc_predict_v2_pb2_grpc
from vigil.ingest.v1 import ingest_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.config import SecuritySettings
from vigil_common.grpc.server import create_server
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Emission
from vigil_ingest.app import Ingest, Limits
from vigil_ingest.bootstrap import ACCESS
from vigil_ingest.limits import ClientLimits, Clients
from vigil_ingest.open_inference import OpenInferenceServicer
from vigil_ingest.servicer import IngestServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

# The model that is live, in this version.
MODEL, VERSION = "cells", 3
LIMITS = Limits(image_bytes=100_000, image_pixels=10_000, verdict_timeout_s=5.0)


@dataclass(frozen=True, slots=True)
class Served:
    """Both of ingest's services over one connection, and the queue behind them."""

    stub: ingest_pb2_grpc.IngestServiceAsyncStub
    open_inference: grpc_predict_v2_pb2_grpc.GRPCInferenceServiceAsyncStub
    streams: MemoryStreams

    async def judge(self) -> str:
        """Judge the next frame as a worker; its id."""
        source = self.streams.source(MODEL, "worker")
        (frame,) = await source.read(count=1, block_ms=2000)
        frame_id = types_pb2.FrameHeader.FromString(frame.header).frame_id
        verdict = types_pb2.Verdict(frame_id=frame_id, score=0.75)
        data = types_pb2.Outcome(frame_id=frame_id, verdict=verdict).SerializeToString()
        await source.emit([Emission(frame.entry_id, frame_id, data, data)])
        return frame_id


@asynccontextmanager
async def started(
    limits: Limits = LIMITS,
    *,
    models: Sequence[str] = (MODEL,),
    bind: str = "127.0.0.1:0",
    clients: ClientLimits | None = None,
    security: SecuritySettings | None = None,
    budget_bytes: int = 1 << 20,
) -> AsyncIterator[tuple[int, MemoryStreams]]:
    """Its server until left: the port and the queue behind it.

    Args:
        limits: Of an image and of the wait for its verdict.
        models: Those that are live.
        bind: Where to listen.
        clients: Of what each client may ask for; without it anything.
        security: For TLS and tokens.
        budget_bytes: Of the queue.
    """
    streams = MemoryStreams(budget_bytes=budget_bytes)
    for model in models:
        await streams.routing.promote(model, version=VERSION, digest=f"sha256:{VERSION}", threshold=None)
    asked = Clients(clients or ClientLimits())
    app = Ingest(streams.queue, streams.routing, replica="r", limits=limits, clients=asked)
    handle = create_server(bind, access=ACCESS, security=security or SecuritySettings())
    stopping = asyncio.Event()
    ingest_pb2_grpc.add_IngestServiceServicer_to_server(IngestServicer(app, window=4, stopping=stopping), handle.server)
    open_inference = OpenInferenceServicer(app, stopping=stopping)
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, handle.server)
    await handle.start()
    await handle.ready()
    try:
        yield handle.port, streams
    finally:
        await handle.drain(0)
        await app.close()


@asynccontextmanager
async def serving(
    limits: Limits = LIMITS,
    *,
    clients: ClientLimits | None = None,
    security: SecuritySettings | None = None,
    budget_bytes: int = 1 << 20,
) -> AsyncIterator[Served]:
    """The same, with a client without TLS beside it; see `started`."""
    async with (
        started(limits, clients=clients, security=security, budget_bytes=budget_bytes) as (port, streams),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Served(
            ingest_pb2_grpc.IngestServiceStub(channel),
            grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel),
            streams,
        )
