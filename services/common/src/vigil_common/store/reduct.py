"""The stores on ReductStore 1.21.

What decides the code, each pinned by a contract test: an acknowledged write may be lost with the server (hence
`confirm`), one writer per entry, records that come late damage an entry (hence `tracks`), label names that kill the
server (hence `labels.check`), 409 does not mean stored, a batch holds about 90 records and 512,000 header bytes, and
queries guess the types of labels.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import math
import re
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from reduct import BucketSettings, QuotaType, RecordBatch, ReductError

from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound, Unavailable, VigilError
from vigil_common.logging import get_logger
from vigil_common.store import labels as gate
from vigil_common.store.find import find_frame, runs
from vigil_common.store.ports import FrameFilter, StoredRecord, Written
from vigil_common.store.reduct_client import (
    BROKEN,
    CONFLICT,
    FORBIDDEN,
    NETWORK,
    NOT_FOUND,
    TOO_EARLY,
    TROUBLE,
    open_bucket,
    status,
    translate,
    translated,
    unavailable,
)
from vigil_common.store.tracks import Frame, Tracks, base_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from vigil_common.store.ports import Labelling, Record

# 95 records in one batch fail as a network error, as do more than 512,000 bytes of headers.
BATCH_RECORDS = 64
BATCH_HEADER_BYTES = 256_000
BATCH_BODY_BYTES = 32 << 20
# A block's description is written anew at each compaction and filtered whole by each query: with the server's default
# of 1,024 records a record costs it 3 to 7 ms of CPU, with 128 0.8 to 1.4, with these 0.6 to 1.0. Fewer still gain
# nothing more, and are more files.
BLOCK_RECORDS = 64
# Under a quota: blocks in it, how large one is at most, and how many may be free when it counts as full.
BLOCKS, MAX_BLOCK_BYTES, FULL_BLOCKS = 16, 64_000_000, 3
# How many taken microseconds a record may be moved past.
MAX_MOVES = 10_000
# How far around late records to look for what stands there already, and which of them by one query.
LOOK_US = 1_000
LATE_GAP_US = 1_000_000
# How long a new track of another process may be overlooked.
LISTED_S = 1.0
# One head query spans at most this much of an entry that has nothing to confirm in it.
CONFIRM_GAP_US = 10_000_000
_NO_TIME_LEFT = "Start time must be before stop time"
# All other labels of a record cost the server and us as much again.
_DIGEST_ALONE = {"#select_labels": ["sha256"]}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

log = get_logger()


def _stored(record: Any) -> StoredRecord:
    values = {name: gate.decode(value) for name, value in record.labels.items()}
    return StoredRecord(record.entry, record.timestamp, values, record.size, record.content_type)


def condition(name: str, value: str) -> dict[str, Any] | None:
    """What finds at least every record whose label has this very value; None where no condition is sure to.

    The server reads a label as a number or truth value where it can, so 7, 07 and 7.0 are one; the caller compares
    again.
    """
    text = gate.encode(value)
    if text in ("true", "false"):
        return {"$eq": [{f"&{name}": {"$cast": "string"}}, text]}
    if _INTEGER.fullmatch(text):
        return {f"&{name}": {"$eq": int(text)}}
    try:
        float(text)
    except ValueError:
        # The query language gives these a meaning of their own.
        return None if text[0] in "$&@#" else {f"&{name}": {"$eq": text}}
    return None


def conditions(where: FrameFilter, limit: int) -> dict[str, Any] | None:
    """The server's part of a filter; holds `$limit` only where nothing is left to compare here."""
    parts = [condition(name, value) for name, value in where.equals.items()]
    found = [part for part in parts if part is not None]
    found += [{"$exists": [name]} for name in where.present]
    found += [{"$not": [{"$exists": [name]}]} for name in where.absent]
    if where.min_score is not None:
        found.append({"&score": {"$gte": where.min_score}})
    if where.max_score is not None:
        found.append({"&score": {"$lte": where.max_score}})
    when: dict[str, Any] = {"$and": found} if found else {}
    if None not in parts and not any(_INTEGER.fullmatch(value) for value in where.equals.values()):
        when["$limit"] = limit
    return when or None


def frame_settings(quota_bytes: int = 0) -> BucketSettings:
    """What a bucket of frames is to have; a quota of 0 leaves the quota as it is, at first none."""
    if not quota_bytes:
        return BucketSettings(max_block_records=BLOCK_RECORDS)
    # Whole blocks go at once, so they must be small beside the quota.
    block_bytes = max(1, min(MAX_BLOCK_BYTES, quota_bytes // BLOCKS))
    return BucketSettings(
        quota_type=QuotaType.FIFO,
        quota_size=quota_bytes,
        max_block_size=block_bytes,
        max_block_records=BLOCK_RECORDS,
    )


async def _settle(bucket: Any, settings: BucketSettings, *, must: bool) -> None:
    """Give a bucket that has others these settings, which takes the server's own token."""
    found = (await bucket.get_settings()).model_dump()
    if settings.model_dump(exclude_none=True).items() <= found.items():
        return
    try:
        await bucket.set_settings(settings)
    except ReductError as error:
        if must or error.status_code != FORBIDDEN:
            raise
        log.warning("bucket_settings_differ", bucket=bucket.name, wanted=settings.model_dump(exclude_none=True))


class ReductFrameStore:
    """Images with labels in one bucket; entry "MODEL/CAMERA"."""

    def __init__(self, client: Any, bucket: Any, *, stride_us: int = 1, quota_bytes: int = 0) -> None:
        self._client = client
        self._bucket = bucket
        self._stride_us = stride_us
        self._quota_bytes = quota_bytes
        self._locks: dict[str, asyncio.Lock] = {}
        self.tracks = Tracks()
        self._existing: list[str] = []
        self._listed_at = -math.inf

    @classmethod
    async def open(
        cls,
        url: str,
        token: str | None = None,
        bucket: str = "vigil-frames",
        *,
        timeout_s: float = 30.0,
        stride_us: int = 1,
        quota_bytes: int = 0,
    ) -> Self:
        """Connect; makes the bucket where it is missing.

        Args:
            url: Of the server.
            token: Its API token.
            bucket: Name of the bucket.
            timeout_s: For each call.
            stride_us: How far a record moves whose time is taken.
            quota_bytes: The oldest go once there is more; 0: nothing goes.

        Raises:
            Unavailable: Nobody answers.
        """
        settings = frame_settings(quota_bytes)
        client, opened = await open_bucket(url, token, bucket, settings, timeout_s)
        try:
            async with translated():
                await _settle(opened, settings, must=bool(quota_bytes))
        except BaseException:
            await client.__aexit__(None, None, None)
            raise
        return cls(client, opened, stride_us=stride_us, quota_bytes=quota_bytes)

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
            await self._learn(base)
            standing = _Standing(self, base)
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
            names = self.tracks.assign(base, [at for at, _ in free])
            places |= {index: (name, at) for (at, index), name in zip(free, names, strict=True)}
        return places

    async def _learn(self, base: str) -> None:
        if not self.tracks.knows(base):
            async with translated():
                latest = {entry.name: entry.latest_record for entry in await self._bucket.get_entry_list()}
            self.tracks.learn(base.partition("/")[0], latest)

    def forget(self, model: str) -> None:
        """Look at the server again before this model is written to; see the port."""
        self.tracks.forget(model)

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
                    self.tracks.written(track, at, _frame_of(records[index]))
        return again

    async def _resolve(self, record: Record, track: str, at: int, trouble: BaseException) -> Written | Exception | int:
        """What stands at a record's place after trouble: its result, or the time to write it at next.

        The caller holds the entry's lock: nothing of ours is in flight.
        """
        if status(trouble) not in (CONFLICT, TOO_EARLY, BROKEN, NETWORK):
            return translate(trouble)
        try:
            async with self._bucket.read(track, at, head=True) as found:
                stored = _stored(found)
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
            async for stored in self.query(_at(change.entry, change.timestamp_us), limit=1):
                if stored.entry != change.entry:
                    return (await self._label_chunk({0: replace(change, entry=stored.entry)}))[0]
        except VigilError as error:
            return error
        return _no_record(change.entry, change.timestamp_us)

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these stand there now."""
        if not expected:
            return set()
        present: set[int] = set()
        base = base_of(entry)
        await self._learn(base)
        async with translated():
            for start, stop in runs(sorted(expected), CONFIRM_GAP_US):
                for track in self.tracks.names(base, since_us=start):
                    found = self._bucket.query(track, start=start, stop=stop + 1, when=_DIGEST_ALONE, head=True)
                    async for record in found:
                        if expected.get(record.timestamp) == record.labels.get("sha256"):
                            present.add(record.timestamp)
        return present

    async def counts(self) -> dict[str, int]:
        """How many records each camera has now."""
        counts: Counter[str] = Counter()
        async with translated():
            for entry in await self._bucket.get_entry_list():
                counts[base_of(entry.name)] += entry.record_count
        return dict(counts)

    async def horizon_us(self) -> int | None:
        """What is older than this goes as soon as it is written."""
        async with translated():
            info = await self._bucket.info()
        full = self._quota_bytes and info.size * BLOCKS >= self._quota_bytes * (BLOCKS - FULL_BLOCKS)
        return int(info.oldest_record) if full else None

    async def uptime_s(self) -> float:
        """Seconds since the server started, whole ones, rounded down."""
        async with translated():
            return float((await self._client.info()).uptime)

    async def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records by time; see the port.

        One query per entry, merged here: the server's own merge of several entries is out of order under load, and a
        page that ends at a time would then miss records.
        """
        # The library takes a stop at 0 for none.
        if limit <= 0 or not where.entries or where.stop_us == 0:
            return
        streams = [self._query_entry(name, where, limit) for name in await self._track_names(where.entries)]
        heads: list[tuple[int, str, StoredRecord, AsyncGenerator[StoredRecord]]] = []

        async def advance(stream: AsyncGenerator[StoredRecord]) -> None:
            record = await anext(stream, None)
            if record is not None:
                heapq.heappush(heads, (record.timestamp_us, record.entry, record, stream))

        try:
            for stream in streams:
                await advance(stream)
            for _ in range(limit):
                if not heads:
                    return
                _, _, record, stream = heapq.heappop(heads)
                yield record
                await advance(stream)
        finally:
            for stream in streams:
                await stream.aclose()

    async def _track_names(self, patterns: Sequence[str]) -> list[str]:
        """All tracks of the cameras asked for: of each by its name, or of all that match "MODEL/*"."""
        bases = {base_of(pattern) for pattern in patterns}
        many = any(base.endswith("*") for base in bases)
        if many or time.monotonic() - self._listed_at > LISTED_S:
            async with translated():
                self._existing = [entry.name for entry in await self._bucket.get_entry_list()]
            self._listed_at = time.monotonic()
        found = {
            name
            for name in self._existing
            if any(base_of(name) == base or (base[-1] == "*" and name.startswith(base[:-1])) for base in bases)
        }
        known = (name for base in bases for name in (base, *self.tracks.names(base)) if base[-1] != "*")
        return sorted({*found, *known})

    async def _query_entry(self, entry: str, where: FrameFilter, limit: int) -> AsyncGenerator[StoredRecord]:
        query = self._bucket.query(
            entry, start=where.start_us, stop=where.stop_us, when=conditions(where, limit), head=True
        )
        try:
            async for record in query:
                stored = _stored(record)
                if all(stored.labels.get(name) == value for name, value in where.equals.items()):
                    yield stored
        except TROUBLE as error:
            # The server clamps the time asked for to the entry's own, and calls it an error where nothing is left.
            if _NO_TIME_LEFT in str(error) or status(error) == NOT_FOUND:
                return
            raise translate(error) from error

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body, checked against its digest."""
        if timestamp_us <= 0:  # The server would answer with the latest record.
            raise _no_record(entry, timestamp_us)
        try:
            return await self._read(entry, timestamp_us)
        except NotFound:
            async for stored in self.query(_at(entry, timestamp_us), limit=1):
                if stored.entry != entry:
                    return await self._read(stored.entry, timestamp_us)
            raise

    async def _read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        try:
            async with self._bucket.read(entry, timestamp_us) as found:
                body = await found.read_all()
                stored = _stored(found)
        except TROUBLE as error:
            if status(error) == NOT_FOUND:
                raise _no_record(entry, timestamp_us) from error
            if status(error) in (BROKEN, TOO_EARLY):
                raise DataLost("RECORD_BROKEN", f"the record at {entry} {timestamp_us} is broken") from error
            raise translate(error) from error
        if hashlib.sha256(body).hexdigest() != stored.labels.get("sha256"):
            raise DataLost("DIGEST_MISMATCH", f"the image at {entry} {timestamp_us} is not what was written")
        return stored, body

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id; see the port."""
        return await find_frame(self, model, frame_id, camera)

    async def close(self) -> None:
        """Release connections."""
        await self._client.__aexit__(None, None, None)


class _Standing:
    """What stands in a camera's tracks at certain times; nothing does after the latest of them."""

    def __init__(self, store: ReductFrameStore, base: str) -> None:
        self._store = store
        self._tracks = store.tracks
        self._base = base
        self._latest_us = store.tracks.latest_us(base)
        self._frames: dict[int, Frame] = {}
        self._looked: list[tuple[int, int]] = []

    async def look_around(self, times: Sequence[int]) -> None:
        """Look at these ascending times, by one query for those that are near each other."""
        unknown = [at for at in times if at <= self._latest_us and not self._tracks.remembers(self._base, at)]
        for start, stop in runs(unknown, LATE_GAP_US) if unknown else ():
            await self._look(start, stop + LOOK_US)

    async def _look(self, start: int, stop: int) -> None:
        where = FrameFilter([self._base], start_us=start, stop_us=stop)
        async for stored in self._store.query(where, limit=2**31):
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


def _at(entry: str, timestamp_us: int) -> FrameFilter:
    return FrameFilter([entry], start_us=timestamp_us, stop_us=timestamp_us + 1)


def _no_record(entry: str, timestamp_us: int) -> NotFound:
    return NotFound("UNKNOWN_RECORD", f"no record at {entry} {timestamp_us}")


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
