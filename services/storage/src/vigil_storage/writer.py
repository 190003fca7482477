"""From the queue into the store: nothing leaves the queue before the store is known to keep it.

One writer per model at a time, by lease. It writes one batch while it reads the next. What is written waits until a
query finds it again `confirm_after_s` later, in the same life of the server; only then the queue forgets it. What is
gone by then is read from the queue again.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vigil_common import trace
from vigil_common.errors import Conflict, InvalidInput, Unavailable
from vigil_common.logging import get_logger
from vigil_common.store.ports import Record, Written
from vigil_common.streams.supervise import for_each_model, wait

from vigil_storage import convert, domain, metrics
from vigil_storage.comparisons import ComparisonLabeller, Places
from vigil_storage.retention import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from vigil_common.store.ports import FrameStore
    from vigil_common.streams.ports import ComparisonSource, OutcomeSource, QueuedOutcome, RoutingTable

    from vigil_storage.annotations import AnnotationKeeper

READ_BLOCK_MS = 250
SETTLE_EVERY_S = 0.2
BACKOFF_S = (0.05, 5.0)

log = get_logger()


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How a writer works.

    Attributes:
        batch_size: Records per write, at most 64.
        lanes: Writes in flight at once, over different entries.
        flush_ms: How long a batch that is not full waits for more.
        confirm_after_s: How long after a write it is looked for: longer than two of the server's compaction intervals.
        max_unconfirmed: Frames written and not confirmed, at which reading pauses.
        lease_ms: How long a dead owner keeps others waiting.
    """

    batch_size: int = 32
    lanes: int = 4
    flush_ms: int = 50
    confirm_after_s: float = 2.5
    max_unconfirmed: int = 16_384
    lease_ms: int = 6_000


@dataclass(frozen=True, slots=True)
class _Unconfirmed:
    outcome: QueuedOutcome
    entry: str
    timestamp_us: int
    sha256: str
    written_at: float


class FrameWriter:
    """Stores the outcomes of one model; what else only its owner may do runs beside."""

    def __init__(
        self,
        model: str,
        source: OutcomeSource,
        store: FrameStore,
        options: WriterOptions,
        places: Places,
        *,
        clock: Callable[[], float] = time.monotonic,
        beside: Sequence[Callable[[], Coroutine[None, None, None]]] = (),
        sampling: Sampling | None = None,
    ) -> None:
        self._model = model
        self._source = source
        self._store = store
        self._options = options
        self._clock = clock
        self._beside = beside
        self._sampling = sampling
        self._places = places
        self._unconfirmed: deque[_Unconfirmed] = deque()
        # Outcomes between reading and confirmation, by their place in the stream.
        self._held: set[str] = set()
        self._replay = True
        self._log = log.bind(model=model)

    async def run(self, stop: asyncio.Event) -> None:
        """Write until stopped, whenever the lease is ours."""
        try:
            while not stop.is_set():
                try:
                    if await self._source.own(ttl_ms=self._options.lease_ms):
                        await self._serve(stop)
                except Unavailable as error:
                    self._log.warning("storage_waits", reason=error.reason, message=error.message)
                await wait(stop, self._options.lease_ms / 3000)
        finally:
            with suppress(Unavailable):
                await self._source.close()

    async def _serve(self, stop: asyncio.Event) -> None:
        """Work as the owner, until the lease is lost or a part fails; starts with what an earlier owner left."""
        self._unconfirmed.clear()
        self._held.clear()
        self._replay = True
        self._store.forget(self._model)
        self._log.info("storage_owns")
        beside = [work() for work in self._beside]
        parts = [asyncio.create_task(part) for part in (self._keep(), self._pump(stop), self._settle(), *beside)]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._store.forget(self._model)

    async def _keep(self) -> None:
        """Renew the lease; returns once it is lost."""
        renewed = self._clock()
        while self._clock() - renewed < self._options.lease_ms / 1000:
            await asyncio.sleep(self._options.lease_ms / 4000)
            with suppress(Unavailable):
                asked = self._clock()
                if not await self._source.own(ttl_ms=self._options.lease_ms):
                    break
                renewed = asked
        self._log.warning("storage_lease_lost")

    async def _pump(self, stop: asyncio.Event) -> None:
        """Write each batch while the next is read."""
        upcoming = asyncio.create_task(self._collect())
        try:
            while not stop.is_set():
                batch = await upcoming
                upcoming = asyncio.create_task(self._collect())
                if batch:
                    await self._write(batch, stop)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)

    async def _collect(self) -> list[QueuedOutcome]:
        """The next batch; empty where nothing came for a while."""
        count = self._options.batch_size * self._options.lanes
        if len(self._unconfirmed) >= self._options.max_unconfirmed:
            await asyncio.sleep(SETTLE_EVERY_S)
            return []
        if self._replay:
            found = await self._source.read(count=count, block_ms=0, pending=True)
            self._replay = bool(found)
        else:
            found = await self._source.read(count=count, block_ms=READ_BLOCK_MS)
            if 0 < len(found) < count:
                await asyncio.sleep(self._options.flush_ms / 1000)
                found += await self._source.read(count=count - len(found), block_ms=0)
        fresh = [outcome for outcome in found if outcome.entry_id not in self._held]
        self._held.update(outcome.entry_id for outcome in fresh)
        return fresh

    async def _write(self, batch: Sequence[QueuedOutcome], stop: asyncio.Event) -> None:
        """Write a batch, however long it takes; what the store refuses is written as it can be, or dropped."""
        todo: list[tuple[QueuedOutcome, Record]] = []
        for outcome in batch:
            try:
                todo.append((outcome, convert.record_of(self._model, outcome)))
            except InvalidInput as error:
                await self._drop(outcome, error)
        if self._sampling is not None and todo:
            out = await self._sampling.left_out([record for _, record in todo])
            await self._leave_out([outcome for (outcome, _), left in zip(todo, out, strict=True) if left])
            todo = [one for one, left in zip(todo, out, strict=True) if not left]
        # By time: what comes late costs a look, and a track of its own.
        todo.sort(key=lambda one: (one[1].entry, one[1].timestamp_us))
        # One entry is in one lane: the store takes one batch at a time for it. Few records go in few calls: each call
        # costs both sides as much as some records do.
        count = min(self._options.lanes, -(-len(todo) // self._options.batch_size))
        lanes: dict[int, list[tuple[QueuedOutcome, Record]]] = defaultdict(list)
        lane_of: dict[str, int] = {}
        for outcome, record in todo:
            lanes[lane_of.setdefault(record.entry, len(lane_of) % count)].append((outcome, record))
        await asyncio.gather(*(self._write_lane(lane, stop) for lane in lanes.values()))

    async def _write_lane(self, records: Sequence[tuple[QueuedOutcome, Record]], stop: asyncio.Event) -> None:
        size = self._options.batch_size
        for start in range(0, len(records), size):
            await self._write_batch(records[start : start + size], stop)

    async def _write_batch(self, todo: Sequence[tuple[QueuedOutcome, Record]], stop: asyncio.Event) -> None:
        pause_s = BACKOFF_S[0]
        began_ns = time.time_ns()
        with metrics.WRITE_SECONDS.labels(self._model).time():
            while todo:
                again: list[tuple[QueuedOutcome, Record]] = []
                waits = False
                results = await self._store.write([record for _, record in todo])
                for (outcome, record), result in zip(todo, results, strict=True):
                    if isinstance(result, Written):
                        self._keep_unconfirmed(outcome, record, result, began_ns)
                    elif not isinstance(result, Conflict | InvalidInput):
                        again.append((outcome, record))
                        waits = True
                    elif "labels_refused" in record.labels or "reused_frame_id" in record.labels:
                        await self._drop(outcome, result)
                    else:
                        self._count("rejected")
                        frame_id = record.labels["frame_id"]
                        self._log.error("frame_rejected", frame_id=frame_id, reason=result.reason, message=str(result))
                        again.append((outcome, domain.salvage(record, result.reason)))
                todo = again
                if waits:
                    self._log.warning("store_waits", records=len(todo), message=str(results[-1]))
                    await wait(stop, pause_s)
                    if stop.is_set():
                        return  # The queue still has them.
                    pause_s = min(pause_s * 2, BACKOFF_S[1])

    def _keep_unconfirmed(self, outcome: QueuedOutcome, record: Record, written: Written, began_ns: int) -> None:
        self._count("existed" if written.existed else "written")
        if trace.wanted(parent := record.labels.get("traceparent", "")):
            about: dict[str, str | bool] = {"vigil.existed": written.existed}
            about |= {f"vigil.{name}": record.labels[name] for name in ("frame_id", "model", "camera", "outcome")}
            trace.record("store frame", parent, began_ns=began_ns, attributes=about)
        self._places.add(record.labels["frame_id"], record.entry, written.timestamp_us)
        # Its image stays in the queue, not here.
        light = replace(outcome, outcome=b"", frame=replace(outcome.frame, image=b"") if outcome.frame else None)
        sha256 = record.labels["sha256"]
        self._unconfirmed.append(_Unconfirmed(light, record.entry, written.timestamp_us, sha256, self._clock()))
        metrics.UNCONFIRMED.labels(self._model).set(len(self._unconfirmed))

    async def _drop(self, outcome: QueuedOutcome, error: InvalidInput | Conflict) -> None:
        """Nothing of it can be stored: say so and go on."""
        self._log.error("outcome_dropped", entry_id=outcome.entry_id, reason=error.reason, message=error.message)
        self._count("dropped")
        await self._source.done([outcome])
        self._held.discard(outcome.entry_id)

    async def _leave_out(self, outcomes: Sequence[QueuedOutcome]) -> None:
        """They are judged and answered, and not to be stored."""
        if outcomes:
            await self._source.done(outcomes)
            self._held.difference_update(outcome.entry_id for outcome in outcomes)
            metrics.DROPPED.labels(self._model, "sample").inc(len(outcomes))

    def _count(self, result: str) -> None:
        metrics.FRAMES.labels(self._model, result).inc()

    async def _settle(self) -> None:
        """Confirm and free, over and over."""
        # Each look costs a query per entry, so several at once are cheaper than each for itself.
        confirm_every_s = self._options.confirm_after_s / 3
        confirmed_at = self._clock()
        while True:
            await asyncio.sleep(SETTLE_EVERY_S)
            try:
                if self._clock() - confirmed_at >= confirm_every_s:
                    confirmed_at = self._clock()
                    await self._confirm()
                await self._source.trim()
            except Unavailable as error:
                self._log.warning("confirmation_waits", reason=error.reason, message=error.message)
                await asyncio.sleep(BACKOFF_S[1] / 5)

    async def _confirm(self) -> None:
        """Look for what was written long enough ago, and as long since the server started."""
        if not self._unconfirmed:
            return
        uptime_s = await self._store.uptime_s()
        now = self._clock()
        if min(now - self._unconfirmed[0].written_at, uptime_s) < self._options.confirm_after_s:
            return
        due: dict[str, list[_Unconfirmed]] = defaultdict(list)
        count = 0
        for one in self._unconfirmed:
            if now - one.written_at < self._options.confirm_after_s:
                break
            due[one.entry].append(one)
            count += 1
        entries = list(due.items())
        found = await asyncio.gather(
            *(self._store.confirm(entry, {one.timestamp_us: one.sha256 for one in ones}) for entry, ones in entries)
        )
        if await self._store.uptime_s() < uptime_s:
            return  # A new life of the server began in between: what was found may still be lost.
        pairs = zip(entries, found, strict=True)
        present = [one for (_, ones), times in pairs for one in ones if one.timestamp_us in times]
        await self._source.done([one.outcome for one in present])
        for _ in range(count):
            self._held.discard(self._unconfirmed.popleft().outcome.entry_id)
        metrics.CONFIRMED.labels(self._model).inc(len(present))
        metrics.UNCONFIRMED.labels(self._model).set(len(self._unconfirmed))
        if len(present) < count:
            self._log.warning("records_vanished", count=count - len(present))
            metrics.FRAMES.labels(self._model, "vanished").inc(count - len(present))
            # No longer held, so that they are read from the queue and written again.
            self._replay = True


class Writers:
    """A writer for each model that has a route."""

    def __init__(
        self,
        routing: RoutingTable,
        outcomes: Callable[[str], OutcomeSource],
        store: FrameStore,
        options: WriterOptions,
        comparisons: Callable[[str], ComparisonSource],
        *,
        keeper: Callable[[str], AnnotationKeeper],
        normal_fraction: float = 1.0,
    ) -> None:
        self._routing = routing
        self._comparisons = comparisons
        self._keeper = keeper
        self._normal_fraction = normal_fraction
        self._outcomes = outcomes
        self._store = store
        self._options = options

    async def run(self, stop: asyncio.Event) -> None:
        """Find models and write for them until stopped; a writer that broke is started again."""
        await for_each_model(self._routing, lambda model: self._writer(model).run(stop), stop, failed="writer_failed")

    def _writer(self, model: str) -> FrameWriter:
        places = Places()

        def compare() -> Coroutine[None, None, None]:
            comparisons, confirm_after_s = self._comparisons(model), self._options.confirm_after_s
            return ComparisonLabeller(model, comparisons, self._store, places, confirm_after_s=confirm_after_s).run()

        def keep() -> Coroutine[None, None, None]:
            return self._keeper(model).run()

        sampling = Sampling(model, self._normal_fraction, self._routing)
        outcomes = self._outcomes(model)
        beside = [compare, keep]
        return FrameWriter(model, outcomes, self._store, self._options, places, beside=beside, sampling=sampling)
