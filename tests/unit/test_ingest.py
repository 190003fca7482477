"""Ingest's answers, over a real gRPC connection, with the queue in memory."""

from __future__ import annotations

import asyncio
import io
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prometheus_client import REGISTRY
from vigil.ingest.v1 import ingest_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Emission
from vigil_ingest.app import Ingest, Limits
from vigil_ingest.domain import Submission, check
from vigil_ingest.servicer import TOGETHER, Answers

from tests.support.ingest import MODEL, Served, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NOW_US = 1_790_000_000_000_000
LIMITS = Limits(image_bytes=100_000, image_pixels=10_000, verdict_timeout_s=0.3)
BUDGET_BYTES = 20_000


def picture(size: tuple[int, int] = (10, 10), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG", **options)
    return file.getvalue()


def a_submission(**changes: Any) -> Submission:
    fields: dict[str, Any] = {
        "frame_id": "frame-1",
        "model": MODEL,
        "model_version": None,
        "camera": "c1",
        "captured_at_us": None,
        "labels": {},
        "image": b"",
        "traceparent": "",
    }
    return Submission(**(fields | changes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frame_id": ""}, "FRAME_ID_INVALID"),
        ({"frame_id": "a" * 65}, "FRAME_ID_INVALID"),
        ({"frame_id": "0123"}, "FRAME_ID_INVALID"),
        ({"frame_id": "1e5"}, "FRAME_ID_INVALID"),
        ({"frame_id": "a b"}, "FRAME_ID_INVALID"),
        ({"model": "../x"}, "MODEL_NAME_INVALID"),
        ({"camera": "line/1"}, "CAMERA_INVALID"),
        ({"labels": {"Shift": "x"}}, "LABEL_INVALID"),
        ({"labels": {"score": "1"}}, "LABEL_INVALID"),
        ({"labels": {"shift": ""}}, "LABEL_INVALID"),
        ({"labels": {"shift": "früh"}}, "LABEL_INVALID"),
        ({"labels": {"shift": "a,b"}}, "LABEL_INVALID"),
        ({"labels": {"shift": "a\nb"}}, "LABEL_INVALID"),
        ({"labels": {"shift": "x" * 1025}}, "LABEL_INVALID"),
        ({"labels": {f"l{index}": "x" for index in range(33)}}, "LABEL_INVALID"),
        ({"labels": {"path": "%C3%BC" * 170}}, "LABEL_INVALID"),
        ({"labels": {f"l{index}": "x" * 500 for index in range(9)}}, "LABEL_INVALID"),
        ({"captured_at_us": 0}, "CAPTURED_AT_OUT_OF_RANGE"),
        ({"captured_at_us": NOW_US + 301_000_000}, "CAPTURED_AT_OUT_OF_RANGE"),
    ],
)
def test_a_bad_field_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check(a_submission(**change), now_us=NOW_US)
    assert caught.value.reason == reason


def test_a_frame_without_a_time_takes_it_from_its_uuid7_so_that_a_repeat_has_the_same() -> None:
    at_ms = NOW_US // 1000 - 5000
    frame_id = str(uuid.UUID(int=(at_ms << 80) | (7 << 76) | (2 << 62) | 5))
    assert check(a_submission(frame_id=frame_id), now_us=NOW_US) == at_ms * 1000
    assert check(a_submission(), now_us=NOW_US) == NOW_US


@given(st.text(min_size=1, max_size=40))
def test_an_accepted_label_value_survives_a_header(value: str) -> None:
    try:
        check(a_submission(labels={"note": value}), now_us=NOW_US)
    except InvalidInput:
        return
    assert value.isascii()
    assert value.isprintable()
    assert value == value.strip()
    assert not set(value) & {",", '"'}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(LIMITS, budget_bytes=BUDGET_BYTES) as found:
        yield found


def request(frame_id: str, image: bytes | None = None, **fields: Any) -> ingest_pb2.StreamRequest:
    content = picture() if image is None else image
    frame = ingest_pb2.Frame(**{"frame_id": frame_id, "model": MODEL, "image": content} | fields)
    return ingest_pb2.StreamRequest(frame=frame, wait_for=ingest_pb2.WAIT_FOR_ACCEPTED)


def reason_of(status: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "vigil.dev"
    return str(info.reason)


BAD: list[tuple[Callable[[], ingest_pb2.StreamRequest], grpc.StatusCode, str]] = [
    (lambda: request("f", b""), grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_EMPTY"),
    (lambda: request("f", b"no image at all"), grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_UNREADABLE"),
    (lambda: request("f", picture((101, 100))), grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_TOO_LARGE"),
    (lambda: request("f", picture() + b"x" * 100_000), grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_TOO_LARGE"),
    (lambda: request("f", model="nobody"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    (lambda: request("f", model_version=2), grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_LIVE"),
    (lambda: request("0123"), grpc.StatusCode.INVALID_ARGUMENT, "FRAME_ID_INVALID"),
]


async def test_a_frame_goes_on_in_the_trace_of_its_call(served: Served) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    metadata = (("traceparent", trace),)
    await served.stub.Submit(
        ingest_pb2.SubmitRequest(frame=request("f1").frame, wait_for=ingest_pb2.WAIT_FOR_ACCEPTED), metadata=metadata
    )
    (frame,) = await served.streams.source(MODEL, "w").read(count=1, block_ms=1000)
    assert types_pb2.FrameHeader.FromString(frame.header).traceparent == trace


async def test_bad_frames_are_answered_each_and_the_stream_goes_on(served: Served) -> None:
    requests = [make() for make, _, _ in BAD]
    call = served.stub.Stream(iter([*requests, request("good")]))
    responses = {response.frame_id + "!" * index: response async for index, response in aenumerate(call)}
    found = [(r.error.code, reason_of(r.error)) for r in responses.values() if r.HasField("error")]
    assert sorted(found) == sorted((code.value[0], reason) for _, code, reason in BAD)
    assert [r.frame_id for r in responses.values() if r.HasField("accepted")] == ["good"]


async def test_frames_of_one_request_are_each_answered_as_if_alone(served: Served) -> None:
    wait_for = ingest_pb2.WAIT_FOR_ACCEPTED
    together = request("f0")
    together.more.extend(
        ingest_pb2.SubmitRequest(frame=other.frame, wait_for=wait_for)
        for other in (request("f1"), request("f2", b"no image at all"), request("f3"))
    )
    together.more.extend(ingest_pb2.SubmitRequest(frame=request(f"g{index}").frame) for index in range(6))

    async def judge_all() -> None:
        for _ in range(10):
            await served.judge()

    worker = asyncio.create_task(judge_all())  # past the stream's window, and of both kinds
    responses = [response async for response in served.stub.Stream(iter([together, request("last")]))]
    await worker
    assert not any(response.more for response in responses)  # not asked for
    found = {response.frame_id: response.WhichOneof("outcome") for response in responses}
    assert found == {
        **dict.fromkeys(("f0", "f1", "f3", "last"), "accepted"),
        "f2": "error",
        **{f"g{index}": "verdict" for index in range(6)},
    }
    assert {response.takes for response in responses} == {TOGETHER}


async def test_too_many_in_one_request_end_the_stream_once_all_else_is_answered(served: Served) -> None:
    crowd = ingest_pb2.StreamRequest(more=[ingest_pb2.SubmitRequest()] * TOGETHER)
    call = served.stub.Stream(iter([request("f1"), crowd, request("f2")]))
    first = await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(first, ingest_pb2.StreamResponse)
    assert first.frame_id == "f1"
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    assert reason_of(status) == "TOO_MANY_TOGETHER"


async def test_answers_that_are_ready_travel_together_unless_they_are_large() -> None:
    answers = Answers()
    answers.takes = 3
    small = [ingest_pb2.StreamResponse(frame_id=f"f{index}") for index in range(4)]
    large = ingest_pb2.StreamResponse(
        frame_id="g", verdict=types_pb2.Verdict(mask=types_pb2.Picture(data=bytes(99_000)))
    )
    for response in (*small, large, ingest_pb2.StreamResponse(frame_id="h")):
        answers.put(response)
    answers.end()
    sent = []
    while (message := await answers.next()) is not None:
        sent.append([message.frame_id, *(other.frame_id for other in message.more)])
    assert sent == [["f0", "f1", "f2"], ["f3", "g"], ["h"]]


async def aenumerate(source: Any) -> AsyncIterator[tuple[int, Any]]:
    index = 0
    async for item in source:
        yield index, item
        index += 1


async def test_a_verdict_comes_back_and_a_repeat_gets_it_at_once(served: Served) -> None:
    wanted = ingest_pb2.SubmitRequest(frame=request("f1").frame)
    worker = asyncio.create_task(served.judge())
    response = await served.stub.Submit(wanted)
    await worker
    assert response.verdict.frame_id == "f1"
    assert (await served.stub.Submit(wanted)).verdict.frame_id == "f1"


async def test_no_verdict_in_time_says_so_and_the_frame_stays(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Submit(ingest_pb2.SubmitRequest(frame=request("f1").frame))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await served.streams.queue.depth(MODEL)).frames == 1


async def test_a_frame_id_for_another_image_is_refused(served: Served) -> None:
    call = served.stub.Stream(iter([request("f1"), request("f1", picture((11, 11)))]))
    states = {response.WhichOneof("outcome"): response async for response in call}
    assert set(states) == {"accepted", "error"}
    assert reason_of(states["error"].error) == "FRAME_ID_REUSED"


async def test_a_full_queue_refuses_with_a_delay_and_loses_nothing_accepted(served: Served) -> None:
    call = served.stub.Stream(iter([request(f"f{index}", picture() + b"x" * 3000) for index in range(20)]))
    outcomes = [response async for response in call]
    refused = [r.error for r in outcomes if r.HasField("error")]
    accepted = [r for r in outcomes if r.HasField("accepted")]
    assert len(refused) + len(accepted) == 20
    assert {reason_of(status) for status in refused} == {"QUEUE_FULL"}
    assert all(
        any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details) for status in refused
    )
    depth = await served.streams.queue.depth(MODEL)
    assert depth.frames == len(accepted)
    assert depth.image_bytes <= 20_000


async def test_a_slow_reader_stops_the_reading_at_its_window() -> None:
    sent = 0

    async def offer() -> AsyncIterator[ingest_pb2.StreamRequest]:
        nonlocal sent
        for index in range(50):
            sent += 1
            wait = ingest_pb2.WAIT_FOR_VERDICT
            yield ingest_pb2.StreamRequest(frame=request(f"f{index}").frame, wait_for=wait)

    # A verdict that is late is an answer, which makes room for another frame.
    async with serving(replace(LIMITS, verdict_timeout_s=60.0), budget_bytes=BUDGET_BYTES) as served:
        call = served.stub.Stream(offer())
        deadline = time.monotonic() + 2
        while (await served.streams.queue.depth(MODEL)).frames < 4 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert (await served.streams.queue.depth(MODEL)).frames == 4
        call.cancel()


async def test_submit_puts_the_reason_into_the_status(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Submit(ingest_pb2.SubmitRequest(frame=request("f", b"junk").frame))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    assert reason_of(status) == "IMAGE_UNREADABLE"


async def test_a_stream_that_broke_says_so_to_its_client_and_in_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not foreseen")

    monkeypatch.setattr(served.streams.queue, "admit", broken)
    call = served.stub.Stream(iter([request("f", picture())]))
    with structlog.testing.capture_logs() as lines, pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in call]
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert [line["exc_info"] for line in lines if line["event"] == "stream_failed"] == [True]


async def test_a_follower_that_broke_goes_on_and_verdicts_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = MemoryStreams()
    await streams.routing.promote(MODEL, version=1, digest="sha256:1", threshold=None)
    read = streams.queue.read_replies
    broken: list[bool] = []

    async def breaks_once(*arguments: Any, **options: Any) -> tuple[str, list[bytes]]:
        if not broken:
            broken.append(True)
            raise RuntimeError("not foreseen")
        return await read(*arguments, **options)

    monkeypatch.setattr(streams.queue, "read_replies", breaks_once)
    app = Ingest(streams.queue, streams.routing, replica="r", limits=Limits(100_000, 10_000, 10.0))
    frame = a_submission(image=picture())
    received_us, future = await app.accept(frame, None, wait=True)
    assert future is not None
    source = streams.source(MODEL, "a")
    (queued,) = await source.read(count=1, block_ms=1000)
    outcome = types_pb2.Outcome(frame_id=frame.frame_id, verdict=types_pb2.Verdict(score=0.5)).SerializeToString()
    await source.emit([Emission(queued.entry_id, frame.frame_id, outcome, outcome)])
    assert (await app.outcome(frame, future, received_us)).verdict.score == 0.5
    assert broken
    await app.close()


async def test_a_clock_that_is_set_back_makes_no_wait_negative() -> None:
    streams = MemoryStreams()
    await streams.routing.promote(MODEL, version=1, digest="sha256:1", threshold=None)
    now_s = [2_000_000_000.0]
    limits = Limits(100_000, 10_000, 10.0)
    app = Ingest(streams.queue, streams.routing, replica="r", limits=limits, clock=lambda: now_s[0])
    frame = a_submission(image=picture())
    received_us, future = await app.accept(frame, None, wait=True)
    assert future is not None
    future.set_result(types_pb2.Outcome())
    now_s[0] -= 60
    waited_s = REGISTRY.get_sample_value("vigil_ingest_verdict_seconds_sum")
    await app.outcome(frame, future, received_us)
    assert REGISTRY.get_sample_value("vigil_ingest_verdict_seconds_sum") == waited_s
    await app.close()
