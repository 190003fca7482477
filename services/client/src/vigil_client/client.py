"""Frames in, results out, over connections that may break."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from vigil.ingest.v1 import ingest_pb2, ingest_pb2_grpc

from vigil_client import convert
from vigil_client.channel import Connected
from vigil_client.sources import as_async
from vigil_client.types import Failure, Frame, Result, SettingError, WaitFor

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable

    from opentelemetry.trace import Span, Tracer

_log = logging.getLogger("vigil_client")

_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0
_GOODBYE_S = 2.0
_SAID_EVERY_S = 15.0
# A full queue is how a fast client is slowed down, and worth a word only where it lasts.
_LONG_S = 10.0
# Without any answer.
_QUIET_S = 10.0
# Small frames that are ready at the same time travel in one message of at most this many bytes.
_TOGETHER_BYTES = 256 << 10
_TAKES = 16


def _retryable(failure: Failure) -> bool:
    # Without a delay it is gRPC's own word, such as for headers over its limit: that never gets better.
    if failure.code == "RESOURCE_EXHAUSTED":
        return failure.retry_after_s is not None
    return failure.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


def _backoff_s(attempt: int, failure: Failure) -> float:
    longest = min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
    jittered = longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients out, no secret
    return max(jittered, failure.retry_after_s or 0.0)


@dataclass(slots=True)
class _InFlight:
    frame: Frame
    first_sent_s: float
    attempts: int = 0
    accepted: bool = False
    retry: asyncio.TimerHandle | None = None
    span: Span | None = None

    def note(self, failure: Failure) -> None:
        """Remember what an answer without a verdict says of it."""
        self.accepted = self.accepted or failure.reason in {"VERDICT_TIMEOUT", "ANSWER_TOO_LARGE"}

    def message(self) -> ingest_pb2.Frame:
        message = convert.frame_message(self.frame)
        if self.span is not None:
            context = self.span.get_span_context()
            message.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        return message

    def result(self, **outcome: object) -> Result:
        latency_s = time.monotonic() - self.first_sent_s
        known = {"attempts": max(self.attempts, 1), "accepted": self.accepted}
        result = Result(self.frame.frame_id, latency_s, **known | outcome)  # type: ignore[arg-type]
        if self.span is not None:
            about = {"vigil.frame_id": self.frame.frame_id, "vigil.model": self.frame.model}
            self.span.set_attributes({**about, "vigil.attempts": result.attempts})
            if result.error is not None:
                self.span.set_attribute("error.type", result.error.reason or result.error.code)
            self.span.end()
        return result


class VigilClient(Connected):
    """Sends frames to ingest; while nobody answers, or frames wait for long, the logger "vigil_client" says so.

    Args:
        address: Ingest as "host:port".
        window: Most frames unanswered at a time on one stream, and most results waiting to be taken.
        channel_credentials: For TLS; where None as the environment says, see `vigil_client.channel.connect`.
        token: Sent as a bearer token.
        max_retry_s: How long after its first sending a frame is sent again; then its result is an error.
        silence_s: A stream with unanswered frames and no answer for this long counts as lost.
        tracer: An OpenTelemetry tracer; each frame gets a span, and what the services do with it becomes its children.

    Raises:
        SettingError: Address, token or window can't be.
    """

    def __init__(
        self,
        address: str,
        *,
        window: int = 64,
        channel_credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        max_retry_s: float = 120.0,
        silence_s: float = 60.0,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(address, channel_credentials, token)
        if not isinstance(window, int) or window < 1:
            raise SettingError(f"window is how many frames may be in flight, 1 at least, not {window!r}")
        self.window = window
        self.max_retry_s = max_retry_s
        self.silence_s = silence_s
        self._tracer = tracer
        self._quiet_until_s = 0.0

    @property
    def stub(self) -> ingest_pb2_grpc.IngestServiceAsyncStub:
        """The generated stub, for what this class doesn't offer."""
        return ingest_pb2_grpc.IngestServiceStub(self.channel)

    async def submit(self, frame: Frame, *, wait_for: WaitFor = WaitFor.VERDICT) -> Result:
        """Send one frame and wait for its answer; errors come as the result's `error`."""
        return await self._submit(self._begin(frame), convert.wait_for(wait_for))

    async def _submit(self, flight: _InFlight, wait_for: ingest_pb2.WaitFor.ValueType) -> Result:
        try:
            request = ingest_pb2.SubmitRequest(frame=flight.message(), wait_for=wait_for)
        except Exception as error:  # noqa: BLE001 - see `_message`
            return flight.result(error=convert.unsendable(flight.frame, error))
        while True:
            flight.attempts += 1
            try:
                response = await self.stub.Submit(request, metadata=self.metadata, timeout=self.silence_s)
            except grpc.aio.AioRpcError as error:
                failure = convert.rpc_failure(error)
                flight.note(failure)
                wait_s = _backoff_s(flight.attempts - 1, failure)
                if not _retryable(failure) or self._too_late(flight, wait_s):
                    return flight.result(error=failure)
                self._say_that_it_goes_on(failure, flight)
                await asyncio.sleep(wait_s)
                continue
            if response.HasField("verdict"):
                return flight.result(verdict=convert.verdict(response.verdict), accepted=True)
            return flight.result(accepted=True)

    async def stream(
        self, frames: AsyncIterable[Frame] | Iterable[Frame], *, wait_for: WaitFor = WaitFor.VERDICT
    ) -> AsyncIterator[Result]:
        """Send many frames and yield one result for each, in the order they are done.

        A lost connection is made again and the unanswered frames are sent again under the same ids; the server judges
        each once. The source is read only as fast as the window allows; one that is not async is read in a thread, so
        that it may wait for a camera or a disk.
        """
        session = _StreamSession(self, wait_for)
        tasks = [asyncio.create_task(work) for work in (session.feed(frames), session.run())]
        watching = asyncio.create_task(session.watch())
        for task in tasks:
            task.add_done_callback(session.wake)
        try:
            while (result := await session.next_result()) is not None:
                yield result
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            watching.cancel()
            # All answered: let the server end the stream its way before it is cut.
            await asyncio.wait(tasks, timeout=_GOODBYE_S if session.finished else 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(watching, *tasks, return_exceptions=True)

    def _begin(self, frame: Frame) -> _InFlight:
        if not isinstance(frame, Frame):
            raise TypeError(f"what is sent is a vigil_client.Frame, not {type(frame).__name__}")
        flight = _InFlight(frame, time.monotonic())
        if self._tracer is not None:
            from opentelemetry.trace import SpanKind  # noqa: PLC0415 - is there where a tracer is

            flight.span = self._tracer.start_span("send frame", kind=SpanKind.CLIENT)
        return flight

    def _say_that_it_goes_on(self, failure: Failure, flight: _InFlight) -> None:
        """Tell by the log that nobody answers, or of a frame that has waited for long."""
        nobody = failure.code == "UNAVAILABLE"
        if nobody or time.monotonic() - flight.first_sent_s >= _LONG_S:
            what = "no answer from ingest" if nobody else failure.reason or failure.code
            self._say("%s, trying for up to %.0f s: %s", what, self.max_retry_s, failure.message, nobody=nobody)

    def _say(self, text: str, *about: object, nobody: bool = False) -> None:
        """Now and then; the log's record has `nobody` where no server answers."""
        now = time.monotonic()
        if now >= self._quiet_until_s:
            self._quiet_until_s = now + _SAID_EVERY_S
            _log.warning(text, *about, extra={"nobody": nobody})

    def _too_late(self, flight: _InFlight, wait_s: float) -> bool:
        return time.monotonic() + wait_s - flight.first_sent_s > self.max_retry_s


class _StreamSession:
    """One call of `stream`: frames in flight, and the connections that carry them one after another."""

    def __init__(self, client: VigilClient, wait_for: WaitFor) -> None:
        self._client = client
        self._wait_for = convert.wait_for(wait_for)
        self._room = asyncio.Semaphore(client.window)
        self._flights: dict[str, _InFlight] = {}
        # Ids to send; None once there is nothing more to come.
        self._outbox: asyncio.Queue[str | None] = asyncio.Queue()
        self._results: asyncio.Queue[Result | None] = asyncio.Queue()
        self._source_ended = False
        self._carries = 1
        self._answered_s = time.monotonic()
        self.finished = False

    async def next_result(self) -> Result | None:
        """The next result, None after the last or where a task failed."""
        result = await self._results.get()
        if result is not None:
            self._room.release()
        return result

    def wake(self, task: asyncio.Task[None]) -> None:
        """End the results where a task failed: its error is the caller's."""
        if not task.cancelled() and task.exception() is not None:
            self._results.put_nowait(None)

    async def feed(self, frames: AsyncIterable[Frame] | Iterable[Frame]) -> None:
        """Take frames from the source as there is room for them."""
        async for frame in as_async(frames, ahead=min(_TAKES, self._client.window)):
            await self._room.acquire()
            flight = self._client._begin(frame)  # noqa: SLF001 - same module
            if frame.frame_id in self._flights:
                message = "this frame id is in flight already; give each frame its own"
                self._results.put_nowait(flight.result(error=Failure("ALREADY_EXISTS", "FRAME_ID_REUSED", message)))
                continue
            self._flights[frame.frame_id] = flight
            self._outbox.put_nowait(frame.frame_id)
        self._source_ended = True
        self._finish_if_done()

    async def watch(self) -> None:
        """Say where nothing comes back for long: ingest takes frames though no worker may be there to judge them."""
        while True:
            await asyncio.sleep(_QUIET_S / 2)
            oldest = next(iter(self._flights.values()), None)
            since_s = self._answered_s if oldest is None else max(self._answered_s, oldest.first_sent_s)
            if oldest is not None and (quiet_s := time.monotonic() - since_s) >= _QUIET_S:
                what = "no answer to any of %d frames for %.0f s; is a worker of the live version of %s up?"
                self._client._say(what, len(self._flights), quiet_s, oldest.frame.model)  # noqa: SLF001 - same module

    async def run(self) -> None:
        """Keep a connection up while there is something to send."""
        losses = 0
        while not self.finished:
            if await self._outbox.get() is None:
                return
            self._send_all_again()
            failure, heard = await self._converse()
            if self.finished:
                return
            losses = 0 if heard else losses + 1
            if not _retryable(failure):
                await self._one_by_one()
                continue
            wait_s = _backoff_s(losses, failure)
            for flight in list(self._flights.values()):
                if self._client._too_late(flight, wait_s):  # noqa: SLF001 - same module
                    self._settle(flight, flight.result(error=failure))
            if losses and self._flights:
                oldest = next(iter(self._flights.values()))
                self._client._say_that_it_goes_on(failure, oldest)  # noqa: SLF001 - same module
            await asyncio.sleep(wait_s)
            if self._flights:
                self._outbox.put_nowait(next(iter(self._flights)))

    async def _converse(self) -> tuple[Failure, bool]:
        """One connection from first to last message; returns why it ended, and whether it brought an answer."""
        call = self._client.stub.Stream(metadata=self._client.metadata)
        self._carries = 1  # until this server says that it takes more
        writer = asyncio.create_task(self._write(call))
        heard = False
        loop = asyncio.get_running_loop()
        try:
            # One limit put off by each answer: a limit of its own would cost each answer a task.
            async with asyncio.timeout(self._client.silence_s) as silence:
                while True:
                    response = await call.read()
                    if not isinstance(response, ingest_pb2.StreamResponse):  # EOF
                        return Failure("UNAVAILABLE", "STREAM_ENDED", "the server ended the stream"), heard
                    heard = True
                    silence.reschedule(loop.time() + self._client.silence_s)
                    self._carries = response.takes
                    for one in (response, *response.more):
                        self._answer(one)
        except TimeoutError:
            if self._flights:
                return Failure("UNAVAILABLE", "STREAM_SILENT", "no answer came in time"), heard
            return Failure("UNAVAILABLE", "STREAM_IDLE", "closed while idle"), True
        except grpc.aio.AioRpcError as error:
            return convert.rpc_failure(error), heard
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(
        self, call: grpc.aio.StreamStreamCall[ingest_pb2.StreamRequest, ingest_pb2.StreamResponse]
    ) -> None:
        # A failed write shows in the reader, with the status that explains it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while messages := await self._ready():
                first, *more = messages
                await call.write(
                    ingest_pb2.StreamRequest(
                        frame=first,
                        wait_for=self._wait_for,
                        more=[ingest_pb2.SubmitRequest(frame=frame, wait_for=self._wait_for) for frame in more],
                        takes=_TAKES,
                    )
                )
            await call.done_writing()

    def _message(self, flight: _InFlight) -> ingest_pb2.Frame | None:
        """What is sent; None where it can't be, which is the frame's result."""
        try:
            return flight.message()
        except Exception as error:  # noqa: BLE001 - whatever a field of another type leads to is this frame's alone
            self._settle(flight, flight.result(error=convert.unsendable(flight.frame, error)))
            return None

    async def _ready(self) -> list[ingest_pb2.Frame]:
        """What goes into the next message, as soon as there is something; empty after the last."""
        messages: list[ingest_pb2.Frame] = []
        size = 0
        while not messages or (len(messages) < self._carries and size < _TOGETHER_BYTES and not self._outbox.empty()):
            frame_id = await self._outbox.get()
            if frame_id is None:
                if messages:
                    self._outbox.put_nowait(None)
                break
            if (flight := self._flights.get(frame_id)) is not None and (message := self._message(flight)) is not None:
                flight.attempts += 1
                messages.append(message)
                size += len(message.image)
        return messages

    def _answer(self, response: ingest_pb2.StreamResponse) -> None:
        self._answered_s = time.monotonic()
        flight = self._flights.get(response.frame_id)
        if flight is None:  # an earlier sending's second answer
            return
        if response.HasField("verdict"):
            self._settle(flight, flight.result(verdict=convert.verdict(response.verdict), accepted=True))
        elif response.HasField("accepted"):
            self._settle(flight, flight.result(accepted=True))
        else:
            failure = convert.failure(response.error)
            flight.note(failure)
            wait_s = _backoff_s(flight.attempts - 1, failure)
            if _retryable(failure) and not self._client._too_late(flight, wait_s):  # noqa: SLF001 - same module
                self._client._say_that_it_goes_on(failure, flight)  # noqa: SLF001 - same module
                loop = asyncio.get_running_loop()
                flight.retry = loop.call_later(wait_s, self._outbox.put_nowait, response.frame_id)
            else:
                self._settle(flight, flight.result(error=failure))

    async def _one_by_one(self) -> None:
        """The whole stream was refused, perhaps for one frame (too large): ask for each by itself."""

        async def ask(flight: _InFlight) -> None:
            self._settle(flight, await self._client._submit(flight, self._wait_for))  # noqa: SLF001 - same module

        await asyncio.gather(*map(ask, list(self._flights.values())))

    def _send_all_again(self) -> None:
        while not self._outbox.empty():
            self._outbox.get_nowait()
        for frame_id, flight in self._flights.items():
            if flight.retry is not None:
                flight.retry.cancel()
            self._outbox.put_nowait(frame_id)

    def _settle(self, flight: _InFlight, result: Result) -> None:
        self._answered_s = time.monotonic()
        if flight.retry is not None:
            flight.retry.cancel()
        del self._flights[flight.frame.frame_id]
        self._results.put_nowait(result)
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._source_ended and not self._flights and not self.finished:
            self.finished = True
            self._outbox.put_nowait(None)
            self._results.put_nowait(None)
