"""Open Inference Protocol on ingest's port: its ids, and what bad images cost."""

from __future__ import annotations

import asyncio
import io
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from open_inference import grpc_predict_v2_pb2 as oip
from open_inference import grpc_predict_v2_pb2_grpc
from PIL import Image
from vigil.types.v1 import types_pb2
from vigil_common.config import SecuritySettings
from vigil_common.grpc.server import create_server
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Emission
from vigil_ingest.app import Ingest, Limits
from vigil_ingest.bootstrap import ACCESS
from vigil_ingest.limits import ClientLimits, Clients
from vigil_ingest.open_inference import OpenInferenceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODEL = "cells"


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 6), level).save(file, "PNG")
    return file.getvalue()


def request(request_id: str, *images: bytes) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=MODEL, id=request_id)
    made.inputs.add(name="image", datatype="BYTES", shape=[len(images)]).contents.bytes_contents.extend(images)
    return made


class Served:
    def __init__(self, stub: grpc_predict_v2_pb2_grpc.GRPCInferenceServiceAsyncStub, streams: MemoryStreams) -> None:
        self.stub = stub
        self.streams = streams

    async def judge(self) -> str:
        """Judge one frame as a worker; its id."""
        source = self.streams.source(MODEL, "worker")
        (frame,) = await source.read(count=1, block_ms=2000)
        frame_id = types_pb2.FrameHeader.FromString(frame.header).frame_id
        verdict = types_pb2.Verdict(frame_id=frame_id, score=0.75)
        data = types_pb2.Outcome(frame_id=frame_id, verdict=verdict).SerializeToString()
        await source.emit([Emission(frame.entry_id, frame_id, data, data)])
        return frame_id


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[Served]:
    streams = MemoryStreams(budget_bytes=1 << 20)
    await streams.routing.promote(MODEL, version=3, digest="sha256:3", threshold=None)
    clients = Clients(ClientLimits(**limits))  # type: ignore[arg-type]
    app = Ingest(streams.queue, streams.routing, replica="r", limits=Limits(1 << 20, 10_000, 5.0), clients=clients)
    handle = create_server("127.0.0.1:0", access=ACCESS, security=SecuritySettings())
    servicer = OpenInferenceServicer(app, stopping=asyncio.Event())
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, handle.server)
    await handle.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{handle.port}") as channel:
            yield Served(grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel), streams)
    finally:
        await handle.drain(0)
        await app.close()


@pytest.mark.parametrize("request_id", ["line-1:42", "1", "0", "", "request 7"])
async def test_any_request_id_is_taken_and_comes_back(request_id: str) -> None:
    async with serving() as served:
        asked = asyncio.ensure_future(served.stub.ModelInfer(request(request_id, picture(1))))
        frame_id = await served.judge()
        response = await asked
    assert response.id == (request_id or frame_id)
    assert (frame_id == request_id) == (request_id == "line-1:42")


async def test_one_bad_image_fails_the_call_and_nobody_goes_on_waiting_for_the_others() -> None:
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(served.stub.ModelInfer(request("r", picture(1), b"junk", picture(2))), 2)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bad_images_one_after_the_other_are_answered_later_and_later() -> None:
    async with serving(refused_per_s=10) as served:
        began = time.monotonic()
        for _ in range(40):
            with pytest.raises(grpc.aio.AioRpcError):
                await served.stub.ModelInfer(request("", b"junk"))
    assert time.monotonic() - began > 0.5
