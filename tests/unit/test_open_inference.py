"""Open Inference Protocol on ingest's port: its ids, and what bad images cost."""

from __future__ import annotations

import asyncio
import io
import time

import grpc
import pytest
from open_inference import grpc_predict_v2_pb2 as oip
from PIL import Image
from vigil_ingest.limits import ClientLimits

from tests.support.ingest import MODEL, serving


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 6), level).save(file, "PNG")
    return file.getvalue()


def request(request_id: str, *images: bytes) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=MODEL, id=request_id)
    made.inputs.add(name="image", datatype="BYTES", shape=[len(images)]).contents.bytes_contents.extend(images)
    return made


@pytest.mark.parametrize("request_id", ["line-1:42", "1", "0", "", "request 7"])
async def test_any_request_id_is_taken_and_comes_back(request_id: str) -> None:
    async with serving() as served:
        asked = asyncio.ensure_future(served.open_inference.ModelInfer(request(request_id, picture(1))))
        frame_id = await served.judge()
        response = await asked
    assert response.id == (request_id or frame_id)
    assert (frame_id == request_id) == (request_id == "line-1:42")


async def test_an_output_that_there_is_none_of_is_refused_by_its_name() -> None:
    asked = request("r", picture(1))
    asked.outputs.add(name="heat")
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError, match="not 'heat'") as caught:
            await served.open_inference.ModelInfer(asked)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_bad_image_fails_the_call_and_nobody_goes_on_waiting_for_the_others() -> None:
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(served.open_inference.ModelInfer(request("r", picture(1), b"junk", picture(2))), 2)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bad_images_one_after_the_other_are_answered_later_and_later() -> None:
    async with serving(clients=ClientLimits(refused_per_s=10)) as served:
        began = time.monotonic()
        for _ in range(40):
            with pytest.raises(grpc.aio.AioRpcError):
                await served.open_inference.ModelInfer(request("", b"junk"))
    assert time.monotonic() - began > 0.5
