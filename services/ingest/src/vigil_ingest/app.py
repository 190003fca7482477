"""Ingest without its transport: check, enqueue, wait."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram
from vigil.types.v1 import types_pb2
from vigil_common.access import authorize
from vigil_common.errors import Conflict, NotFound, NotLive, QueueFull, Unavailable, VerdictTimeout
from vigil_common.images import inspect
from vigil_common.logging import get_logger
from vigil_common.streams.ports import Admission, FrameQueue, Route, RoutingTable

from vigil_ingest.domain import Submission, check
from vigil_ingest.limits import ClientLimits, Clients

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

FRAMES = Counter("vigil_ingest_frames_total", "Frames by how they were answered", ["outcome"])
WAIT = Histogram(
    "vigil_ingest_verdict_seconds",
    "From receipt to the verdict's arrival",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
WAITING = Gauge("vigil_ingest_waiting_frames", "Frames whose verdict a client waits for")
RETRY_AFTER_S = 0.5
BLOCK_MS = 1000
RECONNECT_S = 0.2
# Of the event loop, from an outcome that is known to the stream that carries it.
ROUNDS_TO_ANSWER = 3

log = get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be, and how long a verdict may take."""

    image_bytes: int
    image_pixels: int
    verdict_timeout_s: float


class _Model:
    """What ingest keeps of one model: its route, and who waits for which frame."""

    def __init__(self, route: Route) -> None:
        self.route: Route | None = route
        self.waiting: dict[str, list[asyncio.Future[types_pb2.Outcome]]] = {}


class Ingest:
    """The application.

    Args:
        queue: Where frames go.
        routing: Which models are live.
        replica: Name of this process; replies come to it.
        limits: See `Limits`.
        clients: What each client may ask for; without it anything.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        queue: FrameQueue,
        routing: RoutingTable,
        *,
        replica: str,
        limits: Limits,
        clients: Clients | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._routing = routing
        self._replica = replica
        self._limits = limits
        self.clients = clients or Clients(ClientLimits())
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def route(self, model: str, version: int | None = None) -> Route:
        """The live route of a model.

        Raises:
            Forbidden: MODEL_NOT_ALLOWED.
            NotFound: UNKNOWN_MODEL.
            NotLive: VERSION_NOT_LIVE.
        """
        authorize(model)
        known = self._models.get(model) or await self._discover(model)
        if known is None or known.route is None:
            raise NotFound(
                "UNKNOWN_MODEL", f"no version of model {model} is live; publish one and apply an AnomalyModel for it"
            )
        live = known.route.live.version
        if version is not None and version != live:
            raise NotLive(
                "VERSION_NOT_LIVE",
                f"version {version} of {model} is not live, version {live} is; leave model_version out",
                metadata={"live_version": str(live)},
            )
        return known.route

    async def _discover(self, model: str) -> _Model | None:
        route = await self._routing.get(model)
        if route is None:
            return None
        if model not in self._models:
            self._models[model] = _Model(route)
            self._spawn(partial(self._follow_route, model))
            self._spawn(partial(self._follow_replies, model))
        return self._models[model]

    async def _kept_up(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                # Without it clients would wait for verdicts that are there, in a process that looks healthy.
                log.exception("follower_failed")
                await asyncio.sleep(RECONNECT_S)

    def _spawn(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.create_task(self._kept_up(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def accept(
        self, frame: Submission, outputs: types_pb2.OutputOptions | None, *, wait: bool
    ) -> tuple[int, asyncio.Future[types_pb2.Outcome] | None]:
        """Check a frame and put it into the queue.

        Returns:
            When it was received (microseconds since 1970) and, with `wait`, where its outcome will appear.

        Raises:
            InvalidInput: A field or the image is not as it must be.
            Forbidden, NotFound, NotLive: See `route`.
            Conflict: FRAME_ID_REUSED.
            QueueFull: QUEUE_FULL, RATE_LIMITED, INGEST_BUSY.
            Unavailable: The queue is away.
        """
        with self.clients.frame(frame.client, len(frame.image)):
            return await self._accept(frame, outputs, wait=wait)

    async def _accept(
        self, frame: Submission, outputs: types_pb2.OutputOptions | None, *, wait: bool
    ) -> tuple[int, asyncio.Future[types_pb2.Outcome] | None]:
        now_us = int(self._clock() * 1_000_000)
        captured_at_us = check(frame, now_us=now_us)
        await self.route(frame.model, frame.model_version)
        info = inspect(frame.image, max_bytes=self._limits.image_bytes, max_pixels=self._limits.image_pixels)
        sha256 = hashlib.sha256(frame.image).digest()
        header = types_pb2.FrameHeader(
            frame_id=frame.frame_id,
            model=frame.model,
            camera=frame.camera,
            labels=frame.labels,
            outputs=outputs,
            content_type=info.content_type,
            width=info.width,
            height=info.height,
            sha256=sha256,
            traceparent=frame.traceparent,
        )
        header.captured_at.FromMicroseconds(captured_at_us)
        header.received_at.FromMicroseconds(now_us)
        future = self._register(frame.model, frame.frame_id) if wait else None
        try:
            admitted = await self._queue.admit(
                frame.model,
                frame_id=frame.frame_id,
                sha256=sha256,
                header=header.SerializeToString(),
                image=frame.image,
                reply_to=self._replica if wait else "",
            )
        except BaseException:
            self._forget(frame.model, frame.frame_id, future)
            raise
        if admitted.state is Admission.FULL:
            self._forget(frame.model, frame.frame_id, future)
            raise QueueFull(
                "QUEUE_FULL", f"the queue of {frame.model} is full; try again later", retry_after_s=RETRY_AFTER_S
            )
        if admitted.state is Admission.REUSED:
            self._forget(frame.model, frame.frame_id, future)
            raise Conflict("FRAME_ID_REUSED", f"frame id {frame.frame_id} stands for another image; use a new id")
        if future and admitted.reply is not None and not future.done():
            self._forget(frame.model, frame.frame_id, future)
            future.set_result(types_pb2.Outcome.FromString(admitted.reply))
        return now_us, future

    async def outcome(
        self, frame: Submission, future: asyncio.Future[types_pb2.Outcome], received_at_us: int
    ) -> types_pb2.Outcome:
        """Wait for a frame's outcome.

        Raises:
            VerdictTimeout: VERDICT_TIMEOUT; the frame stays accepted and the same id may be sent again.
        """
        # Not `wait_for`, which wakes who waits two rounds of the loop later.
        limit = asyncio.get_running_loop().call_later(self._limits.verdict_timeout_s, _give_up, future)
        try:
            outcome = await future
        except TimeoutError:
            raise VerdictTimeout(
                "VERDICT_TIMEOUT",
                f"frame {frame.frame_id} is accepted but was not judged within {self._limits.verdict_timeout_s:g} s; "
                "send it again with the same id to wait on",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        finally:
            limit.cancel()
            self._forget(frame.model, frame.frame_id, future)
        # A clock that was set back would take from the sum, which Prometheus takes for a restart.
        WAIT.observe(max(0.0, self._clock() - received_at_us / 1_000_000))
        return outcome

    def _register(self, model: str, frame_id: str) -> asyncio.Future[types_pb2.Outcome]:
        future: asyncio.Future[types_pb2.Outcome] = asyncio.get_running_loop().create_future()
        self._models[model].waiting.setdefault(frame_id, []).append(future)
        WAITING.inc()
        return future

    def _forget(self, model: str, frame_id: str, future: asyncio.Future[types_pb2.Outcome] | None) -> None:
        waiting = self._models[model].waiting.get(frame_id)
        if future is None or waiting is None or future not in waiting:
            return
        waiting.remove(future)
        WAITING.dec()
        if not waiting:
            del self._models[model].waiting[frame_id]

    async def _follow_replies(self, model: str) -> None:
        """Hand outcomes to those who wait; after a lost connection goes on where it was."""
        after = "0"
        known = self._models[model]
        while True:
            try:
                after, replies = await self._queue.read_replies(model, self._replica, after, block_ms=BLOCK_MS)
            except Unavailable:
                await asyncio.sleep(RECONNECT_S)
                continue
            for reply in replies:
                outcome = types_pb2.Outcome.FromString(reply)
                for future in known.waiting.get(outcome.frame_id, ()):
                    if not future.done():
                        future.set_result(outcome)
            # The answers leave before the next are asked for.
            for _ in range(ROUNDS_TO_ANSWER):
                await asyncio.sleep(0)

    async def _follow_route(self, model: str) -> None:
        known = self._models[model]
        while True:
            try:
                generation = known.route.generation if known.route else 0
                known.route = await self._routing.wait(model, generation, block_ms=BLOCK_MS)
            except Unavailable:
                await asyncio.sleep(RECONNECT_S)

    async def close(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _give_up(future: asyncio.Future[types_pb2.Outcome]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
