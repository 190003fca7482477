"""The streams in one process' memory, for unit tests: the same promises as on Redis, none of the durability."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vigil_common.streams.ports import (
    Admission,
    Admitted,
    Candidate,
    ComparedVerdict,
    Depth,
    Live,
    QueuedAnnotation,
    QueuedFrame,
    QueuedOutcome,
    ReportPlace,
    Route,
    check_roles,
    route_changed,
    sampled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from vigil_common.streams.ports import Disagreed, Emission, ReportStep

ENTRY_OVERHEAD_BYTES = 512
SHADOW_VERDICTS_AT_MOST = 16_384
SHADOW_FRAMES_AT_MOST = 1_000
DISAGREEMENTS_AT_MOST = 1_000
REPLIES_BYTES_AT_MOST = 64 << 20


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
    replies: dict[str, dict[int, bytes]] = field(default_factory=dict)
    last_reply: int = 0
    known: dict[str, _Known] = field(default_factory=dict)
    dead: list[tuple[str, str]] = field(default_factory=list)
    owner: str = ""
    owned_until: float = 0.0
    last_id: int = 0
    compared_from: int = 0
    shadow_delivered: int = 0
    shadow_pending: dict[int, _Pending] = field(default_factory=dict)
    shadow_verdicts: dict[int, ComparedVerdict] = field(default_factory=dict)
    shadow_number: int = 0
    shadow_owner: str = ""
    shadow_owned_until: float = 0.0
    last_comparison: int = 0
    reports: dict[str, _Report] = field(default_factory=dict)
    cursors: dict[str, tuple[str, int]] = field(default_factory=dict)
    comparisons: dict[int, bytes] = field(default_factory=dict)
    comparison_delivered: int = 0


@dataclass(slots=True)
class _Report:
    fields: dict[str, str] = field(default_factory=dict)
    joint: Counter[str] = field(default_factory=Counter)
    open: dict[str, bytes] = field(default_factory=dict)
    worst: dict[str, Disagreed] = field(default_factory=dict)


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
        self.reports = MemoryReports(self)
        self.reviews = MemoryReviewLog(self)

    def source(self, model: str, consumer: str) -> MemoryFrameSource:
        """A worker's side of a model."""
        return MemoryFrameSource(self, model, consumer)

    def candidate(self, model: str, consumer: str, digest: str) -> MemoryCandidateSource:
        """A worker's side of a model whose candidate it is."""
        return MemoryCandidateSource(self, model, consumer, digest)

    def outcomes(self, model: str, consumer: str) -> MemoryOutcomeSource:
        """Storage's side of a model."""
        return MemoryOutcomeSource(self, model, consumer)

    def comparisons(self, model: str) -> MemoryComparisonSource:
        """Storage's side of a model's comparisons."""
        return MemoryComparisonSource(self, model)

    def verdicts(self, model: str, consumer: str) -> MemoryVerdictSource:
        """Shadow's side of a model."""
        return MemoryVerdictSource(self, model, consumer)

    def state(self, model: str) -> _Model:
        """What is known of a model."""
        return self._models.setdefault(model, _Model())

    def held_bytes(self, model: str) -> int:
        """Bytes counted against the budget."""
        return sum(map(self.size, self.state(model).frames.values()))

    @staticmethod
    def size(frame: QueuedFrame) -> int:
        """What a frame counts against the budget."""
        return len(frame.header) + len(frame.image) + ENTRY_OVERHEAD_BYTES

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
        """Outcomes after this place; those before it go."""
        replies = self._streams.state(model).replies.setdefault(reply_to, {})
        for place in [place for place in replies if place <= int(after)]:
            del replies[place]
        await self._streams.until(lambda: bool(replies), block_ms)
        return str(max(replies, default=after)), list(replies.values())

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
        self._model = model
        self._state = streams.state(model)
        self._consumer = consumer

    @property
    def _pending(self) -> dict[int, _Pending]:
        return self._state.pending

    def _unread(self) -> list[int]:
        return [entry for entry in self._state.frames if entry > self._state.delivered]

    def _delivered(self, entry: int) -> None:
        self._state.delivered = entry

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer."""
        await self._streams.until(lambda: bool(self._unread()), block_ms)
        entries = self._unread()[:count]
        for entry in entries:
            self._delivered(entry)
            self._pending[entry] = _Pending(self._consumer, self._streams.now(), 1)
        return [self._state.frames[entry] for entry in entries]

    async def claim(self, *, min_idle_ms: int, count: int, held: Collection[str] = ()) -> list[QueuedFrame]:
        """Frames that a consumer left."""
        now = self._streams.now()
        claimed: list[QueuedFrame] = []
        for entry, pending in sorted(self._pending.items()):
            left = (now - pending.since) * 1000 >= min_idle_ms and self._state.frames[entry].entry_id not in held
            if left and len(claimed) < count:
                deliveries = pending.deliveries + 1
                self._pending[entry] = _Pending(self._consumer, now, deliveries)
                claimed.append(replace(self._state.frames[entry], deliveries=deliveries))
        return claimed

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome, reply and acknowledgement in one step."""
        state, won = self._state, []
        route = await self._streams.routing.get(self._model)
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
                self._reply(known.reply_to, emission.reply)
            candidate = route.candidate if route and entry > state.compared_from else None
            if route and candidate and sampled(emission.frame_id, candidate.sample_fraction):
                self._show(route, emission, emission.compared or emission.outcome, candidate=False)
        await self._streams.changed()
        return won

    def _reply(self, reply_to: str, reply: bytes) -> None:
        self._state.last_reply += 1
        replies = self._state.replies.setdefault(reply_to, {})
        replies[self._state.last_reply] = reply
        while len(replies) > 1 and sum(map(len, replies.values())) > REPLIES_BYTES_AT_MOST:
            del replies[min(replies)]

    def _show(self, route: Route, emission: Emission, outcome: bytes, *, candidate: bool) -> None:
        """Give one side's outcome to shadow."""
        self._state.shadow_number += 1
        number = self._state.shadow_number
        header = emission.header if candidate else b""
        self._state.shadow_verdicts[number] = ComparedVerdict(
            f"{number}-0", number, route.comparison, candidate, emission.frame_id, outcome, header
        )
        self._state.shadow_verdicts.pop(number - SHADOW_VERDICTS_AT_MOST, None)

    async def close(self) -> None:
        """Nothing to release."""


class MemoryCandidateSource(MemoryFrameSource):
    """A candidate's side of one model."""

    def __init__(self, streams: MemoryStreams, model: str, consumer: str, digest: str) -> None:
        super().__init__(streams, model, consumer)
        self._digest = digest

    @property
    def _pending(self) -> dict[int, _Pending]:
        return self._state.shadow_pending

    def _unread(self) -> list[int]:
        return [entry for entry in self._state.frames if entry > self._state.shadow_delivered]

    def _delivered(self, entry: int) -> None:
        self._state.shadow_delivered = entry

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome for shadow and acknowledgement in one step."""
        won = []
        route = await self._streams.routing.get(self._model)
        for emission in emissions:
            won.append(self._state.shadow_pending.pop(int(emission.entry_id), None) is not None)
            compared = route is not None and route.candidate is not None and route.candidate.digest == self._digest
            if won[-1] and emission.outcome and route and compared:
                self._show(route, emission, emission.outcome, candidate=True)
        await self._streams.changed()
        return won


class MemoryOutcomeSource:
    """Storage's side of one model."""

    def __init__(self, streams: MemoryStreams, model: str, consumer: str) -> None:
        self._streams = streams
        self._model = model
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
        route = await self._streams.routing.get(self._model)
        if route and route.candidate:
            wanted = min([*state.shadow_pending, state.shadow_delivered + 1])
            held = [entry for entry in state.frames if entry >= wanted]
            held_bytes = sum(self._streams.size(state.frames[entry]) for entry in held)
            alone = sum(1 for entry in held if entry < low)
            if 0 < alone <= SHADOW_FRAMES_AT_MOST and held_bytes <= self._streams.budget_bytes / 2:
                low = wanted
            elif alone:
                late = [entry for entry in state.shadow_pending if entry < low]
                unseen = [entry for entry in state.frames if state.shadow_delivered < entry < low]
                for entry in late:
                    del state.shadow_pending[entry]
                state.shadow_delivered = max(state.shadow_delivered, low - 1)
                fields = state.reports.setdefault(str(route.comparison), _Report()).fields
                fields["skipped"] = str(int(fields.get("skipped", "0")) + len(late) + len(unseen))
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
        self._fractions: dict[str, float] = {}

    async def get(self, model: str) -> Route | None:
        """The model's route."""
        return self._routes.get(model)

    async def models(self) -> list[str]:
        """Every model that has a route, or that something was left of."""
        left = (model for model in self._generations if self._streams.state(model).frames)
        return sorted({*self._routes, *left, *self._streams.reviews.annotated()})

    async def write(
        self,
        model: str,
        *,
        live: Live,
        candidate: Candidate | None = None,
        after: int | None = None,
        managed_by: str = "",
    ) -> Route:
        """Write the whole record."""
        check_roles(live, candidate)
        before = self._routes.get(model)
        if after is not None and after != (before.generation if before else 0):
            raise route_changed(model)
        generation = self._generations[model] = self._generations.get(model, 0) + 1
        comparison = generation if candidate else 0
        if candidate and before and before.candidate:
            old = before.candidate
            versions = (live.digest, live.threshold, candidate.digest, candidate.threshold)
            if (before.live.digest, before.live.threshold, old.digest, old.threshold) == versions:
                comparison = before.comparison
        route = self._routes[model] = Route(model, live, candidate, generation, comparison, managed_by)
        state = self._streams.state(model)
        if comparison == generation:
            state.compared_from = state.shadow_delivered = state.last_id
            state.last_comparison = comparison
        if not candidate or comparison == generation:
            state.shadow_pending.clear()
        if candidate:
            report = state.reports.setdefault(str(comparison), _Report())
            report.fields |= {
                "live_version": str(live.version),
                "live_digest": live.digest,
                "live_threshold": "" if live.threshold is None else repr(live.threshold),
                "candidate_version": str(candidate.version),
                "candidate_digest": candidate.digest,
                "candidate_threshold": "" if candidate.threshold is None else repr(candidate.threshold),
                "sample_fraction": repr(candidate.sample_fraction),
                "started_at_ms": str(int(time.time()) * 1000),
            }
        await self._streams.changed()
        return route

    async def promote(
        self, model: str, *, version: int, digest: str, threshold: float | None, after: int | None = None
    ) -> Route:
        """Make a version live and end any comparison."""
        return await self.write(model, live=Live(version, digest, threshold), after=after)

    async def remove(self, model: str) -> None:
        """Delete the route."""
        self._routes.pop(model, None)
        self._fractions.pop(model, None)

    async def kept_fraction(self, model: str) -> float | None:
        """Which part of the model's normal frames is stored."""
        return self._fractions.get(model)

    async def keep_fraction(self, model: str, fraction: float | None) -> None:
        """Say which part is stored, or take it back."""
        if fraction is None:
            self._fractions.pop(model, None)
        else:
            self._fractions[model] = fraction

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
        self._given: dict[tuple[str, str], list[str]] = {}
        self._last = 0

    async def put(self, model: str, annotation_id: str, body: bytes, mask: bytes) -> tuple[str, bytes] | None:
        """Place and body of what waits under the id."""
        annotations = self._annotations.setdefault(model, {})
        if waits := annotations.get(annotation_id):
            return waits.place, waits.body
        if len(annotations) >= self.LIMIT:
            return None
        self._last += 1
        put = annotations[annotation_id] = QueuedAnnotation(f"{self._last}-0", annotation_id, body, mask)
        await self._streams.changed()
        return put.place, put.body

    def annotated(self) -> list[str]:
        """Models of which something was said and waits."""
        return [model for model, waiting in self._annotations.items() if waiting]

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
        before = self._given.get((model, reviewer), [])
        self._given[model, reviewer] = [*(one for one in before if one not in frame_ids), *frame_ids]

    async def given(self, model: str, reviewer: str) -> list[str]:
        """What a reviewer has been given, the longest ago first."""
        return list(self._given.get((model, reviewer), []))


class MemoryVerdictSource:
    """Shadow's side of one model."""

    def __init__(self, streams: MemoryStreams, model: str, consumer: str) -> None:
        self._streams = streams
        self._state = streams.state(model)
        self._consumer = consumer

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease."""
        now = self._streams.now()
        if self._state.shadow_owner not in ("", self._consumer) and now < self._state.shadow_owned_until:
            return False
        self._state.shadow_owner = self._consumer if ttl_ms else ""
        self._state.shadow_owned_until = now + ttl_ms / 1000
        return True

    async def read(self, after: str, *, count: int, block_ms: int) -> list[ComparedVerdict]:
        """Verdicts after this place."""
        place = int(after.partition("-")[0])
        await self._streams.until(lambda: any(number > place for number in self._state.shadow_verdicts), block_ms)
        return [one for number, one in self._state.shadow_verdicts.items() if number > place][:count]

    async def close(self) -> None:
        """Give the lease back."""
        await self.own(ttl_ms=0)


class MemoryReports:
    """Reports of comparisons."""

    def __init__(self, streams: MemoryStreams) -> None:
        self._streams = streams

    def _report(self, model: str, run: str) -> _Report:
        return self._streams.state(model).reports.setdefault(run, _Report())

    async def latest(self, model: str) -> str | None:
        """The run of the comparison under way, or of the last one."""
        last = self._streams.state(model).last_comparison
        return str(last) if last else None

    async def place(self, model: str, run: str) -> ReportPlace:
        """Where to go on."""
        place, number = self._streams.state(model).cursors.get(_cursor(run), ("0-0", 0))
        return ReportPlace(place, number, dict(self._report(model, run).open))

    async def commit(self, model: str, run: str, step: ReportStep) -> bool:
        """Add a step, all of it or nothing."""
        state, report = self._streams.state(model), self._report(model, run)
        if state.cursors.get(_cursor(run), ("0-0", 0))[0] != step.after:
            return False
        state.cursors[_cursor(run)] = (step.upto, step.number)
        for name, value in step.adds.items():
            report.fields[name] = str(int(report.fields.get(name, "0")) + value)
        for name, value in step.greatest.items():
            report.fields[name] = str(max(value, int(report.fields.get(name, "-1"))))
        report.fields |= step.facts
        report.joint.update(step.joint)
        report.open.update(step.open)
        report.open = {frame: found for frame, found in report.open.items() if found}
        report.worst |= {one.frame_id: one for one in step.disagreements}
        worst = sorted(report.worst.values(), key=lambda one: one.severity, reverse=True)[:DISAGREEMENTS_AT_MOST]
        report.worst = {one.frame_id: one for one in worst}
        for comparison in step.comparisons:
            state.comparisons[max(state.comparisons, default=state.comparison_delivered) + 1] = comparison
        if _cursor(run) == _cursor(""):
            last = int(step.upto.partition("-")[0])
            state.shadow_verdicts = {n: one for n, one in state.shadow_verdicts.items() if n > last}
        await self._streams.changed()
        return True

    async def begin(self, model: str, run: str, fields: Mapping[str, str]) -> None:
        """Write fields that describe a run."""
        report = self._report(model, run)
        report.fields = {**fields, **report.fields}

    async def fields(self, model: str, run: str) -> dict[str, str]:
        """Counts and what describes the run."""
        return dict(self._report(model, run).fields)

    async def joint(self, model: str, run: str) -> dict[str, int]:
        """The joint histogram's cells."""
        return dict(self._report(model, run).joint)

    async def worst(self, model: str, run: str, *, start: int, count: int) -> list[bytes]:
        """Details of disagreements, worst first."""
        return [one.detail for one in list(self._report(model, run).worst.values())[start : start + count]]


def _cursor(run: str) -> str:
    return run if run.startswith("replay-") else ""


class MemoryComparisonSource:
    """Comparisons on their way to storage."""

    def __init__(self, streams: MemoryStreams, model: str) -> None:
        self._streams = streams
        self._state = streams.state(model)
        self._pending_after = 0

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[tuple[str, bytes]]:
        """Places and Comparisons, or those that were taken and not finished."""
        state = self._state
        if pending:
            known = sorted(place for place in state.comparisons if place <= state.comparison_delivered)
            places = [place for place in known if place > self._pending_after][:count]
            self._pending_after = places[-1] if places else 0
        else:
            await self._streams.until(
                lambda: any(place > state.comparison_delivered for place in state.comparisons), block_ms
            )
            places = sorted(place for place in state.comparisons if place > state.comparison_delivered)[:count]
            state.comparison_delivered = max(places, default=state.comparison_delivered)
        return [(str(place), state.comparisons[place]) for place in places]

    async def done(self, places: Sequence[str]) -> None:
        """Forget them."""
        for place in places:
            self._state.comparisons.pop(int(place), None)
