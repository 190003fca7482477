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
from prometheus_client import Counter, Histogram
from vigil.types.v1 import types_pb2
from vigil_common import trace
from vigil_common.errors import InvalidInput, Unavailable, VigilError
from vigil_common.grpc.errors import to_status
from vigil_common.logging import get_logger
from vigil_common.streams.ports import Emission, FrameSource, QueuedFrame, Route, RoutingTable, sampled

from vigil_inference import convert
from vigil_inference.roles import Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vigil_inference.pipeline import Pipeline

FRAMES = Counter("vigil_inference_frames_total", "Frames by how judging them ended", ["outcome"])
INFERENCE = Histogram(
    "vigil_inference_run_seconds",
    "The model's run, or an image's share of it",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
QUEUED = Histogram(
    "vigil_inference_queue_seconds",
    "From acceptance until a worker read the frame",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 300),
)
# Their mean moving is the first sign that light, camera or product changed.
SCORES = Histogram(
    "vigil_inference_score",
    "Anomaly scores",
    ["model", "version"],
    buckets=(0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0),
)
# A label's child is looked up once, not for each frame.
JUDGED = FRAMES.labels("judged")
BLOCK_MS = 500
# A candidate waits for less: once it is promoted its read brings nothing more, and live's frames would wait for it.
CANDIDATE_BLOCK_MS = 50
# Nobody waits for a candidate, so its frames and verdicts gather: a call for each would cost Redis what live's do.
GATHER_S = 1.0
RECONNECT_S = 0.2
EMIT_AT_MOST = 32
# With large pictures few go together: what a slow line doesn't carry within Redis' time-out would be sent for ever.
EMIT_BYTES = 4 << 20
# Of what a worker can have in hand, this part is emitted together: with much to do, a call for each verdict alone would
# cost Redis, ingest and the client a good part of what they do for it. A larger part where more waits than it can have.
TOGETHER, TOGETHER_OF_MORE = 4, 2
# Verdicts that wait for Redis; past this, no more frames are taken.
OUTBOX_AT_MOST, OUTBOX_BYTES = 128, 64 << 20
CLAIM_AT_MOST = 16
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
    ) -> None:
        self._sources = {Role.LIVE: source, Role.CANDIDATE: shadow}
        self._routing = routing
        self._pipeline = pipeline
        self._version = version
        self._scores = SCORES.labels(version.name, str(version.version))
        self._default_threshold = default_threshold
        self._thresholds = dict.fromkeys(Role, default_threshold)
        self._claim_idle_ms = claim_idle_ms
        self._frame_s = frame_s  # the slowest of late
        self._prefetch = prefetch
        self._more = False  # waited when we last read
        self._room = asyncio.Semaphore(prefetch)
        self._route: Route | None = None
        self._role = Role.IDLE
        self._working = asyncio.Event()
        self._promoted = asyncio.Event()
        # What is judged now, and since when; the oldest first.
        self._in_hand: dict[tuple[Role, str], tuple[asyncio.Task[None], float]] = {}
        self._outbox: list[tuple[Role, Emission]] = []
        self._outgoing = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

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
        emitter = asyncio.create_task(self._repeat(self._emit, never))
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
        emptied = asyncio.create_task(self._emptied.wait())
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
        waiting = sum(_bytes(emission) for _, emission in self._outbox)
        if not self._working.is_set() or len(self._outbox) >= OUTBOX_AT_MOST or waiting >= OUTBOX_BYTES:
            with suppress(TimeoutError):
                event = self._emptied if self._working.is_set() else self._working
                await asyncio.wait_for(event.wait(), BLOCK_MS / 1000)
            return
        # Half of all room at least: with much to do, a read for each frame alone costs Redis and us a good part of it.
        count = max(1, self._prefetch // 2)
        for _ in range(count):
            await self._room.acquire()
        if not self._working.is_set():  # meanwhile
            for _ in range(count):
                self._room.release()
            return
        role = self._role
        while not self._room.locked() and count < self._prefetch:
            await self._room.acquire()
            count += 1
        frames: list[QueuedFrame] = []
        try:
            block_ms = BLOCK_MS if role is Role.LIVE else min(BLOCK_MS, CANDIDATE_BLOCK_MS)
            frames = await self._sources[role].read(count=count, block_ms=block_ms)
            self._more = len(frames) == count
        finally:
            for _ in range(count - len(frames)):
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
        # Our own, slow or waiting to be emitted.
        ours = self._in_hand.keys() | {(of, ready.entry_id) for of, ready in self._outbox}
        held = {entry_id for of, entry_id in ours if of is role}
        for frame in await self._sources[role].claim(min_idle_ms=idle_ms, count=CLAIM_AT_MOST, held=held):
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
            self._outbox.append((role, emission))
            self._emptied.clear()
        self._let_out()

    def _let_out(self) -> None:
        """Let what is ready be emitted, unless it soon has company."""
        together = self._prefetch // (TOGETHER_OF_MORE if self._more else TOGETHER)
        if self._outbox and (len(self._outbox) >= together or len(self._in_hand) < together):
            self._outgoing.set()
        else:
            self._outgoing.clear()

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
        received_us = header.received_at.ToMicroseconds()
        QUEUED.observe(max(0, read_us - received_us) / 1e6)
        pictures = role is Role.LIVE and header.HasField("outputs") and convert.wants_pictures(header.outputs)
        judged = await self._pipeline.judge(frame.image, pictures=pictures or compared)
        INFERENCE.observe(judged.inference_s)
        self._frame_s = max(self._frame_s * 0.99, judged.decode_s + judged.inference_s)
        found = convert.verdict(
            judged,
            frame_id=header.frame_id,
            model=self._version,
            threshold=self._thresholds[role],
            received_us=received_us,
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
        JUDGED.inc()
        self._scores.observe(judged.score)
        log.debug(
            "frame_judged",
            **self._context(header),
            score=judged.score,
            label=types_pb2.Label.Name(found.label),
            duration_s=time.time() - received_us / 1e6,
        )
        if trace.wanted(header.traceparent):
            said: dict[str, str | float] = {
                "vigil.score": judged.score,
                "vigil.label": types_pb2.Label.Name(found.label).removeprefix("LABEL_").lower(),
                "vigil.threshold": found.threshold,
                "vigil.queue_s": found.timing.queue.ToMicroseconds() / 1e6,
                "vigil.decode_s": judged.decode_s,
                "vigil.inference_s": judged.inference_s,
            }
            self._record(role, header, read_us, said)
        if role is Role.CANDIDATE:
            return Emission(frame.entry_id, header.frame_id, shown, b"", header=frame.header)
        return Emission(frame.entry_id, header.frame_id, outcome, reply, compared=shown)

    def _record(
        self, role: Role, header: types_pb2.FrameHeader, read_us: int, said: trace.Attributes, error: str = ""
    ) -> None:
        """The frame's span, from its reading until now."""
        about: dict[str, str | int | float | bool] = {
            "vigil.frame_id": header.frame_id,
            "vigil.model": self._version.name,
            "vigil.version": self._version.version,
            "vigil.role": role.value,
        }
        trace.record(
            "judge frame", header.traceparent, began_ns=read_us * 1000, attributes={**about, **said}, error=error
        )

    def _failed(
        self, role: Role, frame: QueuedFrame, header: types_pb2.FrameHeader, read_us: int, error: VigilError
    ) -> Emission:
        FRAMES.labels(error.reason.lower()).inc()
        log.info("frame_dead", **self._context(header), reason=error.reason)
        if trace.wanted(header.traceparent):
            self._record(role, header, read_us, {}, error.reason)
        data = types_pb2.Outcome(frame_id=header.frame_id, failure=to_status(error)).SerializeToString()
        return Emission(frame.entry_id, header.frame_id, data, data, error.reason, header=frame.header)

    def _context(self, header: types_pb2.FrameHeader) -> dict[str, str | int]:
        """What every line on a frame says."""
        return {
            "frame_id": header.frame_id,
            "trace_id": trace.trace_id(header.traceparent),
            "model": self._version.name,
            "version": self._version.version,
        }

    async def _emit(self) -> None:
        """Send what is ready; what becomes ready meanwhile goes with the next."""
        await self._outgoing.wait()
        role = self._outbox[0][0]
        if role is Role.CANDIDATE and len(self._outbox) < EMIT_AT_MOST:
            await self._gather()
        batch: list[Emission] = []
        size = 0
        for of, emission in self._outbox[:EMIT_AT_MOST]:
            size += _bytes(emission)
            if of is not role or (batch and size > EMIT_BYTES):
                break
            batch.append(emission)
        won = await self._sources[role].emit(batch)
        del self._outbox[: len(batch)]
        self._let_out()
        if not self._outbox:
            self._emptied.set()
        if not all(won):
            log.info("others_were_first", frames=won.count(False))


def _bytes(emission: Emission) -> int:
    """What it sends."""
    reply = 0 if emission.reply is emission.outcome else len(emission.reply)
    return len(emission.outcome) + reply + len(emission.compared)


def _serialised(found: types_pb2.Verdict) -> bytes:
    return types_pb2.Outcome(frame_id=found.frame_id, verdict=found).SerializeToString()
