"""The stream loop: while its version has a role, a worker reads frames, judges them, and emits verdicts.

Live and candidate read the same stream in groups of their own. The role is what the route says now: a candidate that is
promoted goes on as live without a restart, and what it has in hand still goes where it was read from.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable, VigilError
from vigil_common.grpc.errors import to_status
from vigil_common.logging import get_logger
from vigil_common.streams.ports import Emission, FrameSource, QueuedFrame, Route, RoutingTable, sampled

from vigil_inference import convert
from vigil_inference.outbox import Outbox
from vigil_inference.roles import Role
from vigil_inference.telemetry import FRAMES, Telemetry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vigil_inference.pipeline import Pipeline

BLOCK_MS = 500
# A candidate waits for less: once it is promoted its read brings nothing more, and live's frames would wait for it.
CANDIDATE_BLOCK_MS = 50
# Nobody waits for a candidate, so its frames and verdicts gather: a call for each would cost Redis what live's do.
GATHER_S = 1.0
RECONNECT_S = 0.2
# Of what a worker can have in hand, this part is emitted together; a larger one where more waits than it can have.
TOGETHER, TOGETHER_OF_MORE = 4, 2
CLAIM_AT_MOST = 16
# What a frame usually takes is told by so many of the last.
USUAL_OF = 16
# A frame that has been held for so many times what a full hand takes has been left.
PATIENCE = 4
MAX_DELIVERIES = 3
# A run that takes longer than this, and many times what all in hand takes, never ends: the process does instead.
HUNG_S, HUNG_TIMES = 120.0, 5
DRAIN_S = 20.0

log = get_logger()


class Worker:
    """One model version on one model's stream.

    Args:
        source: The model's stream, as live reads it.
        shadow: The same, as a candidate reads it.
        routing: Tells which role this version has.
        pipeline: Judges images.
        version: Which version this is.
        default_threshold: The bundle's.
        prefetch: Most frames in hand.
        claim_idle_ms: Frames that another consumer has held for longer are taken over; with a slow model later, for all
            that a worker has in hand takes its time.
        frame_s: What a frame takes, as far as is known before the first.
        hand_s: Most work in hand: where frames take longer than the model by itself, being large, fewer are taken.
        at_least: Frames in hand, however long they take.
    """

    def __init__(
        self,
        source: FrameSource,
        shadow: FrameSource,
        routing: RoutingTable,
        pipeline: Pipeline,
        *,
        version: types_pb2.ModelVersion,
        default_threshold: float,
        prefetch: int,
        claim_idle_ms: int,
        frame_s: float = 0.0,
        hand_s: float = math.inf,
        at_least: int = 1,
    ) -> None:
        self._sources = {Role.LIVE: source, Role.CANDIDATE: shadow}
        self._routing = routing
        self._pipeline = pipeline
        self._version = version
        self._telemetry = Telemetry(version)
        self._default_threshold = default_threshold
        self._thresholds = dict.fromkeys(Role, default_threshold)
        self._claim_idle_ms = claim_idle_ms
        self._frame_s = frame_s  # the slowest of late
        self._usual_s = frame_s
        self._hand_s = hand_s
        self._at_least = min(at_least, prefetch)
        self._prefetch = prefetch
        self._room = asyncio.Semaphore(prefetch)
        # On a slow line a read takes its time, and what it brings is not there to be claimed.
        self._fetching = asyncio.Lock()
        self._route: Route | None = None
        self._role = Role.IDLE
        self._working = asyncio.Event()
        self._promoted = asyncio.Event()
        # What is judged now, and since when; the oldest first.
        self._in_hand: dict[tuple[Role, str], tuple[asyncio.Task[None], float]] = {}
        self._outbox = Outbox(
            self._sources, together=prefetch // TOGETHER, coming=lambda: len(self._in_hand), gather=self._gather
        )

    @property
    def role(self) -> Role:
        """What this version does now."""
        return self._role

    @property
    def live(self) -> bool:
        """Whether this version is the live one."""
        return self._role is Role.LIVE

    @property
    def threshold(self) -> float:
        """The threshold of its role where the route has one, else the bundle's."""
        return self._default_threshold if self._role is Role.IDLE else self._thresholds[self._role]

    async def run(self, stop: asyncio.Event) -> None:
        """Work until stopped; then finish what is in hand and emit it.

        Raises:
            Exception: What ended a step for good: a worker that no longer reads must not go on looking healthy.
        """
        stopping = asyncio.create_task(stop.wait())
        never = asyncio.Event()
        reader = asyncio.create_task(self._repeat(self._read, stop))
        emitter = asyncio.create_task(self._repeat(self._outbox.emit, never))
        others = [asyncio.create_task(self._repeat(step, stop)) for step in (self._follow, self._claim)]
        ended, _ = await asyncio.wait((stopping, reader, emitter, *others), return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        self._become(Role.IDLE)
        # A read is let end, within BLOCK_MS: frames that Redis has handed out already would wait for a claim.
        await asyncio.wait([reader])
        if self._in_hand:
            await asyncio.wait([task for task, _ in self._in_hand.values()], timeout=DRAIN_S)
        emptied = asyncio.create_task(self._outbox.emptied.wait())
        await asyncio.wait((emptied, emitter), timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
        if self._outbox:
            log.warning("not_emitted", frames=len(self._outbox))
        for closing in (stopping, emitter, emptied):
            closing.cancel()
        await asyncio.wait((stopping, emitter, emptied))
        for done in ended:
            done.result()

    async def _repeat(self, step: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        while not stop.is_set():
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
        before = self._role
        self._route = route
        role, asked = Role.IDLE, None
        if route is not None and route.live.digest == self._version.digest:
            role, asked = Role.LIVE, route.live.threshold
        elif route is not None and route.candidate and route.candidate.digest == self._version.digest:
            role, asked = Role.CANDIDATE, route.candidate.threshold
        if role is not Role.IDLE:
            self._thresholds[role] = self._default_threshold if asked is None else asked
        self._become(role)
        if role is not before:
            log.info("role", role=role.value, model=self._version.name, version=self._version.version)
        if route is None:
            await asyncio.sleep(RECONNECT_S)

    def _become(self, role: Role) -> None:
        self._role = role
        # On a shared node live needs the other cores.
        self._pipeline.stand_aside(aside=role is Role.CANDIDATE)
        if role is Role.LIVE:
            self._promoted.set()
        else:
            self._promoted.clear()
        if role is Role.IDLE:
            self._working.clear()
        else:
            self._working.set()

    async def _read(self) -> None:
        """Take as many new frames as there is room for."""
        if not self._working.is_set() or self._outbox.full:
            with suppress(TimeoutError):
                event = self._outbox.emptied if self._working.is_set() else self._working
                await asyncio.wait_for(event.wait(), BLOCK_MS / 1000)
            return
        most = self._prefetch
        if self._hand_s < most * self._usual_s:
            most = max(self._at_least, int(self._hand_s / self._usual_s))
        # Half of all room at least: with much to do, a read for each frame alone costs Redis and us a good part of it.
        empty, count = self._prefetch - most, max(1, most // 2)
        for _ in range(empty + count):
            await self._room.acquire()
        if not self._working.is_set():  # meanwhile
            for _ in range(empty + count):
                self._room.release()
            return
        role = self._role
        while not self._room.locked() and count < most:
            await self._room.acquire()
            count += 1
        frames: list[QueuedFrame] = []
        try:
            block_ms = BLOCK_MS if role is Role.LIVE else min(BLOCK_MS, CANDIDATE_BLOCK_MS)
            async with self._fetching:
                frames = await self._sources[role].read(count=count, block_ms=block_ms)
            more = len(frames) == count
            self._outbox.together = self._prefetch // (TOGETHER_OF_MORE if more else TOGETHER)
        finally:
            for _ in range(empty + count - len(frames)):
                self._room.release()
            for frame in frames:
                self._take(role, frame)
        if role is Role.CANDIDATE and 0 < len(frames) < count:
            await self._gather()

    async def _gather(self) -> None:
        """As a candidate, let more come; once it is live nothing waits."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._promoted.wait(), GATHER_S)

    async def _claim(self) -> None:
        """Take over what others left."""
        await asyncio.sleep(self._claim_idle_ms / 3000)
        role = self._role
        if role is Role.IDLE:
            return
        idle_ms = max(self._claim_idle_ms, int(PATIENCE * self._prefetch * self._frame_s * 1000))
        oldest = next((since for _, since in self._in_hand.values()), math.inf)
        if time.monotonic() - oldest > max(HUNG_S, HUNG_TIMES * idle_ms / 1000):
            raise RuntimeError("a run of the model does not end")
        async with self._fetching:
            # Our own, slow or waiting to be emitted.
            held = {entry_id for of, entry_id in self._in_hand if of is role} | self._outbox.held(role)
            claimed = await self._sources[role].claim(min_idle_ms=idle_ms, count=CLAIM_AT_MOST, held=held)
        for frame in claimed:
            await self._room.acquire()
            self._take(role, frame)

    def _take(self, role: Role, frame: QueuedFrame) -> None:
        task = asyncio.create_task(self._process(role, frame))
        self._in_hand[role, frame.entry_id] = (task, time.monotonic())

    async def _process(self, role: Role, frame: QueuedFrame) -> None:
        read_us = time.time_ns() // 1000
        header = types_pb2.FrameHeader()
        emission: Emission | None
        try:
            header.ParseFromString(frame.header)
            compared = self._compared(header.frame_id)
            if role is Role.CANDIDATE and not compared:
                emission = Emission(frame.entry_id, header.frame_id, b"", b"")
            else:
                emission = await self._judged(role, frame, header, read_us=read_us, compared=compared)
        except DecodeError:
            broken = InvalidInput("HEADER_UNREADABLE", "the frame's header is broken")
            emission = self._failed(role, frame, header, read_us, broken)
        except VigilError as error:
            emission = self._failed(role, frame, header, read_us, error)
        except Exception as error:
            # The runtime failed on this frame: leave it to be delivered again, and to die after its last delivery.
            log.exception("run_failed", frame_id=header.frame_id, detail=str(error))
            FRAMES.labels("run_failed").inc()
            emission = None
        del self._in_hand[role, frame.entry_id]
        self._room.release()
        if emission:
            self._outbox.put(role, emission)
        else:
            self._outbox.let_out()

    def _compared(self, frame_id: str) -> bool:
        """Whether shadow will look at both versions' verdicts of this frame."""
        candidate = self._route.candidate if self._route else None
        return candidate is not None and sampled(frame_id, candidate.sample_fraction)

    async def _judged(
        self, role: Role, frame: QueuedFrame, header: types_pb2.FrameHeader, *, read_us: int, compared: bool
    ) -> Emission:
        if frame.deliveries > MAX_DELIVERIES:
            raise InvalidInput(
                "MAX_DELIVERIES", f"given up after {MAX_DELIVERIES} deliveries: each worker died or hung on it"
            )
        self._telemetry.read(header, read_us)
        pictures = role is Role.LIVE and header.HasField("outputs") and convert.wants_pictures(header.outputs)
        judged = await self._pipeline.judge(frame.image, pictures=pictures or compared)
        took_s = judged.decode_s + judged.inference_s
        self._frame_s = max(self._frame_s * 0.99, took_s)
        self._usual_s += (took_s - self._usual_s) / USUAL_OF
        found = convert.verdict(
            judged,
            frame_id=header.frame_id,
            model=self._version,
            threshold=self._thresholds[role],
            received_us=header.received_at.ToMicroseconds(),
            read_us=read_us,
        )
        outcome = reply = _serialised(found)
        shown = b""
        if compared:
            convert.add_small_pictures(found, judged)
            shown = _serialised(found)
        if pictures:
            found.ClearField("anomaly_map")
            found.ClearField("mask")
            await convert.draw(found, judged, header.outputs)
            reply = _serialised(found)
        self._telemetry.judged(role, header, read_us, judged, found)
        if role is Role.CANDIDATE:
            return Emission(frame.entry_id, header.frame_id, shown, b"", header=frame.header)
        return Emission(frame.entry_id, header.frame_id, outcome, reply, compared=shown)

    def _failed(
        self, role: Role, frame: QueuedFrame, header: types_pb2.FrameHeader, read_us: int, error: VigilError
    ) -> Emission:
        self._telemetry.failed(role, header, read_us, error)
        data = types_pb2.Outcome(frame_id=header.frame_id, failure=to_status(error)).SerializeToString()
        return Emission(frame.entry_id, header.frame_id, data, data, error.reason, header=frame.header)


def _serialised(found: types_pb2.Verdict) -> bytes:
    return types_pb2.Outcome(frame_id=found.frame_id, verdict=found).SerializeToString()
