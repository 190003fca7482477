"""vigil.ingest.v1: convert in, await, convert out."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from google.rpc import code_pb2
from grpc_status import rpc_status
from vigil.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from vigil_common.errors import InvalidInput, VigilError
from vigil_common.logging import get_logger
from vigil_common.trace import begin, trace_id

from vigil_ingest import convert
from vigil_ingest.app import FRAMES, Ingest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    _Asked = ingest_pb2.SubmitRequest | ingest_pb2.StreamRequest

# Frames of one request at most, and responses of one message.
TOGETHER = 16
# Past this, what goes into one message is copied for longer than a message of its own takes.
TOGETHER_BYTES = 64 << 10

log = get_logger()


class IngestServicer(ingest_pb2_grpc.IngestServiceServicer):
    """Submit and Stream.

    Args:
        app: The application.
        window: Frames in flight on one stream before reading pauses.
        stopping: Set while draining: streams take no new frames and end when theirs are answered.
    """

    def __init__(self, app: Ingest, *, window: int, stopping: asyncio.Event) -> None:
        self._app = app
        self._window = window
        self._stopping = stopping

    async def Submit(
        self, request: ingest_pb2.SubmitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ingest_pb2.SubmitResponse:
        """One frame, one answer."""
        client = convert.client(context)
        with self._app.clients.call(client):
            answer = await self._answer([request], convert.traceparent(context), client)
            response = await self._paced(answer, client)
        if response.HasField("error"):
            await context.abort_with_status(rpc_status.to_status(response.error))
        if response.HasField("accepted"):
            return ingest_pb2.SubmitResponse(accepted=response.accepted)
        return ingest_pb2.SubmitResponse(verdict=response.verdict)

    async def Stream(
        self,
        request_iterator: AsyncIterator[ingest_pb2.StreamRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[ingest_pb2.StreamResponse]:
        """Many frames, one response each, as they are done."""
        client = convert.client(context)
        answers = Answers()
        room = asyncio.Semaphore(self._window)
        with self._app.clients.call(client):
            reader = asyncio.create_task(
                self._read(request_iterator, convert.traceparent(context), client, room, answers)
            )
            try:
                while (response := await answers.next()) is not None:
                    carried = 1 + len(response.more)
                    yield response
                    # Room is made only once the answers are on their way: a slow reader holds at most its window.
                    for _ in range(carried):
                        room.release()
                # Answers end with their reader, also where it broke: its other frames have no answer.
                try:
                    await reader
                except Exception:
                    log.exception("stream_failed", client=client)
                    raise
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[ingest_pb2.StreamRequest],
        traceparent: str,
        client: str,
        room: asyncio.Semaphore,
        answers: Answers,
    ) -> None:
        async def one(held: list[_Asked]) -> None:
            answers.put(await self._paced(await self._answer(held, traceparent, client), client))

        stopping = asyncio.create_task(self._stopping.wait())
        try:
            async with asyncio.TaskGroup() as group:
                # One limit for all reads: watching for the end beside each would cost each frame a task and a wait.
                with suppress(TimeoutError):
                    async with asyncio.timeout(None) as limit:
                        end_now = partial(_end, limit)
                        stopping.add_done_callback(end_now)
                        try:
                            await room.acquire()
                            async for request in requests:
                                if len(request.more) >= TOGETHER:
                                    answers.refuse(f"a request carries at most {TOGETHER} frames")
                                    break
                                answers.takes = request.takes
                                held: list[_Asked] = [request, *request.more]
                                del request  # it may be long until the next
                                while held:
                                    group.create_task(one([held.pop(0)]))
                                    await room.acquire()
                        finally:
                            stopping.remove_done_callback(end_now)
        finally:
            stopping.cancel()
            answers.end()

    async def _paced(self, response: ingest_pb2.StreamResponse, client: str) -> ingest_pb2.StreamResponse:
        """The response, at once unless the client sends one bad frame after the other."""
        if response.error.code == code_pb2.INVALID_ARGUMENT:
            await asyncio.sleep(self._app.clients.refusal_delay_s(client))
        return response

    async def _answer(self, held: list[_Asked], traceparent: str, client: str) -> ingest_pb2.StreamResponse:
        """Whatever the frame, one response and one line in the log."""
        began = time.perf_counter()
        request = held.pop()  # so that who waits for a verdict holds no image
        traceparent = request.frame.traceparent or traceparent
        span = begin("take frame", traceparent)
        frame = convert.submission(request.frame, span.traceparent if span else traceparent, client)
        wait = request.wait_for != ingest_pb2.WAIT_FOR_ACCEPTED
        version = 0
        try:
            received_at_us, future = await self._app.accept(
                frame, request.frame.outputs if request.frame.HasField("outputs") else None, wait=wait
            )
            del request
            frame = replace(frame, image=b"")
            if future is None:
                what = "accepted"
                response = ingest_pb2.StreamResponse(frame_id=frame.frame_id)
                response.accepted.CopyFrom(convert.acceptance(received_at_us))
            else:
                outcome = await self._app.outcome(frame, future, received_at_us)
                what = "judged" if outcome.HasField("verdict") else "failed"
                version = outcome.verdict.model.version
                response = convert.answered(outcome)
        except VigilError as error:
            what = error.reason.lower()
            response = convert.failed(frame.frame_id, error)
        FRAMES.labels(what).inc()
        # What a client sends is cut before it is written down.
        frame_id, model = frame.frame_id[:64], frame.model[:64]
        log.info(
            "frame",
            trace_id=trace_id(frame.traceparent),
            frame_id=frame_id,
            model=model,
            version=version,
            outcome=what,
            duration_s=round(time.perf_counter() - began, 6),
        )
        if span is not None:
            about = {"vigil.frame_id": frame_id, "vigil.model": model, "vigil.camera": frame.camera[:64]}
            failed = "" if what in ("judged", "accepted") else what
            span.end({**about, "vigil.version": version, "vigil.outcome": what}, error=failed)
        return response


class Answers:
    """The answers of one stream, in the order they are done; those that are ready together may travel together.

    Attributes:
        takes: How many of them the client takes in one message.
    """

    def __init__(self) -> None:
        self.takes = 1
        self._done: asyncio.Queue[ingest_pb2.StreamResponse | None] = asyncio.Queue()
        self._refusal: VigilError | None = None

    def put(self, response: ingest_pb2.StreamResponse) -> None:
        """Add one."""
        self._done.put_nowait(response)

    def end(self) -> None:
        """There are no more to come."""
        self._done.put_nowait(None)

    def refuse(self, why: str) -> None:
        """Let the stream end with an error, once all else is answered."""
        self._refusal = InvalidInput("TOO_MANY_TOGETHER", why)

    async def next(self) -> ingest_pb2.StreamResponse | None:
        """The next message, as soon as there is one; None after the last.

        Raises:
            InvalidInput: TOO_MANY_TOGETHER.
        """
        first = await self._done.get()
        if first is None:
            if self._refusal is not None:
                raise self._refusal
            return None
        most, size = min(self.takes, TOGETHER), first.ByteSize()
        while 1 + len(first.more) < most and size < TOGETHER_BYTES and not self._done.empty():
            other = self._done.get_nowait()
            if other is None:
                self.end()
                break
            size += other.ByteSize()
            first.more.append(other)
        first.takes = TOGETHER
        return first


def _end(limit: asyncio.Timeout, _: asyncio.Task[bool]) -> None:
    with suppress(RuntimeError):  # the stream has ended by itself meanwhile
        limit.reschedule(asyncio.get_running_loop().time())
