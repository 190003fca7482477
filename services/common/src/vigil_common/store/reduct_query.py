"""Finding and reading what stands in ReductStore, whose queries guess the types of labels."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import time
from typing import TYPE_CHECKING, Any

from vigil_common.errors import DataLost, NotFound
from vigil_common.store import labels as gate
from vigil_common.store.find import runs
from vigil_common.store.ports import FrameFilter, StoredRecord
from vigil_common.store.reduct_client import BROKEN, NOT_FOUND, TOO_EARLY, TROUBLE, status, translate, translated
from vigil_common.store.tracks import Tracks, base_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

# How long a new track of another process may be overlooked.
LISTED_S = 1.0
# One head query spans at most this much of an entry that has nothing to confirm in it.
CONFIRM_GAP_US = 10_000_000
# All other labels of a record cost the server and us as much again.
_DIGEST_ALONE = {"#select_labels": ["sha256"]}
_NO_TIME_LEFT = "Start time must be before stop time"
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def stored_record(record: Any) -> StoredRecord:
    """A record as the library gives it."""
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


def at_time(entry: str, timestamp_us: int) -> FrameFilter:
    """What finds the record of this very time, in any of the camera's tracks."""
    return FrameFilter([entry], start_us=timestamp_us, stop_us=timestamp_us + 1)


def no_record(entry: str, timestamp_us: int) -> NotFound:
    """That nothing stands there."""
    return NotFound("UNKNOWN_RECORD", f"no record at {entry} {timestamp_us}")


class Reading:
    """Queries and single records of one bucket."""

    def __init__(self, bucket: Any, tracks: Tracks) -> None:
        self._bucket = bucket
        self._tracks = tracks
        self._existing: list[str] = []
        self._listed_at = -math.inf

    async def learn(self, base: str) -> None:
        """Know the tracks of this camera's model."""
        if not self._tracks.knows(base):
            async with translated():
                latest = {entry.name: entry.latest_record for entry in await self._bucket.get_entry_list()}
            self._tracks.learn(base.partition("/")[0], latest)

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these digests stand at these times now."""
        if not expected:
            return set()
        present: set[int] = set()
        base = base_of(entry)
        await self.learn(base)
        async with translated():
            for start, stop in runs(sorted(expected), CONFIRM_GAP_US):
                for track in self._tracks.names(base, since_us=start):
                    found = self._bucket.query(track, start=start, stop=stop + 1, when=_DIGEST_ALONE, head=True)
                    async for record in found:
                        if expected.get(record.timestamp) == record.labels.get("sha256"):
                            present.add(record.timestamp)
        return present

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
        known = (name for base in bases for name in (base, *self._tracks.names(base)) if base[-1] != "*")
        return sorted({*found, *known})

    async def _query_entry(self, entry: str, where: FrameFilter, limit: int) -> AsyncGenerator[StoredRecord]:
        query = self._bucket.query(
            entry, start=where.start_us, stop=where.stop_us, when=conditions(where, limit), head=True
        )
        try:
            async for record in query:
                stored = stored_record(record)
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
            raise no_record(entry, timestamp_us)
        try:
            return await self._read(entry, timestamp_us)
        except NotFound:
            async for stored in self.query(at_time(entry, timestamp_us), limit=1):
                if stored.entry != entry:
                    return await self._read(stored.entry, timestamp_us)
            raise

    async def _read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        try:
            async with self._bucket.read(entry, timestamp_us) as found:
                body = await found.read_all()
                stored = stored_record(found)
        except TROUBLE as error:
            if status(error) == NOT_FOUND:
                raise no_record(entry, timestamp_us) from error
            if status(error) in (BROKEN, TOO_EARLY):
                raise DataLost("RECORD_BROKEN", f"the record at {entry} {timestamp_us} is broken") from error
            raise translate(error) from error
        if hashlib.sha256(body).hexdigest() != stored.labels.get("sha256"):
            raise DataLost("DIGEST_MISMATCH", f"the image at {entry} {timestamp_us} is not what was written")
        return stored, body
