"""Writing frames to ReductStore: each once, none over another, whatever the server answered.

One writer per entry; two frames of one microsecond move apart; what comes late goes to a track of its own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reduct import RecordBatch, ReductError

from vigil_common.errors import Conflict, InvalidInput, Unavailable, VigilError
from vigil_common.store import labels as gate
from vigil_common.store.find import runs
from vigil_common.store.ports import FrameFilter, Written
from vigil_common.store.reduct_client import (
    BROKEN,
    CONFLICT,
    NETWORK,
    NOT_FOUND,
    TOO_EARLY,
    TROUBLE,
    status,
    translate,
    unavailable,
)
from vigil_common.store.reduct_query import Reading, at_time, no_record, stored_record
from vigil_common.store.tracks import Frame, Tracks, base_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vigil_common.store.ports import Labelling, Record

# 95 records in one batch fail as a network error, as do more than 512,000 bytes of headers.
BATCH_RECORDS = 64
BATCH_HEADER_BYTES = 256_000
BATCH_BODY_BYTES = 32 << 20
# How many taken microseconds a record may be moved past.
MAX_MOVES = 10_000
# How far around late records to look for what stands there already, and which of them by one query.
LOOK_US = 1_000
LATE_GAP_US = 1_000_000


class Writing:
    """Batches into one bucket."""

    def __init__(self, bucket: Any, tracks: Tracks, reading: Reading, *, stride_us: int) -> None:
        self._bucket = bucket
        self._tracks = tracks
        self._reading = reading
        self._locks: dict[str, asyncio.Lock] = {}
        self._stride_us = stride_us

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write a batch; see the port."""
        records = [replace(record, entry=base_of(record.entry)) for record in records]
        results: dict[int, Written | Exception] = {}
        todo: list[int] = []
        for index, record in enumerate(records):
            try:
                gate.check(record)
                todo.append(index)
            except InvalidInput as error:
                results[index] = error
        async with AsyncExitStack() as stack:
            # Sorted, so that two batches over the same entries can't wait for each other.
            for entry in sorted({records[index].entry for index in todo}):
                await stack.enter_async_context(self._locks.setdefault(entry, asyncio.Lock()))
            first, twins = _twins(records, todo, results)
            try:
                places = await self._places(records, first, results)
            except VigilError as error:
                results |= {index: error for index in first if index not in results}
                places = {}
            for _ in range(MAX_MOVES):
                if not places:
                    break
                places = await self._write_round(records, places, results)
        for index in places:
            results[index] = Unavailable("NO_FREE_TIME", "no free microsecond near this frame's time")
        for index, twin in twins.items():
            result = results[twin]
            results[index] = replace(result, existed=True) if isinstance(result, Written) else result
        return [results[index] for index in range(len(records))]

    async def _places(
        self, records: Sequence[Record], indexes: Sequence[int], results: dict[int, Written | Exception]
    ) -> dict[int, tuple[str, int]]:
        """The track and the time where each shall be written, by time; what stands already has its result here."""
        places: dict[int, tuple[str, int]] = {}
        by_base: dict[str, list[int]] = defaultdict(list)
        for index in sorted(indexes, key=lambda index: records[index].timestamp_us):
            by_base[records[index].entry].append(index)
        for base, ours in by_base.items():
            await self._reading.learn(base)
            standing = _Standing(self._reading, self._tracks, base)
            await standing.look_around([records[index].timestamp_us for index in ours])
            free: list[tuple[int, int]] = []
            for index in ours:
                record = records[index]
                frame_id = record.labels["frame_id"]
                for at in record.places(self._stride_us):
                    other = await standing.at(at, frame_id)
                    if other is None or other.frame_id == frame_id:
                        break
                if other is not None:
                    same = (other.sha256, other.size_bytes) == (record.labels["sha256"], len(record.body))
                    results[index] = Written(at, existed=True) if same else _reused(record)
                    continue
                standing.put(at, _frame_of(record))
                free.append((at, index))
            free.sort()
            names = self._tracks.assign(base, [at for at, _ in free])
            places |= {index: (name, at) for (at, index), name in zip(free, names, strict=True)}
        return places

    async def _write_round(
        self, records: Sequence[Record], places: Mapping[int, tuple[str, int]], results: dict[int, Written | Exception]
    ) -> dict[int, tuple[str, int]]:
        """Write each to its place once; returns those to try again, with their new places."""
        now, again = _apart(places)
        for chunk in _chunks(records, now):
            batch = RecordBatch()
            for index, (track, at) in chunk:
                record = records[index]
                values = {name: gate.encode(value) for name, value in record.labels.items()}
                batch.add(track, at, record.body, content_type=record.content_type, labels=values)
            failed: BaseException | None = None
            errors: dict[str, dict[int, ReductError]] = {}
            try:
                errors = await self._bucket.write_record_batch(batch)
            except (*TROUBLE, ValueError) as error:
                failed = error
            for index, (track, at) in chunk:
                trouble = failed or errors.get(track, {}).get(at)
                outcome = Written(at) if trouble is None else await self._resolve(records[index], track, at, trouble)
                if isinstance(outcome, int):
                    again[index] = (track, outcome)
                    continue
                results[index] = outcome
                if isinstance(outcome, Written):
                    self._tracks.written(track, at, _frame_of(records[index]))
        return again

    async def _resolve(self, record: Record, track: str, at: int, trouble: BaseException) -> Written | Exception | int:
        """What stands at a record's place after trouble: its result, or the time to write it at next.

        The caller holds the entry's lock: nothing of ours is in flight.
        """
        if status(trouble) not in (CONFLICT, TOO_EARLY, BROKEN, NETWORK):
            return translate(trouble)
        try:
            async with self._bucket.read(track, at, head=True) as found:
                stored = stored_record(found)
        except TROUBLE as error:
            failure = await self._clear(track, at, error)
            # A whole call that failed is the caller's to repeat, with its own patience.
            return failure or (unavailable(trouble) if status(trouble) == NETWORK else at)
        if stored.labels.get("frame_id") != record.labels["frame_id"]:
            return at + self._stride_us
        if stored.labels.get("sha256") == record.labels["sha256"] and stored.size_bytes == len(record.body):
            return Written(at, existed=True)
        return _reused(record)

    async def _clear(self, entry: str, at: int, trouble: BaseException) -> VigilError | None:
        """Make a place writable; a batch that was cut leaves what it had not sent at 425 for good."""
        if status(trouble) == NOT_FOUND:
            return None
        if status(trouble) not in (TOO_EARLY, BROKEN):
            return translate(trouble)
        try:
            await self._bucket.remove_record(entry, at)
        except TROUBLE as error:
            return None if status(error) == NOT_FOUND else translate(error)
        return None

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        """Label stored records; see the port. Two changes of one record go in turn: the server loses one of them."""
        results: dict[int, VigilError | None] = {}
        rounds: dict[int, list[int]] = {}
        turns: dict[tuple[str, int], int] = {}
        for index, change in enumerate(changes):
            try:
                gate.check_change(change)
            except InvalidInput as error:
                results[index] = error
                continue
            place = (change.entry, change.timestamp_us)
            turns[place] = turns.get(place, -1) + 1
            rounds.setdefault(turns[place], []).append(index)
        async with AsyncExitStack() as stack:
            for entry in sorted({base_of(changes[index].entry) for indexes in rounds.values() for index in indexes}):
                await stack.enter_async_context(self._locks.setdefault(entry, asyncio.Lock()))
            for _, indexes in sorted(rounds.items()):
                for start in range(0, len(indexes), BATCH_RECORDS):
                    chunk = indexes[start : start + BATCH_RECORDS]
                    results |= await self._label_chunk({index: changes[index] for index in chunk})
        return [results[index] for index in range(len(changes))]

    async def _label_chunk(self, changes: Mapping[int, Labelling]) -> dict[int, VigilError | None]:
        batch = RecordBatch()
        for change in changes.values():
            values = {name: gate.encode(value) for name, value in change.labels.items()}
            batch.add(change.entry, change.timestamp_us, labels=values)
        try:
            errors = await self._bucket.update_record_batch(batch)
        except (*TROUBLE, ValueError) as error:
            return dict.fromkeys(changes, translate(error))
        results: dict[int, VigilError | None] = {}
        for index, change in changes.items():
            trouble = errors.get(change.entry, {}).get(change.timestamp_us)
            if trouble is None:
                results[index] = None
            elif status(trouble) == NOT_FOUND:
                results[index] = await self._label_elsewhere(change)
            else:
                results[index] = translate(trouble)
        return results

    async def _label_elsewhere(self, change: Labelling) -> VigilError | None:
        """Label a record that stands in another of the camera's tracks than was said."""
        try:
            async for stored in self._reading.query(at_time(change.entry, change.timestamp_us), limit=1):
                if stored.entry != change.entry:
                    return (await self._label_chunk({0: replace(change, entry=stored.entry)}))[0]
        except VigilError as error:
            return error
        return no_record(change.entry, change.timestamp_us)


class _Standing:
    """What stands in a camera's tracks at certain times; nothing does after the latest of them."""

    def __init__(self, reading: Reading, tracks: Tracks, base: str) -> None:
        self._reading = reading
        self._tracks = tracks
        self._base = base
        self._latest_us = tracks.latest_us(base)
        self._frames: dict[int, Frame] = {}
        self._looked: list[tuple[int, int]] = []

    async def look_around(self, times: Sequence[int]) -> None:
        """Look at these ascending times, by one query for those that are near each other."""
        unknown = [at for at in times if at <= self._latest_us and not self._tracks.remembers(self._base, at)]
        for start, stop in runs(unknown, LATE_GAP_US) if unknown else ():
            await self._look(start, stop + LOOK_US)

    async def _look(self, start: int, stop: int) -> None:
        where = FrameFilter([self._base], start_us=start, stop_us=stop)
        async for stored in self._reading.query(where, limit=2**31):
            frame = Frame(stored.labels.get("frame_id"), stored.labels.get("sha256"), stored.size_bytes)
            self._frames.setdefault(stored.timestamp_us, frame)
        self._looked.append((start, stop))

    async def at(self, time_us: int, frame_id: str) -> Frame | None:
        """What stands at this time; None where it is free.

        What is remembered may be gone with a killed server: a frame counts as stored once it has been seen there.
        """
        if time_us in self._frames or time_us > self._latest_us:
            return self._frames.get(time_us)
        if self._tracks.remembers(self._base, time_us):
            remembered = self._tracks.recent(self._base, time_us)
            if remembered is None or remembered.frame_id != frame_id:
                return remembered
        if not any(start <= time_us < stop for start, stop in self._looked):
            await self._look(time_us, time_us + LOOK_US)
        return self._frames.get(time_us)

    def put(self, time_us: int, frame: Frame) -> None:
        """It will stand there."""
        self._frames[time_us] = frame


def _frame_of(record: Record) -> Frame:
    return Frame(record.labels["frame_id"], record.labels["sha256"], len(record.body))


def _reused(record: Record) -> Conflict:
    return Conflict("FRAME_ID_REUSED", f"frame id {record.labels['frame_id']} stands for another image")


def _twins(
    records: Sequence[Record], todo: Sequence[int], results: dict[int, Written | Exception]
) -> tuple[list[int], dict[int, int]]:
    """Which are to be written, and which are a second copy of which."""
    first: dict[tuple[str, int, str], int] = {}
    twins: dict[int, int] = {}
    for index in todo:
        record = records[index]
        other = first.setdefault((record.entry, record.timestamp_us, record.labels["frame_id"]), index)
        if records[other].labels["sha256"] != record.labels["sha256"]:
            results[index] = _reused(record)
        elif other != index:
            twins[index] = other
    return list(first.values()), twins


def _apart(places: Mapping[int, tuple[str, int]]) -> tuple[dict[int, tuple[str, int]], dict[int, tuple[str, int]]]:
    """Those to write now, and those that wait because another one of this round wants the same place.

    The client would keep only the last of them, silently. They wait rather than move on, so that a frame that has
    stood at its place since an earlier try is found there.
    """
    now: dict[int, tuple[str, int]] = {}
    later: dict[int, tuple[str, int]] = {}
    taken: set[tuple[str, int]] = set()
    for index, place in places.items():
        (later if place in taken else now)[index] = place
        taken.add(place)
    return now, later


def _chunks(
    records: Sequence[Record], places: Mapping[int, tuple[str, int]]
) -> Iterator[list[tuple[int, tuple[str, int]]]]:
    """Split to what one batch can carry."""
    chunk: list[tuple[int, tuple[str, int]]] = []
    header_bytes = body_bytes = 0
    for index, place in places.items():
        record = records[index]
        header = 128 + len(record.entry) + sum(len(name) + len(value) * 3 + 8 for name, value in record.labels.items())
        full = len(chunk) == BATCH_RECORDS or header_bytes + header > BATCH_HEADER_BYTES
        if chunk and (full or body_bytes + len(record.body) > BATCH_BODY_BYTES):
            yield chunk
            chunk, header_bytes, body_bytes = [], 0, 0
        chunk.append((index, place))
        header_bytes += header
        body_bytes += len(record.body)
    if chunk:
        yield chunk
