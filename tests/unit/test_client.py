"""The client against a small ingest in this process, which refuses, stalls and drops connections as told."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vigil.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_client import Frame, SettingError, StorageClient, VigilClient, WaitFor, convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DEADLINE_S = 10.0


def _status(code: int, reason: str, retry_after_s: float | None = None) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=reason.lower())
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo]
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="vigil.dev")]
    if retry_after_s is not None:
        delay = duration_pb2.Duration(nanos=int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class FakeIngest(ingest_pb2_grpc.IngestServiceServicer):
    """Answers each frame with a verdict, after the troubles put into it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.streams = 0
        self.troubles: dict[str, list[status_pb2.Status]] = {}
        self.drop_after: list[int] = []
        self.refuse_streams = False
        self.hold = False
        self.most_unanswered = 0
        self.takes = 0
        self.carried: list[int] = []
        self.first_together = 1
        self.picture = b""

    def _outcome(self, frame: ingest_pb2.Frame) -> status_pb2.Status | types_pb2.Verdict:
        self.seen.append(frame.frame_id)
        troubles = self.troubles.get(frame.frame_id)
        if troubles:
            return troubles.pop(0)
        picture = types_pb2.Picture(data=self.picture)
        label = types_pb2.LABEL_ANOMALOUS
        return types_pb2.Verdict(frame_id=frame.frame_id, score=0.75, label=label, visualization=picture)

    async def Submit(  # noqa: N802 - gRPC's name
        self,
        request: ingest_pb2.SubmitRequest,
        context: grpc.aio.ServicerContext[ingest_pb2.SubmitRequest, ingest_pb2.SubmitResponse],
    ) -> ingest_pb2.SubmitResponse:
        outcome = self._outcome(request.frame)
        if isinstance(outcome, status_pb2.Status):
            context.set_trailing_metadata((("grpc-status-details-bin", outcome.SerializeToString()),))
            code = next(code for code in grpc.StatusCode if code.value[0] == outcome.code)
            await context.abort(code, outcome.message)
        if request.wait_for == ingest_pb2.WAIT_FOR_ACCEPTED:
            return ingest_pb2.SubmitResponse(accepted=ingest_pb2.Acceptance())
        return ingest_pb2.SubmitResponse(verdict=outcome)

    async def Stream(  # noqa: N802 - gRPC's name
        self,
        requests: AsyncIterator[ingest_pb2.StreamRequest],
        context: grpc.aio.ServicerContext[ingest_pb2.StreamRequest, ingest_pb2.StreamResponse],
    ) -> AsyncIterator[ingest_pb2.StreamResponse]:
        self.streams += 1
        if self.refuse_streams:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")
        left = self.drop_after.pop(0) if self.drop_after else None
        if self.hold:
            async for response in self._answer_late(requests):
                yield response
            return
        first: list[ingest_pb2.StreamResponse] = []
        async for request in requests:
            if left == 0:
                self.seen.append(request.frame.frame_id)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
            left = None if left is None else left - 1
            self.carried.append(1 + len(request.more))
            response = self._response(request.frame)
            response.more.extend(self._response(other.frame) for other in request.more)
            response.takes = self.takes
            first.append(response)
            if len(self.carried) < self.first_together:
                continue
            response.more.extend(first[:-1])
            first.clear()
            yield response

    async def _answer_late(
        self, requests: AsyncIterator[ingest_pb2.StreamRequest]
    ) -> AsyncIterator[ingest_pb2.StreamResponse]:
        """Answer only once nothing more comes, so that the client's window fills."""
        arrived: asyncio.Queue[ingest_pb2.Frame | None] = asyncio.Queue()

        async def read() -> None:
            async for request in requests:
                arrived.put_nowait(request.frame)
            arrived.put_nowait(None)

        reader = asyncio.create_task(read())
        held: list[ingest_pb2.Frame] = []
        frame: ingest_pb2.Frame | None = None
        while True:
            try:
                frame = await asyncio.wait_for(arrived.get(), 0.3)
            except TimeoutError:
                for late in held:
                    yield self._response(late)
                held.clear()
                continue
            if frame is None:
                break
            held.append(frame)
            self.most_unanswered = max(self.most_unanswered, len(held))
        await reader

    def _response(self, frame: ingest_pb2.Frame) -> ingest_pb2.StreamResponse:
        outcome = self._outcome(frame)
        if isinstance(outcome, status_pb2.Status):
            return ingest_pb2.StreamResponse(frame_id=frame.frame_id, error=outcome)
        return ingest_pb2.StreamResponse(frame_id=frame.frame_id, verdict=outcome)


class Server:
    def __init__(self, ingest: FakeIngest) -> None:
        self.ingest = ingest
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(self.ingest, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server(FakeIngest())
    await server.start()
    yield server
    await server.stop()


def _frames(count: int) -> Iterator[Frame]:
    return (Frame(b"image", "m", frame_id=f"f-{number}") for number in range(count))


async def test_every_frame_gets_one_result(server: Server) -> None:
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=4) as client:
        results = [result async for result in client.stream(_frames(50))]
    assert sorted(result.frame_id for result in results) == sorted(f"f-{number}" for number in range(50))
    assert all(result.verdict and result.verdict.anomalous and result.accepted for result in results)
    assert server.ingest.streams == 1


@pytest.mark.parametrize(("takes", "most"), [(0, 1), (1, 1), (4, 4)], ids=["older server", "one", "four"])
async def test_small_frames_travel_together_as_far_as_the_server_takes_them(
    server: Server, takes: int, most: int
) -> None:
    server.ingest.takes = takes
    # The whole window is answered at once, so that as many frames may be sent together.
    server.ingest.first_together = 16 if most > 1 else 1
    server.ingest.troubles = {"f-40": [_status(code_pb2.INVALID_ARGUMENT, "BAD_IMAGE")]}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=16) as client:
        results = {result.frame_id: result async for result in client.stream(_frames(50))}
    assert len(results) == 50
    assert [name for name, result in results.items() if result.error] == ["f-40"]
    assert max(server.ingest.carried) == most
    assert sum(server.ingest.carried) == 50


async def test_large_frames_travel_alone(server: Server) -> None:
    server.ingest.takes = 4
    large = (Frame(bytes(300_000), "m", frame_id=f"f-{number}") for number in range(12))
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        assert len([result async for result in client.stream(large)]) == 12
    assert set(server.ingest.carried) == {1}


async def test_full_queue_and_late_verdict_are_tried_again_after_the_servers_delay(server: Server) -> None:
    full = _status(code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.3)
    server.ingest.troubles = {"f-1": [full, _status(code_pb2.DEADLINE_EXCEEDED, "VERDICT_TIMEOUT")]}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        results = {result.frame_id: result async for result in client.stream(_frames(3))}
    assert [result.error for result in results.values()] == [None] * 3
    assert results["f-1"].attempts == 3
    assert results["f-1"].latency_s >= 0.3
    assert server.ingest.seen.count("f-1") == 3


async def test_an_error_that_will_not_pass_is_a_result_and_the_stream_goes_on(server: Server) -> None:
    server.ingest.troubles = {"f-0": [_status(code_pb2.INVALID_ARGUMENT, "BAD_IMAGE")]}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        results = {result.frame_id: result async for result in client.stream(_frames(3))}
    error = results["f-0"].error
    assert error is not None
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "BAD_IMAGE")
    assert results["f-2"].verdict is not None


async def test_a_frame_that_can_not_be_sent_is_a_result_and_the_others_go_on(server: Server) -> None:
    wrong: dict[str, Any] = {
        "f-1": {"labels": {"lot": 7}},
        "f-3": {"model_version": -1},
        "f-4": {"visualization": "full"},
        "f-5": {"image": Path("image.png")},
        "f-6": {"captured_at": "now"},
    }
    frames = [
        Frame(**{"image": b"image", "model": "m", "frame_id": name, **wrong.get(name, {})})
        for name in map("f-{}".format, range(8))
    ]
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        results = {result.frame_id: result async for result in client.stream(frames)}
        alone = await client.submit(frames[1])
    found = {name: result.error for name, result in results.items() if result.error}
    assert {name: error.reason for name, error in found.items()} == dict.fromkeys(wrong, "FRAME_INVALID")
    assert found["f-1"].message == "label 'lot' is int: names and values of labels are str"
    assert "out of range" in found["f-3"].message
    assert found["f-4"].message == "visualization is str, not Visualization"
    assert found["f-5"].message.endswith("Path, not bytes")
    assert found["f-6"].message == "captured_at is str, not datetime.datetime | None"
    assert len(results) == len(frames)
    assert alone.error is not None
    assert (alone.error.code, alone.error.reason) == ("INVALID_ARGUMENT", "FRAME_INVALID")
    assert server.ingest.streams == 1


@pytest.mark.parametrize("drops", [[3, 5], [29]], ids=["early", "at the last frame"])
async def test_unanswered_frames_are_sent_again_under_the_same_ids_after_a_lost_connection(
    server: Server, drops: list[int]
) -> None:
    server.ingest.drop_after = drops.copy()
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=8) as client:
        results = [result async for result in client.stream(_frames(30))]
    ids = {f"f-{number}" for number in range(30)}
    assert len(results) == 30
    assert {result.frame_id for result in results} == ids
    assert set(server.ingest.seen) == ids
    assert server.ingest.streams == len(drops) + 1
    assert len(server.ingest.seen) > 30


async def test_a_server_that_comes_back_gets_the_frames(server: Server) -> None:
    await server.stop()

    async def later() -> None:
        await asyncio.sleep(0.3)
        await server.start()

    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        restart = asyncio.create_task(later())
        results = [result async for result in client.stream(_frames(5))]
        await restart
    assert [result.error for result in results] == [None] * 5


async def test_a_server_that_stays_away_gives_errors(server: Server) -> None:
    await server.stop()
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", max_retry_s=0.3) as client:
        results = [result async for result in client.stream(_frames(3))]
        single = await client.submit(next(_frames(1)))
    assert [result.error.code for result in results if result.error] == ["UNAVAILABLE"] * 3
    assert single.error is not None


async def test_no_more_than_the_window_is_in_flight(server: Server) -> None:
    server.ingest.hold = True
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=5) as client:
        results = [result async for result in client.stream(_frames(12))]
    assert server.ingest.most_unanswered == 5
    assert len(results) == 12


# Taken, in the window and in hand; in a thread as many as the window ahead, and one in its hand.
@pytest.mark.parametrize(("threaded", "most"), [(False, 1 + 5 + 1), (True, 1 + 5 + 1 + 5 + 1)], ids=["async", "thread"])
async def test_the_source_is_not_read_far_ahead_of_results_taken(server: Server, *, threaded: bool, most: int) -> None:
    read = 0

    def source() -> Iterator[Frame]:
        nonlocal read
        for frame in _frames(100):
            read += 1
            yield frame

    async def as_async() -> AsyncIterator[Frame]:
        for frame in source():
            yield frame

    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=5) as client:
        stream = client.stream(source() if threaded else as_async())
        await anext(stream)
        await client.submit(Frame(b"image", "m"))
        assert read <= most
        assert [result async for result in stream]
    assert read == 100


async def test_a_refused_stream_falls_back_to_single_calls(server: Server) -> None:
    server.ingest.refuse_streams = True
    server.ingest.troubles = {"f-1": [_status(code_pb2.INVALID_ARGUMENT, "IMAGE_TOO_LARGE")]}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        results = {result.frame_id: result async for result in client.stream(_frames(3))}
    assert [name for name, result in results.items() if result.error] == ["f-1"]


async def test_what_is_asked_for_one_by_one_holds_up_no_other_and_is_known_from_its_first_sending(
    server: Server,
) -> None:
    server.ingest.refuse_streams = True
    server.ingest.troubles = {"f-0": [_status(code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.5)]}
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracer = provider.get_tracer("test")
    began = MagicMock(wraps=tracer.start_span)
    address = f"127.0.0.1:{server.port}"
    async with asyncio.timeout(DEADLINE_S), VigilClient(address, tracer=MagicMock(start_span=began)) as client:
        results = [(result.frame_id, len(server.ingest.seen)) async for result in client.stream(_frames(3))]
    # The first was there before the one that waits was sent again.
    assert results[0][1] < len(server.ingest.seen) == 4
    assert results[-1][0] == "f-0"
    assert len(spans.get_finished_spans()) == began.call_count == 3


@pytest.mark.parametrize("busy_s", [0.0, 0.1])
async def test_what_the_source_raises_reaches_the_caller_even_while_it_is_busy(server: Server, busy_s: float) -> None:
    def source() -> Iterator[Frame]:
        yield Frame(b"image", "m")
        yield Frame(b"image", "m")
        raise OSError("camera unplugged")

    async def consume() -> None:
        async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", window=2) as client:
            async for _ in client.stream(source()):
                await asyncio.sleep(busy_s)

    with pytest.raises(OSError, match="camera unplugged"):
        await consume()


async def test_submit_retries_and_can_stop_at_acceptance(server: Server) -> None:
    server.ingest.troubles = {"f-0": [_status(code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.05)]}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        result = await client.submit(next(_frames(1)), wait_for=WaitFor.ACCEPTED)
    assert result.accepted
    assert result.verdict is None
    assert result.attempts == 2


@pytest.mark.parametrize("streams", [True, False])
async def test_an_answer_that_is_too_large_is_not_blamed_on_the_image(
    server: Server, monkeypatch: pytest.MonkeyPatch, *, streams: bool
) -> None:
    monkeypatch.setattr("vigil_client.channel._MAX_MESSAGE_BYTES", 1 << 20)
    server.ingest.picture = bytes(2 << 20)
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        (frame,) = _frames(1)
        (result,) = [one async for one in client.stream([frame])] if streams else [await client.submit(frame)]
    assert result.error is not None
    assert (result.error.reason, result.accepted) == ("ANSWER_TOO_LARGE", True)


@pytest.mark.parametrize("streams", [True, False])
async def test_a_frame_that_nobody_judges_is_accepted_and_said_to_wait(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *, streams: bool
) -> None:
    monkeypatch.setattr("vigil_client.client._LONG_S", 0.1)
    late = _status(code_pb2.DEADLINE_EXCEEDED, "VERDICT_TIMEOUT", 0.1)
    server.ingest.troubles = {"f-0": [late] * 100}
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}", max_retry_s=0.6) as client:
        (frame,) = _frames(1)
        (result,) = [one async for one in client.stream([frame])] if streams else [await client.submit(frame)]
    assert result.error is not None
    assert (result.error.reason, result.accepted) == ("VERDICT_TIMEOUT", True)
    said = [record.getMessage() for record in caplog.records if record.name == "vigil_client"]
    assert len(said) == 1
    assert said[0].startswith("VERDICT_TIMEOUT, trying for up to 1 s: ")


@pytest.mark.parametrize("streams", [True, False])
async def test_that_nobody_answers_is_said_while_it_is_tried_again(
    caplog: pytest.LogCaptureFixture, *, streams: bool
) -> None:
    async with asyncio.timeout(DEADLINE_S), VigilClient("127.0.0.1:1", max_retry_s=1.0) as client:
        frame = Frame(b"image", "m")
        results = [one async for one in client.stream([frame])] if streams else [await client.submit(frame)]
    assert [one.error.code for one in results if one.error is not None] == ["UNAVAILABLE"]
    said = [record.getMessage() for record in caplog.records if record.name == "vigil_client"]
    assert len(said) == 1  # and not at each attempt
    assert "no answer from ingest, trying for up to 1 s" in said[0]


async def test_that_nothing_comes_back_is_said_though_the_server_takes_the_frames(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vigil_client.client._QUIET_S", 0.1)
    server.ingest.first_together = 3  # more than come

    async def stream() -> None:
        async with VigilClient(f"127.0.0.1:{server.port}") as client:
            async for _ in client.stream(_frames(2)):
                pass

    streaming = asyncio.create_task(stream())
    async with asyncio.timeout(DEADLINE_S):
        while not caplog.records:
            await asyncio.sleep(0.01)
    streaming.cancel()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "vigil_client"]
    assert said == "no answer to any of 2 frames for 0 s; is a worker of the live version of m up?"


async def test_answers_come_while_a_source_that_is_not_async_waits_for_its_next_frame(server: Server) -> None:
    answered = threading.Event()

    def camera() -> Iterator[Frame]:
        yield Frame(b"image", "m")
        assert answered.wait(DEADLINE_S)
        yield Frame(b"image", "m")

    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        results = []
        async for result in client.stream(camera()):
            answered.set()
            results.append(result)
    assert len(results) == 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"address": "localhost"}, "no HOST:PORT"),
        ({"address": "http://localhost:50051"}, "no HOST:PORT"),
        ({"address": ""}, "no HOST:PORT"),
        ({"address": None}, "no HOST:PORT"),
        ({"window": 0}, "1 at least, not 0"),
        ({"window": "8"}, "not '8'"),
        ({"token": "gr\u00fcn"}, "printable ASCII"),
        ({"token": "two words"}, "printable ASCII"),
        ({"token": 5}, "printable ASCII"),
    ],
)
def test_a_client_says_at_once_what_can_not_be(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        VigilClient(**{"address": "localhost:50051", **settings})


@pytest.mark.parametrize("address", ["[::1]:50051", "10.0.0.1:1", "dns:///ingest.vigil:50051", "unix:/run/vigil"])
def test_every_kind_of_address_that_grpc_has_is_taken_and_a_token_as_its_file_holds_it(address: str) -> None:
    assert VigilClient(address, token="abc\n").metadata == (  # noqa: S106 - no secret
        ("authorization", "Bearer abc"),
    )


def test_a_client_is_for_one_event_loop_and_for_its_own_block(server: Server) -> None:
    client = VigilClient(f"127.0.0.1:{server.port}")

    async def closed() -> None:
        async with client:
            pass
        await client.submit(Frame(b"image", "m"))

    async def opened() -> None:
        await client.__aenter__()

    with pytest.raises(RuntimeError, match="within it alone"):
        asyncio.run(closed())
    asyncio.run(opened())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(closed_in_another(client))


async def closed_in_another(client: VigilClient) -> None:
    await client.submit(Frame(b"image", "m"))


async def test_what_is_no_frame_ends_the_stream_with_its_type(server: Server) -> None:
    async with asyncio.timeout(DEADLINE_S), VigilClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(TypeError, match=r"a vigil_client\.Frame, not bytes"):
            async for _ in client.stream([b"image"]):  # type: ignore[list-item]
                pass


class FakeStorage(storage_pb2_grpc.FrameServiceServicer):
    """Has nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def Query(self, request: storage_pb2.QueryRequest, _: Any) -> storage_pb2.QueryResponse:  # noqa: N802 - gRPC's name
        self.asked.append(request)
        return storage_pb2.QueryResponse()

    async def ReviewQueue(self, request: storage_pb2.ReviewQueueRequest, _: Any) -> storage_pb2.ReviewQueueResponse:  # noqa: N802 - likewise
        self.asked.append(request)
        return storage_pb2.ReviewQueueResponse()

    async def Export(  # noqa: N802 - likewise
        self, request: storage_pb2.ExportRequest, _: Any
    ) -> AsyncIterator[storage_pb2.ExportResponse]:
        self.asked.append(request)
        return
        yield


async def test_times_without_a_zone_are_local_in_what_is_asked_for_as_in_what_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        at = datetime(2026, 11, 28, 9)  # noqa: DTZ001 - on purpose
        local = at.astimezone()
        storage, server = FakeStorage(), grpc.aio.server()  # type: ignore[abstract]  # the rest is not asked
        storage_pb2_grpc.add_FrameServiceServicer_to_server(storage, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(DEADLINE_S), StorageClient(f"127.0.0.1:{port}") as client:
            for when in (at, local):
                assert not [one async for one in client.frames_query("m", start=when, stop=when)]
                assert not await client.frames_review_queue("m", "ann", since=when)
                assert not [one async for one in client.frames_export("m", since=when, until=when)]
        await server.stop(None)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert storage.asked[:3] == storage.asked[3:]
    frame = convert.frame_message(Frame(b"image", "m", captured_at=local))
    assert storage.asked[0].start == frame.captured_at
