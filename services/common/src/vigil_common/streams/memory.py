"""The streams in one process' memory, for unit tests: the same promises as on Redis, none of the durability."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vigil_common.streams.ports import (
    Admission,
    Admitted,
    Candidate,
    Depth,
    Live,
    QueuedFrame,
    QueuedOutcome,
    QueuedAnnotation,
    Route,
    check_roles,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vigil_common.streams.ports import Emission

ENTRY_OVERHEAD_BYTES = 512


@dataclass(slots=True)
class _Known:
    sha256: bytes
    reply_to: str
    in_flight: bool = True
    judged: bytes | None = None


@dataclass(slots=True)
class _Pending:
    consumer: str
    since: float
    deliveries: int


@dataclass(slots=True)
class _Model:
    frames: dict[int, QueuedFrame] = field(default_factory=dict)
    delivered: int = 0
    pending: dict[int, _Pending] = field(default_factory=dict)
    verdicts: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    verdict_delivered: int = 0
    verdict_pending: set[int] = field(default_factory=set)
    unstored: set[int] = field(default_factory=set)
    replies: dict[str, list[bytes]] = field(default_factory=dict)
    known: dict[str, _Known] = field(default_factory=dict)
    dead: list[tuple[str, str]] = field(default_factory=list)
    owner: str = ""
    owned_until: float = 0.0
    last_id: int = 0
    route: Route | None = None


class MemoryStreams:
    """Everything in this process.

    Args:
        budget_bytes: Bytes of frames that a model's queue may hold.
        clock: Seconds, monotonic.
    """

    def __init__(self, *, budget_bytes: int = 256 << 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._models: dict[str, _Model] = {}
        self._changed = asyncio.Condition()
        self._budget_bytes = budget_bytes
        self._clock = clock
        self.queue = MemoryFrameQueue(self)
        self.routing = MemoryRouting(self)
        self.reviews = MemoryReviewLog(self)

    def source(self, model: str, consumer: str) -> MemoryFrameSource:
        """A worker's side of a model."""
        return MemoryFrameSource(self, model, consumer)

    def outcomes(self, model: str, consumer: str) -> MemoryOutcomeSource:
        """Storage's side of a model."""
        return MemoryOutcomeSource(self, model, consumer)

    def state(self, model: str) -> _Model:
        """What is known of a model."""
        return self._models.setdefault(model, _Model())

    def held_bytes(self, model: str) -> int:
        """Bytes counted against the budget."""
        frames = self.state(model).frames.values()
        return sum(len(frame.header) + len(frame.image) + ENTRY_OVERHEAD_BYTES for frame in frames)

    async def until(self, condition: Callable[[], bool], block_ms: int) -> None:
        """Wait for a condition, at most so long."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), block_ms / 1000)
            except TimeoutError:
                return

    async def changed(self) -> None:
        """Wake everyone who waits."""
        async with self._changed:
            self._changed.notify_all()

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self._budget_bytes

    def now(self) -> float:
        """The clock."""
        return self._clock()

    async def close(self) -> None:
        """Nothing to release."""


class MemoryFrameQueue:
    """Ingest's side."""

    def __init__(self, streams: MemoryStreams) -> None:
        self._streams = streams

    async def admit(
        self, model: str, *, frame_id: str, sha256: bytes, header: bytes, image: bytes, reply_to: str
    ) -> Admitted:
        """Put a frame into the queue once."""
        state = self._streams.state(model)
        known = state.known.get(frame_id)
        if known:
            if known.sha256 != sha256:
                return Admitted(Admission.REUSED)
            if known.judged is not None:
                return Admitted(Admission.JUDGED, known.judged)
            if known.in_flight:
                known.reply_to = reply_to or known.reply_to
                return Admitted(Admission.PENDING)
        size = len(header) + len(image) + ENTRY_OVERHEAD_BYTES
        if self._streams.held_bytes(model) + size > self._streams.budget_bytes:
            return Admitted(Admission.FULL)
        state.last_id += 1
        state.frames[state.last_id] = QueuedFrame(str(state.last_id), header, image)
        state.known[frame_id] = _Known(sha256, reply_to)
        await self._streams.changed()
        return Admitted(Admission.ADMITTED)

    async def read_replies(self, model: str, reply_to: str, after: str, *, block_ms: int) -> tuple[str, list[bytes]]:
        """Outcomes after this place."""
        replies = self._streams.state(model).replies.setdefault(reply_to, [])
        start = int(after)
        await self._streams.until(lambda: len(replies) > start, block_ms)
        return str(len(replies)), replies[start:]

    async def depth(self, model: str) -> Depth:
        """How full it is."""
        state = self._streams.state(model)
        unread = sum(1 for entry in state.frames if entry > state.delivered)
        return Depth(
            frames=len(state.frames),
            image_bytes=self._streams.held_bytes(model),
            unjudged=unread + len(state.pending),
            unstored=len(state.unstored),
            dead=len(state.dead),
        )

    async def close(self) -> None:
        """Nothing to release."""


class MemoryFrameSource:
    """A worker's side of one model."""

    def __init__(self, streams: MemoryStreams, model: str, consumer: str) -> None:
        self._streams = streams
        self._state = streams.state(model)
        self._consumer = consumer

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer."""
        state = self._state
        await self._streams.until(lambda: any(entry > state.delivered for entry in state.frames), block_ms)
        entries = [entry for entry in state.frames if entry > state.delivered][:count]
        for entry in entries:
            state.delivered = entry
            state.pending[entry] = _Pending(self._consumer, self._streams.now(), 1)
        return [state.frames[entry] for entry in entries]

    async def claim(self, *, min_idle_ms: int, count: int) -> list[QueuedFrame]:
        """Frames that another consumer left."""
        now = self._streams.now()
        claimed: list[QueuedFrame] = []
        for entry, pending in sorted(self._state.pending.items()):
            if (now - pending.since) * 1000 >= min_idle_ms and len(claimed) < count:
                deliveries = pending.deliveries + 1
                self._state.pending[entry] = _Pending(self._consumer, now, deliveries)
                claimed.append(replace(self._state.frames[entry], deliveries=deliveries))
        return claimed

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome, reply and acknowledgement in one step."""
        state, won = self._state, []
        for emission in emissions:
            entry = int(emission.entry_id)
            won.append(state.pending.pop(entry, None) is not None)
            if not won[-1]:
                continue
            state.verdicts[max(state.verdicts, default=state.verdict_delivered) + 1] = (entry, emission.outcome)
            state.unstored.add(entry)
            if emission.dead_reason:
                state.dead.append((emission.frame_id, emission.dead_reason))
            known = state.known[emission.frame_id]
            known.in_flight = False
            if emission.reply == emission.outcome:
                known.judged = emission.outcome
            if known.reply_to:
                state.replies.setdefault(known.reply_to, []).append(emission.reply)
        await self._streams.changed()
        return won

    async def close(self) -> None:
        """Nothing to release."""


class MemoryOutcomeSource:
    """Storage's side of one model."""

    def __init__(self, streams: MemoryStreams, model: str, consumer: str) -> None:
        self._streams = streams
        self._state = streams.state(model)
        self._consumer = consumer
        self._pending_after = 0

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease."""
        now = self._streams.now()
        if self._state.owner not in ("", self._consumer) and now < self._state.owned_until:
            return False
        self._state.owner = self._consumer if ttl_ms else ""
        self._state.owned_until = now + ttl_ms / 1000
        return True

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[QueuedOutcome]:
        """New outcomes with their frames, or those that were taken and not finished."""
        state = self._state
        if pending:
            entries = sorted(entry for entry in state.verdict_pending if entry > self._pending_after)[:count]
            self._pending_after = entries[-1] if entries else 0
        else:
            await self._streams.until(
                lambda: any(entry > state.verdict_delivered for entry in state.verdicts), block_ms
            )
            entries = sorted(entry for entry in state.verdicts if entry > state.verdict_delivered)[:count]
            state.verdict_delivered = max(entries, default=state.verdict_delivered)
            state.verdict_pending.update(entries)
        found = [(entry, *state.verdicts[entry]) for entry in entries]
        return [QueuedOutcome(str(entry), outcome, state.frames.get(frame)) for entry, frame, outcome in found]

    async def done(self, outcomes: Sequence[QueuedOutcome]) -> None:
        """Free their frames."""
        for outcome in outcomes:
            self._state.verdict_pending.discard(int(outcome.entry_id))
            if outcome.frame:
                self._state.unstored.discard(int(outcome.frame.entry_id))

    async def trim(self) -> int:
        """Drop what nobody needs any more."""
        state = self._state
        low = min([*state.pending, *state.unstored, state.delivered + 1])
        gone = [entry for entry in state.frames if entry < low]
        for entry in gone:
            del state.frames[entry]
        verdict_low = min([*state.verdict_pending, state.verdict_delivered + 1])
        for entry in [entry for entry in state.verdicts if entry < verdict_low]:
            del state.verdicts[entry]
        return len(gone)

    async def close(self) -> None:
        """Give the lease back."""
        await self.own(ttl_ms=0)


class MemoryRouting:
    """Roles of the versions."""

    def __init__(self, streams: MemoryStreams) -> None:
        self._streams = streams
        self._routes: dict[str, Route] = {}
        self._generations: dict[str, int] = {}

    async def get(self, model: str) -> Route | None:
        """The model's route."""
        return self._routes.get(model)

    async def models(self) -> list[str]:
        """Every model that has a route, or had one and has frames left."""
        left = (model for model in self._generations if self._streams.state(model).frames)
        return sorted({*self._routes, *left})

    async def write(self, model: str, *, live: Live, candidate: Candidate | None = None) -> Route:
        """Write the whole record."""
        check_roles(live, candidate)
        generation = self._generations[model] = self._generations.get(model, 0) + 1
        before = self._routes.get(model)
        comparison = generation if candidate else 0
        if candidate and before and before.candidate:
            old = before.candidate
            versions = (live.digest, live.threshold, candidate.digest, candidate.threshold)
            if (before.live.digest, before.live.threshold, old.digest, old.threshold) == versions:
                comparison = before.comparison
        route = self._routes[model] = Route(model, live, candidate, generation, comparison)
        await self._streams.changed()
        return route

    async def promote(self, model: str, *, version: int, digest: str, threshold: float | None) -> Route:
        """Make a version live and end any comparison."""
        return await self.write(model, live=Live(version, digest, threshold))

    async def remove(self, model: str) -> None:
        """Delete the route."""
        self._routes.pop(model, None)

    async def wait(self, model: str, generation: int, *, block_ms: int) -> Route | None:
        """The route once it has changed, or after the wait."""

        def moved() -> bool:
            route = self._routes.get(model)
            return route is not None and route.generation != generation

        await self._streams.until(moved, block_ms)
        return self._routes.get(model)


class MemoryReviewLog:
    """What people say, and what they were given."""

    LIMIT = 256

    def __init__(self, streams: MemoryStreams) -> None:
        self._streams = streams
        self._annotations: dict[str, dict[str, QueuedAnnotation]] = {}
        self._given: dict[tuple[str, str], set[str]] = {}
        self._last = 0

    async def put(self, model: str, annotation_id: str, body: bytes, mask: bytes) -> str | None:
        """Its place in the log."""
        annotations = self._annotations.setdefault(model, {})
        if annotation_id in annotations:
            return annotations[annotation_id].place
        if len(annotations) >= self.LIMIT:
            return None
        self._last += 1
        annotations[annotation_id] = QueuedAnnotation(f"{self._last}-0", annotation_id, body, mask)
        await self._streams.changed()
        return annotations[annotation_id].place

    async def read(self, model: str, after: str, *, count: int, block_ms: int) -> list[QueuedAnnotation]:
        """What was said after this place."""

        def found() -> list[QueuedAnnotation]:
            start = int(after.partition("-")[0])
            annotations = self._annotations.get(model, {}).values()
            return [one for one in annotations if int(one.place.partition("-")[0]) > start][:count]

        await self._streams.until(lambda: bool(found()), block_ms)
        return found()

    async def done(self, model: str, annotations: Sequence[QueuedAnnotation]) -> None:
        """Forget them."""
        for one in annotations:
            self._annotations.get(model, {}).pop(one.annotation_id, None)

    async def give(self, model: str, reviewer: str, frame_ids: Sequence[str]) -> None:
        """Remember what a reviewer has been given."""
        self._given.setdefault((model, reviewer), set()).update(frame_ids)

    async def given(self, model: str, reviewer: str) -> set[str]:
        """What a reviewer has been given."""
        return set(self._given.get((model, reviewer), set()))
