"""The stream loop: while its version is live, a worker reads frames, judges them, and emits verdicts."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable, VigilError
from vigil_common.grpc.errors import to_status
from vigil_common.logging import get_logger
from vigil_common.streams.ports import Emission, FrameSource, QueuedFrame, Route, RoutingTable

from vigil_inference import convert

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vigil_inference.pipeline import Judged, Pipeline

FRAMES = Counter("vigil_inference_frames_total", "Frames by how judging them ended", ["outcome"])
INFERENCE = Histogram(
    "vigil_inference_run_seconds", "The model's run", buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
)
QUEUED = Histogram(
    "vigil_inference_queue_seconds",
    "From acceptance until a worker read the frame",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 300),
)
BLOCK_MS = 500
RECONNECT_S = 0.2
EMIT_AT_MOST = 32
MAX_DELIVERIES = 3

log = get_logger()


class Worker:
    """One model version on one model's stream.

    Args:
        source: The model's stream.
        routing: Tells whether this version is live.
        pipeline: Judges images.
        version: Which version this is.
        default_threshold: The bundle's.
        prefetch: Most frames in hand.
        claim_idle_ms: Frames that another consumer has held for longer are taken over.
    """

    def __init__(
        self,
        source: FrameSource,
        routing: RoutingTable,
        pipeline: Pipeline,
        *,
        version: types_pb2.ModelVersion,
        default_threshold: float,
        prefetch: int,
        claim_idle_ms: int,
    ) -> None:
        self._source = source
        self._routing = routing
        self._pipeline = pipeline
        self._version = version
        self._default_threshold = default_threshold
        self._claim_idle_ms = claim_idle_ms
        self._prefetch = prefetch
        self._room = asyncio.Semaphore(prefetch)
        self._route: Route | None = None
        self._live = asyncio.Event()
        self._in_hand: dict[str, asyncio.Task[None]] = {}
        self._outbox: list[Emission] = []
        self._emitter: asyncio.Task[None] | None = None

    @property
    def live(self) -> bool:
        """Whether this version is the live one."""
        return self._live.is_set()

    @property
    def threshold(self) -> float:
        """The route's threshold where it has one, else the bundle's."""
        set_by_route = self._route.threshold if self._route and self.live else None
        return self._default_threshold if set_by_route is None else set_by_route

    async def run(self, stop: asyncio.Event) -> None:
        """Work until stopped; then finish what is in hand."""
        tasks = [asyncio.create_task(self._forever(step)) for step in (self._follow, self._read, self._claim)]
        await stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._in_hand.values())
        if self._emitter:
            await self._emitter

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Unavailable as error:
                log.warning("queue_away", detail=error.message)
                await asyncio.sleep(RECONNECT_S)

    async def _follow(self) -> None:
        """Learn of the next change of the route."""
        generation = self._route.generation if self._route else -1
        if self._route is None:
            route = await self._routing.get(self._version.name)
        else:
            route = await self._routing.wait(self._version.name, generation, block_ms=BLOCK_MS)
        was_live = self.live
        self._route = route
        if route is not None and route.digest == self._version.digest:
            self._live.set()
        else:
            self._live.clear()
        if self.live != was_live:
            log.info("role", live=self.live, model=self._version.name, version=self._version.version)
        if route is None:
            await asyncio.sleep(RECONNECT_S)

    async def _read(self) -> None:
        """Take as many new frames as there is room for."""
        await self._live.wait()
        await self._room.acquire()
        count = 1
        while not self._room.locked() and count < self._prefetch:
            await self._room.acquire()
            count += 1
        frames: list[QueuedFrame] = []
        try:
            frames = await self._source.read(count=count, block_ms=BLOCK_MS)
        finally:
            for _ in range(count - len(frames)):
                self._room.release()
            for frame in frames:
                self._take(frame)

    async def _claim(self) -> None:
        """Take over what others left."""
        await asyncio.sleep(self._claim_idle_ms / 3000)
        if not self.live:
            return
        for frame in await self._source.claim(min_idle_ms=self._claim_idle_ms, count=16):
            if frame.entry_id not in self._in_hand:
                await self._room.acquire()
                self._take(frame)

    def _take(self, frame: QueuedFrame) -> None:
        task = asyncio.create_task(self._process(frame))
        self._in_hand[frame.entry_id] = task

    async def _process(self, frame: QueuedFrame) -> None:
        read_us = time.time_ns() // 1000
        header = types_pb2.FrameHeader.FromString(frame.header)
        received_us = header.received_at.ToMicroseconds()
        QUEUED.observe(max(0, read_us - received_us) / 1e6)
        try:
            if frame.deliveries > MAX_DELIVERIES:
                raise InvalidInput(
                    "MAX_DELIVERIES", f"given up after {MAX_DELIVERIES} deliveries: each worker died or hung on it"
                )
            pictures = header.HasField("outputs") and convert.wants_pictures(header.outputs)
            judged = await self._pipeline.judge(frame.image, pictures=pictures)
            emission = await self._judged(frame, header, judged, received_us=received_us, read_us=read_us)
            FRAMES.labels("judged").inc()
        except VigilError as error:
            emission = self._failed(frame, header, error)
            FRAMES.labels(error.reason.lower()).inc()
        except Exception as error:
            # The runtime failed on this frame: leave it to be delivered again, and to die after its last delivery.
            log.exception("run_failed", frame_id=header.frame_id, detail=str(error))
            FRAMES.labels("run_failed").inc()
            self._let_go(frame)
            return
        self._outbox.append(emission)
        if self._emitter is None or self._emitter.done():
            self._emitter = asyncio.create_task(self._emit())
        self._let_go(frame)

    def _let_go(self, frame: QueuedFrame) -> None:
        self._in_hand.pop(frame.entry_id, None)
        self._room.release()

    async def _judged(
        self, frame: QueuedFrame, header: types_pb2.FrameHeader, judged: Judged, *, received_us: int, read_us: int
    ) -> Emission:
        INFERENCE.observe(judged.inference_s)
        found = convert.verdict(
            judged,
            frame_id=header.frame_id,
            model=self._version,
            threshold=self.threshold,
            received_us=received_us,
            read_us=read_us,
        )
        outcome = types_pb2.Outcome(frame_id=header.frame_id, verdict=found).SerializeToString()
        reply = outcome
        if judged.pixels is not None:
            await asyncio.to_thread(convert.add_pictures, found, judged, header.outputs)
            reply = types_pb2.Outcome(frame_id=header.frame_id, verdict=found).SerializeToString()
        log.debug("frame_judged", frame_id=header.frame_id, score=judged.score, label=found.label)
        return Emission(frame.entry_id, header.frame_id, outcome, reply)

    def _failed(self, frame: QueuedFrame, header: types_pb2.FrameHeader, error: VigilError) -> Emission:
        log.info("frame_dead", frame_id=header.frame_id, reason=error.reason)
        data = types_pb2.Outcome(frame_id=header.frame_id, failure=to_status(error)).SerializeToString()
        return Emission(frame.entry_id, header.frame_id, data, data, error.reason)

    async def _emit(self) -> None:
        """Send what is ready; what becomes ready meanwhile goes with the next."""
        while self._outbox:
            batch = self._outbox[:EMIT_AT_MOST]
            try:
                won = await self._source.emit(batch)
            except Unavailable as error:
                log.warning("queue_away", detail=error.message)
                await asyncio.sleep(RECONNECT_S)
                continue
            del self._outbox[: len(batch)]
            if not all(won):
                log.info("others_were_first", frames=won.count(False))
