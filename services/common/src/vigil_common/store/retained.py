"""Frames in two stores: what stays, and what passes under a quota.

The server's own quota drops the oldest blocks of a bucket: so what may go has a bucket of its own. A frame that turns
out to matter later, since somebody reviewed it or a candidate disagreed, is copied to what stays before it gets the
label that says so. Where the server loses the copy, the frame shows without that label, and whoever confirms his labels
gives it again, which makes a new copy.

What stays stands at even microseconds, what passes at odd ones: a copy's place is free for certain, and a time tells
which store to ask. At odd times in what stays there are only the copies of frames, and what was stored before there was
a quota: that is where it always was.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from vigil_common.errors import Conflict, InvalidInput, NotFound, VigilError
from vigil_common.store import labels as gate
from vigil_common.store.find import find_frame, runs
from vigil_common.store.ports import FrameFilter, Record, StoredRecord, Written
from vigil_common.store.tracks import base_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from vigil_common.store.ports import FrameStore, Labelling, PassingStore

COPY = "retained"
# Copies whose times are nearer than this are looked for together.
COPY_GAP_US = 10_000_000
# A record larger than this part of the quota would push out too much of the rest: it stays.
LARGE = 8
# So that the copy still has room for labels that come later.
MAX_LABEL_BYTES = gate.MAX_BYTES - 2 * gate.MAX_CHANGE_BYTES


class RetainedFrameStore:
    """One store of frames, made of two.

    Args:
        kept: What stays; it moves records by two microseconds.
        passing: What goes once the quota is reached; it moves them by two as well.
        quota_bytes: The quota.
        stays: Whether a frame of these labels stays.
    """

    def __init__(
        self,
        kept: FrameStore,
        passing: PassingStore,
        *,
        quota_bytes: int,
        stays: Callable[[Mapping[str, str]], bool],
    ) -> None:
        self._kept = kept
        self._passing = passing
        self._quota_bytes = quota_bytes
        self._stays = stays
        # Records that passed by here, by entry, to tell how many the quota has dropped since.
        self._written: Counter[str] = Counter()
        self._known: Mapping[str, int] | None = None

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write each where it belongs; see the port."""
        await self._count_once()
        results: dict[int, Written | Exception] = {}
        sides: dict[bool, list[int]] = {True: [], False: []}
        for index, record in enumerate(records):
            sides[self._belongs(record)].append(index)
        for stays, indexes in sides.items():
            store = self._kept if stays else self._passing
            placed = [_placed(records[index], stays=stays) for index in indexes]
            written = await store.write(placed) if placed else []
            results |= dict(zip(indexes, written, strict=True))
            if not stays:
                for index, result in zip(indexes, written, strict=True):
                    if isinstance(result, Written) and not result.existed:
                        self._written[records[index].entry] += 1
        return [results[index] for index in range(len(records))]

    def _belongs(self, record: Record) -> bool:
        if self._stays(record.labels) or len(record.body) * LARGE > self._quota_bytes:
            return True
        try:
            gate.check_labels(record.labels, max_bytes=MAX_LABEL_BYTES)
        except InvalidInput:
            return True
        return False

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        """Label what stays; what passes is copied there first where the label makes it stay."""
        results: dict[int, VigilError | None] = {}
        sides: dict[bool, list[int]] = {True: [], False: []}
        try:
            copies = await self._copies(changes)
        except VigilError as error:
            return [error] * len(changes)
        for index, change in enumerate(changes):
            place = (base_of(change.entry), change.timestamp_us)
            if change.timestamp_us % 2 and place not in copies and self._stays(change.labels):
                results[index] = await self._keep(change)
            else:
                sides[change.timestamp_us % 2 == 0 or place in copies].append(index)
        for stays, indexes in sides.items():
            store = self._kept if stays else self._passing
            done = await store.label([changes[index] for index in indexes]) if indexes else []
            results |= dict(zip(indexes, done, strict=True))
        # Nothing passing, so from before there was a quota, if it is there at all.
        left = [
            index
            for index, change in enumerate(changes)
            if change.timestamp_us % 2 and isinstance(results[index], NotFound)
        ]
        if left:
            done = await self._kept.label([changes[index] for index in left])
            results |= dict(zip(left, done, strict=True))
        return [results[index] for index in range(len(changes))]

    async def _copies(self, changes: Sequence[Labelling]) -> set[tuple[str, int]]:
        """Which of these were copied to what stays, by camera and time: each side has tracks of its own.

        A look costs less than a server's search for what is not there.
        """
        found: set[tuple[str, int]] = set()
        odd: dict[str, list[int]] = defaultdict(list)
        for change in changes:
            if change.timestamp_us % 2:
                odd[change.entry].append(change.timestamp_us)
        for entry, times in odd.items():
            for start, stop in runs(sorted(times), COPY_GAP_US):
                where = FrameFilter([entry], start_us=start, stop_us=stop + 1, equals={COPY: "true"})
                async for record in self._kept.query(where, limit=2**31):
                    found.add((base_of(entry), record.timestamp_us))
        return found

    async def _keep(self, change: Labelling) -> VigilError | None:
        """Copy a frame to what stays, and label it there."""
        try:
            stored, body = await self._passing.read(change.entry, change.timestamp_us)
        except VigilError as error:
            return error
        labels = {**stored.labels, COPY: "true"}
        copy = Record(stored.entry, stored.timestamp_us, labels, body, stored.content_type)
        (written,) = await self._kept.write([copy])
        if isinstance(written, VigilError):
            return written
        if not isinstance(written, Written) or written.timestamp_us != change.timestamp_us:
            return Conflict("TIME_TAKEN", f"another frame stands at {change.entry} {change.timestamp_us}")
        (result,) = await self._kept.label([change])
        return result

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these times hold that image now, in either, or did until the quota dropped it.

        A frame older than all that the quota has room for, as of a camera that was away for a day, goes at once:
        looking for it again and again would keep it in the queue for good.
        """
        even = {at: sha256 for at, sha256 in expected.items() if at % 2 == 0}
        odd = {at: sha256 for at, sha256 in expected.items() if at % 2}
        found = await self._kept.confirm(entry, even) if even else set()
        if odd:
            passing = await self._passing.confirm(entry, odd)
            found = found | passing
            left = {at: sha256 for at, sha256 in odd.items() if at not in passing}
            found = found | await self._kept.confirm(entry, left) if left else found
            gone = odd.keys() - found
            horizon_us = await self._passing.horizon_us() if gone else None
            if horizon_us is not None:
                found = found | {at for at in gone if at < horizon_us}
        return found

    async def uptime_s(self) -> float:
        """Seconds since the server started; both are on one."""
        return await self._kept.uptime_s()

    def forget(self, model: str) -> None:
        """Look at the server again before this model is written to, in both."""
        self._kept.forget(model)
        self._passing.forget(model)

    async def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records of both by time; where there is a copy, it alone counts, whichever track it stands in."""
        if limit <= 0:
            return
        copies = FrameFilter(where.entries, where.start_us, where.stop_us, equals={COPY: "true"})
        async with (
            aclosing(self._kept.query(where, limit=limit)) as kept,  # type: ignore[type-var]
            aclosing(self._passing.query(where, limit=2**31)) as passing,  # type: ignore[type-var]
            aclosing(self._kept.query(copies, limit=2**31)) as known,  # type: ignore[type-var]
        ):
            heads: list[tuple[tuple[int, str], int, StoredRecord]] = []
            streams = (kept, passing)
            copied = await anext(known, None)
            # Cameras of which a copy stands at the time that was reached.
            reached, cameras = -1, set[str]()

            async def advance(side: int) -> None:
                record = await anext(streams[side], None)
                if record is not None:
                    heapq.heappush(heads, (_order(record), side, record))

            for side in range(len(streams)):
                await advance(side)
            given = 0
            while heads and given < limit:
                _, side, record = heapq.heappop(heads)
                if record.timestamp_us != reached:
                    reached, cameras = record.timestamp_us, set()
                while copied is not None and copied.timestamp_us <= reached:
                    if copied.timestamp_us == reached:
                        cameras.add(base_of(copied.entry))
                    copied = await anext(known, None)
                if side == 0 or base_of(record.entry) not in cameras:
                    yield record
                    given += 1
                await advance(side)

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body, of what stays where it is in both."""
        try:
            return await self._kept.read(entry, timestamp_us)
        except NotFound:
            if timestamp_us % 2 == 0:
                raise
        return await self._passing.read(entry, timestamp_us)

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id; see the port."""
        return await find_frame(self, model, frame_id, camera)

    async def dropped(self) -> dict[str, int]:
        """How many frames the quota has dropped, by entry, of those that passed by here since it was opened."""
        await self._count_once()
        before = self._known or {}
        # Counted before the look, so that a write in between is not taken for a record that is gone.
        passed = {entry: before.get(entry, 0) + self._written[entry] for entry in {*before, *self._written}}
        now = await self._passing.counts()
        return {entry: max(0, count - now.get(entry, 0)) for entry, count in passed.items()}

    async def _count_once(self) -> None:
        if self._known is None:
            self._known = await self._passing.counts()

    async def close(self) -> None:
        """Release both."""
        await self._kept.close()
        await self._passing.close()


def _placed(record: Record, *, stays: bool) -> Record:
    """With the first times from its own on that are of its kind."""

    def of_kind(time_us: int) -> int:
        return time_us + (time_us % 2 if stays else 1 - time_us % 2)

    otherwise_us = None if record.otherwise_us is None else of_kind(record.otherwise_us)
    return replace(record, timestamp_us=of_kind(record.timestamp_us), otherwise_us=otherwise_us)


def _order(record: StoredRecord) -> tuple[int, str]:
    return record.timestamp_us, record.entry
