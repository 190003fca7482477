"""The stores on ReductStore 1.21.

What decides the code, each pinned by a contract test: an acknowledged write may be lost with the server (hence
`confirm`), one writer per entry, label names that kill the server (hence `labels.check`), 409 does not mean stored,
a batch holds about 90 records and 512,000 header bytes, and queries guess the types of labels.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from reduct import BucketSettings, Client, QuotaType, RecordBatch, ReductError

from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound, Unavailable, VigilError
from vigil_common.store import labels as gate
from vigil_common.store.find import find_frame
from vigil_common.store.ports import FrameFilter, ModelInfo, StoredRecord, Written

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from vigil_common.store.ports import Labelling, Record

# 95 records in one batch fail as a network error, as do more than 512,000 bytes of headers.
BATCH_RECORDS = 64
BATCH_HEADER_BYTES = 256_000
BATCH_BODY_BYTES = 32 << 20
# How many taken microseconds a record may be moved past.
MAX_MOVES = 10_000
# One head query spans at most this much of an entry that has nothing to confirm in it.
CONFIRM_GAP_US = 10_000_000
CHUNK_BYTES = 1 << 20
POINTERS = "index"

_NETWORK = -1
_NOT_FOUND, _CONFLICT, _TOO_EARLY, _BROKEN = 404, 409, 425, 500
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def _unavailable(error: BaseException) -> Unavailable:
    return Unavailable("STORE_UNAVAILABLE", f"ReductStore: {error}; try again", retry_after_s=1.0)


def _status(error: BaseException) -> int:
    return int(error.status_code) if isinstance(error, ReductError) else _NETWORK


def _translate(error: BaseException) -> VigilError:
    """What an answer means for one record, once 404, 409, 425 and 500 have been dealt with."""
    if _status(error) in (400, 422) and "quota" not in str(error).lower():
        return InvalidInput("STORE_REFUSED", f"ReductStore refused it: {error}")
    return _unavailable(error)


_TROUBLE = (ReductError, aiohttp.ClientError, OSError, TimeoutError)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except _TROUBLE as error:
        raise _translate(error) from error


async def _open(url: str, token: str | None, bucket: str, settings: Any, timeout_s: float | None) -> tuple[Any, Any]:
    """A client with one session for all calls (without one, each call opens a connection), and the bucket."""
    client = await Client(url, api_token=token, timeout=timeout_s).__aenter__()
    try:
        try:
            return client, await client.get_bucket(bucket)
        except ReductError as error:
            if error.status_code != _NOT_FOUND:
                raise
            return client, await client.create_bucket(bucket, settings, exist_ok=True)
    except _TROUBLE as error:
        await client.__aexit__(None, None, None)
        raise _unavailable(error) from error


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
    if where.min_score is not None:
        found.append({"&score": {"$gte": where.min_score}})
    if where.max_score is not None:
        found.append({"&score": {"$lte": where.max_score}})
    when: dict[str, Any] = {"$and": found} if found else {}
    if None not in parts and not any(_INTEGER.fullmatch(value) for value in where.equals.values()):
        when["$limit"] = limit
    return when or None


class ReductFrameStore:
    """Images with labels in one bucket; entry "MODEL/CAMERA"."""

    def __init__(self, client: Any, bucket: Any) -> None:
        self._client = client
        self._bucket = bucket
        self._locks: dict[str, asyncio.Lock] = {}

    @classmethod
    async def open(
        cls, url: str, token: str | None = None, bucket: str = "vigil-frames", *, timeout_s: float = 30.0
    ) -> Self:
        """Connect; makes the bucket where it is missing. `Unavailable` where nobody answers."""
        return cls(*await _open(url, token, bucket, None, timeout_s))

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write a batch; see the port."""
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
            places, twins = _places(records, todo, results)
            for _ in range(MAX_MOVES):
                if not places:
                    break
                places = await self._write_round(records, places, results)
        for index in places:
            results[index] = Unavailable("NO_FREE_TIME", "no free microsecond near this frame's time")
        for index, twin in twins.items():
            first = results[twin]
            results[index] = replace(first, existed=True) if isinstance(first, Written) else first
        return [results[index] for index in range(len(records))]

    async def _write_round(
        self, records: Sequence[Record], places: Mapping[int, int], results: dict[int, Written | Exception]
    ) -> dict[int, int]:
        """Write each to its place once; returns those to try again, with their new places."""
        now, again = _apart(records, places)
        for chunk in _chunks(records, now):
            batch = RecordBatch()
            for index, at in chunk:
                record = records[index]
                values = {name: gate.encode(value) for name, value in record.labels.items()}
                batch.add(record.entry, at, record.body, content_type=record.content_type, labels=values)
            failed: BaseException | None = None
            errors: dict[str, dict[int, ReductError]] = {}
            try:
                errors = await self._bucket.write_record_batch(batch)
            except (*_TROUBLE, ValueError) as error:
                failed = error
            for index, at in chunk:
                record = records[index]
                trouble = failed or errors.get(record.entry, {}).get(at)
                if trouble is None:
                    results[index] = Written(at)
                    continue
                outcome = await self._resolve(record, at, trouble)
                if isinstance(outcome, int):
                    again[index] = outcome
                else:
                    results[index] = outcome
        return again

    async def _resolve(self, record: Record, at: int, trouble: BaseException) -> Written | Exception | int:
        """What stands at a record's place after trouble: its result, or the time to write it at next.

        The caller holds the entry's lock: nothing of ours is in flight.
        """
        if _status(trouble) not in (_CONFLICT, _TOO_EARLY, _BROKEN, _NETWORK):
            return _translate(trouble)
        try:
            async with self._bucket.read(record.entry, at, head=True) as found:
                stored = _stored(found)
        except _TROUBLE as error:
            failure = await self._clear(record.entry, at, error)
            # A whole call that failed is the caller's to repeat, with its own patience.
            return failure or (_unavailable(trouble) if _status(trouble) == _NETWORK else at)
        if stored.labels.get("frame_id") != record.labels["frame_id"]:
            return at + 1
        if stored.labels.get("sha256") == record.labels["sha256"] and stored.size_bytes == len(record.body):
            return Written(at, existed=True)
        return _reused(record)

    async def _clear(self, entry: str, at: int, trouble: BaseException) -> VigilError | None:
        """Make a place writable; a batch that was cut leaves what it had not sent at 425 for good."""
        if _status(trouble) == _NOT_FOUND:
            return None
        if _status(trouble) not in (_TOO_EARLY, _BROKEN):
            return _translate(trouble)
        try:
            await self._bucket.remove_record(entry, at)
        except _TROUBLE as error:
            return None if _status(error) == _NOT_FOUND else _translate(error)
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
            for entry in sorted({changes[index].entry for indexes in rounds.values() for index in indexes}):
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
        except (*_TROUBLE, ValueError) as error:
            return dict.fromkeys(changes, _translate(error))
        results: dict[int, VigilError | None] = {}
        for index, change in changes.items():
            trouble = errors.get(change.entry, {}).get(change.timestamp_us)
            missing = trouble is not None and _status(trouble) == _NOT_FOUND
            if missing:
                results[index] = _no_record(change.entry, change.timestamp_us)
            else:
                results[index] = _translate(trouble) if trouble is not None else None
        return results

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these stand there now."""
        present: set[int] = set()
        times = sorted(expected)
        start = 0
        for end in range(1, len(times) + 1):
            if end < len(times) and times[end] - times[end - 1] <= CONFIRM_GAP_US:
                continue
            async with _translated():
                query = self._bucket.query(entry, start=times[start], stop=times[end - 1] + 1, head=True)
                async for record in query:
                    if expected.get(record.timestamp) == record.labels.get("sha256"):
                        present.add(record.timestamp)
            start = end
        return present & expected.keys()

    async def uptime_s(self) -> float:
        """Seconds since the server started, whole ones, rounded down."""
        async with _translated():
            return float((await self._client.info()).uptime)

    async def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records by time; see the port.

        One query per entry, merged here: the server's own merge of several entries is out of order under load, and a
        page that ends at a time would then miss records.
        """
        if limit <= 0 or not where.entries:
            return
        streams = [self._query_entry(name, where, limit) for name in await self._entry_names(where.entries)]
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

    async def _entry_names(self, patterns: Sequence[str]) -> list[str]:
        """Existing entries that match names or "MODEL/*"."""
        async with _translated():
            existing = [entry.name for entry in await self._bucket.get_entry_list()]
        return sorted(
            name
            for name in existing
            if any(name == pattern or (pattern[-1] == "*" and name.startswith(pattern[:-1])) for pattern in patterns)
        )

    async def _query_entry(self, entry: str, where: FrameFilter, limit: int) -> AsyncGenerator[StoredRecord]:
        async with _translated():
            query = self._bucket.query(
                entry, start=where.start_us, stop=where.stop_us, when=conditions(where, limit), head=True
            )
            async for record in query:
                stored = _stored(record)
                if all(stored.labels.get(name) == value for name, value in where.equals.items()):
                    yield stored

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body, checked against its digest."""
        if timestamp_us <= 0:  # The server would answer with the latest record.
            raise _no_record(entry, timestamp_us)
        try:
            async with self._bucket.read(entry, timestamp_us) as found:
                body = await found.read_all()
                stored = _stored(found)
        except _TROUBLE as error:
            if _status(error) == _NOT_FOUND:
                raise _no_record(entry, timestamp_us) from error
            if _status(error) in (_BROKEN, _TOO_EARLY):
                raise DataLost("RECORD_BROKEN", f"the record at {entry} {timestamp_us} is broken") from error
            raise _translate(error) from error
        if hashlib.sha256(body).hexdigest() != stored.labels.get("sha256"):
            raise DataLost("DIGEST_MISMATCH", f"the image at {entry} {timestamp_us} is not what was written")
        return stored, body

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id; see the port."""
        return await find_frame(self, model, frame_id, camera)

    async def close(self) -> None:
        """Release connections."""
        await self._client.__aexit__(None, None, None)


def _no_record(entry: str, timestamp_us: int) -> NotFound:
    return NotFound("UNKNOWN_RECORD", f"no record at {entry} {timestamp_us}")


def _reused(record: Record) -> Conflict:
    return Conflict("FRAME_ID_REUSED", f"frame id {record.labels['frame_id']} stands for another image")


def _places(
    records: Sequence[Record], todo: Sequence[int], results: dict[int, Written | Exception]
) -> tuple[dict[int, int], dict[int, int]]:
    """Where each shall be written, and which are a second copy of which."""
    places: dict[int, int] = {}
    twins: dict[int, int] = {}
    first: dict[tuple[str, int, str], int] = {}
    for index in todo:
        record = records[index]
        key = (record.entry, record.timestamp_us, record.labels["frame_id"])
        other = first.setdefault(key, index)
        if other == index:
            places[index] = record.timestamp_us
        elif records[other].labels["sha256"] == record.labels["sha256"]:
            twins[index] = other
        else:
            results[index] = _reused(record)
    return places, twins


def _apart(records: Sequence[Record], places: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """Those to write now, and those that wait because another one of this round wants the same place.

    The client would keep only the last of them, silently. They wait rather than move on, so that a frame that has
    stood at its place since an earlier try is found there.
    """
    now: dict[int, int] = {}
    later: dict[int, int] = {}
    taken: set[tuple[str, int]] = set()
    for index, at in places.items():
        place = (records[index].entry, at)
        (later if place in taken else now)[index] = at
        taken.add(place)
    return now, later


def _chunks(records: Sequence[Record], places: Mapping[int, int]) -> Iterator[list[tuple[int, int]]]:
    """Split to what one batch can carry."""
    chunk: list[tuple[int, int]] = []
    header_bytes = body_bytes = 0
    for index, at in places.items():
        record = records[index]
        header = 128 + len(record.entry) + sum(len(name) + len(value) * 3 + 8 for name, value in record.labels.items())
        full = len(chunk) == BATCH_RECORDS or header_bytes + header > BATCH_HEADER_BYTES
        if chunk and (full or body_bytes + len(record.body) > BATCH_BODY_BYTES):
            yield chunk
            chunk, header_bytes, body_bytes = [], 0, 0
        chunk.append((index, at))
        header_bytes += header
        body_bytes += len(record.body)
    if chunk:
        yield chunk


class ReductModelStore:
    """Model versions in one bucket without a quota.

    The bundle stands in entry NAME/DIGEST at time VERSION, so that two publications never share a place; then a
    pointer, `index/NAME` at VERSION, holds its ModelInfo as JSON. Only what has a pointer is listed, and a pointer is
    written once the bundle has been read back.
    """

    def __init__(self, client: Any, bucket: Any, settle_s: float) -> None:
        self._client = client
        self._bucket = bucket
        self._settle_s = settle_s
        self._lock = asyncio.Lock()

    @classmethod
    async def open(
        cls, url: str, token: str | None = None, bucket: str = "vigil-models", *, settle_s: float = 2.5
    ) -> Self:
        """Connect; makes the bucket where it is missing.

        Args:
            url: Of the server.
            token: Of the API.
            bucket: Its name.
            settle_s: `publish` answers once a version still stands this long after it was written: longer than the
                server's compaction interval, before which a killed server may lose what it acknowledged.
        """
        settings = BucketSettings(quota_type=QuotaType.NONE)
        return cls(*await _open(url, token, bucket, settings, None), settle_s)

    async def publish(self, info: ModelInfo, bundle: bytes) -> None:
        """Keep a version; see the port."""
        if hashlib.sha256(bundle).hexdigest() != info.digest.removeprefix("sha256:"):
            raise InvalidInput("DIGEST_MISMATCH", "the bundle does not hash to its digest")
        async with self._lock, _translated():
            if await self._pointer(info.name, info.version) is not None:
                raise Conflict("VERSION_EXISTS", f"{info.name} has a version {info.version}")
            if await self._stored_digest(info) != info.digest:
                await self._remove(info)
                await self._write_bundle(info, bundle)
            if await self._stored_digest(info) != info.digest:
                raise DataLost("DIGEST_MISMATCH", "the store did not keep the bundle as it was; publish it again")
            body = json.dumps(asdict(info)).encode()
            try:
                await self._bucket.write(
                    f"{POINTERS}/{info.name}", body, timestamp=info.version, content_type="application/json"
                )
            except ReductError as error:
                if error.status_code == _CONFLICT:
                    raise Conflict("VERSION_EXISTS", f"{info.name} has a version {info.version}") from error
                raise
            await asyncio.sleep(self._settle_s)
            uptime_s = (await self._client.info()).uptime
            kept = await self._pointer(info.name, info.version) == info
            if not kept or uptime_s < self._settle_s or await self._size(info) != len(bundle):
                raise Unavailable("NOT_KEPT", "the store restarted meanwhile; publish it again", retry_after_s=5.0)

    async def _write_bundle(self, info: ModelInfo, bundle: bytes) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(0, len(bundle), CHUNK_BYTES):
                yield bundle[offset : offset + CHUNK_BYTES]

        values = {
            "version": str(info.version),
            "digest": info.digest,
            "size": str(info.size_bytes),
            "formats": " ".join(info.formats) or "none",
            "published_at_us": str(info.published_at_us),
        }
        await self._bucket.write(
            _bundle_entry(info),
            chunks(),
            timestamp=info.version,
            content_length=len(bundle),
            content_type="application/x-tar",
            labels=values,
        )

    async def _remove(self, info: ModelInfo) -> None:
        """Clear what a publication that broke off has left; nothing points at it."""
        try:
            await self._bucket.remove_record(_bundle_entry(info), info.version)
        except ReductError as error:
            if error.status_code != _NOT_FOUND:
                raise

    async def _stored_digest(self, info: ModelInfo) -> str | None:
        """The digest of the bytes that stand there; None where there are none or they are broken."""
        digest = hashlib.sha256()
        try:
            async with self._bucket.read(_bundle_entry(info), info.version) as record:
                async for chunk in record.read(CHUNK_BYTES):
                    digest.update(chunk)
        except (ReductError, aiohttp.ClientPayloadError) as error:
            if _status(error) in (_NOT_FOUND, _TOO_EARLY, _BROKEN) or isinstance(error, aiohttp.ClientError):
                return None
            raise
        return f"sha256:{digest.hexdigest()}"

    async def _size(self, info: ModelInfo) -> int | None:
        try:
            async with self._bucket.read(_bundle_entry(info), info.version, head=True) as record:
                return int(record.size)
        except ReductError as error:
            if error.status_code != _NOT_FOUND:
                raise
            return None

    async def _pointer(self, name: str, version: int) -> ModelInfo | None:
        if version <= 0:
            return None
        try:
            async with self._bucket.read(f"{POINTERS}/{name}", version) as record:
                return _info(await record.read_all())
        except ReductError as error:
            if error.status_code != _NOT_FOUND:
                raise
            return None

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number."""
        async with _translated():
            query = self._bucket.query([f"{POINTERS}/{name or '*'}"])
            found = [_info(await record.read_all()) async for record in query]
        return sorted(found, key=lambda info: (info.name, info.version))

    async def get(self, name: str, version: int | None = None) -> ModelInfo:
        """One version, the newest where none is given."""
        if version is None:
            versions = await self.list(name)
            if versions:
                return versions[-1]
            raise NotFound("UNKNOWN_MODEL", f"no model {name} has been published")
        async with _translated():
            info = await self._pointer(name, version)
        if info is None:
            known = await self.list(name)
            reason = "UNKNOWN_VERSION" if known else "UNKNOWN_MODEL"
            raise NotFound(reason, f"model {name} has no version {version}")
        return info

    async def download(self, name: str, version: int) -> bytes:
        """The bundle, checked against its digest."""
        info = await self.get(name, version)
        try:
            async with self._bucket.read(_bundle_entry(info), version) as record:
                bundle: bytes = await record.read_all()
        except _TROUBLE as error:
            if _status(error) in (_NOT_FOUND, _TOO_EARLY, _BROKEN):
                raise DataLost("BUNDLE_BROKEN", f"the bundle of {name} version {version} is gone") from error
            raise _translate(error) from error
        if f"sha256:{hashlib.sha256(bundle).hexdigest()}" != info.digest:
            raise DataLost("DIGEST_MISMATCH", f"the bundle of {name} version {version} is not what was published")
        return bundle

    async def close(self) -> None:
        """Release connections."""
        await self._client.__aexit__(None, None, None)


def _bundle_entry(info: ModelInfo) -> str:
    return f"{info.name}/{info.digest.removeprefix('sha256:')}"


def _info(body: bytes) -> ModelInfo:
    fields = json.loads(body)
    return ModelInfo(**{**fields, "formats": tuple(fields["formats"])})
