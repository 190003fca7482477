"""The stores in a folder: SQLite for frames and for the index of models, a file per bundle.

Several processes may open them: one writes (the storage service), others read. A commit is on the disk when it returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import sqlite3
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiosqlite

from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound, Unavailable
from vigil_common.store import labels as gate
from vigil_common.store.find import find_frame
from vigil_common.store.ports import FrameFilter, StoredRecord, Written

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from vigil_common.errors import VigilError
    from vigil_common.store.ports import Labelling, Record

BUSY_TIMEOUT_S = 10.0
_FRAMES = """
CREATE TABLE IF NOT EXISTS frames (
    entry TEXT NOT NULL, timestamp_us INTEGER NOT NULL, frame_id TEXT NOT NULL, sha256 TEXT NOT NULL, score REAL,
    labels TEXT NOT NULL, content_type TEXT NOT NULL, size_bytes INTEGER NOT NULL, body_id INTEGER NOT NULL,
    PRIMARY KEY (entry, timestamp_us)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS frames_by_id ON frames (frame_id);
CREATE TABLE IF NOT EXISTS bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
"""
_COLUMNS = "entry, timestamp_us, labels, size_bytes, content_type"


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise Unavailable("STORE_UNAVAILABLE", f"the store's folder: {error}; try again", retry_after_s=1.0) from error


async def open_database(path: Path, schema: str) -> aiosqlite.Connection:
    """A database of this schema, durable at each commit."""
    async with translated():
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        connection = await aiosqlite.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute("PRAGMA synchronous = FULL")
        await connection.executescript(schema)
        return connection


@asynccontextmanager
async def _transaction(connection: aiosqlite.Connection) -> AsyncIterator[None]:
    try:
        await connection.execute("BEGIN IMMEDIATE")
        yield
        await connection.execute("COMMIT")
    except BaseException:
        # What a cancelled caller no longer waits for runs all the same in SQLite's thread, and this after it. Nothing
        # happens where no transaction is open.
        await asyncio.shield(connection.rollback())
        raise


def _stored(row: Any) -> StoredRecord:
    entry, timestamp_us, labels, size_bytes, content_type = row
    return StoredRecord(entry, timestamp_us, json.loads(labels), size_bytes, content_type)


def _score(labels: Mapping[str, str]) -> float | None:
    try:
        return float(labels["score"])
    except (KeyError, ValueError):
        return None


class EmbeddedFrameStore:
    """Images with labels in `frames.db`."""

    def __init__(self, connection: aiosqlite.Connection, *, stride_us: int = 1, quota_bytes: int = 0) -> None:
        self._db = connection
        self._lock = asyncio.Lock()
        self._stride_us = stride_us
        self._quota_bytes = quota_bytes

    @classmethod
    async def open(cls, folder: Path, *, stride_us: int = 1, quota_bytes: int = 0) -> Self:
        """Open the folder, made where it is missing.

        Args:
            folder: Where `frames.db` is.
            stride_us: How far a record moves whose time is taken.
            quota_bytes: The oldest images go once they have more bytes; 0: nothing goes.
        """
        connection = await open_database(Path(folder) / "frames.db", _FRAMES)
        return cls(connection, stride_us=stride_us, quota_bytes=quota_bytes)

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write a batch in one transaction; see the port."""
        try:
            async with self._lock, translated(), _transaction(self._db):
                results = [await self._write_one(record) for record in records]
                if self._quota_bytes:
                    await self._drop_oldest()
                return results
        except Unavailable as error:
            return [error] * len(records)

    async def _write_one(self, record: Record) -> Written | Exception:
        try:
            gate.check(record)
        except InvalidInput as error:
            return error
        frame_id, sha256 = record.labels["frame_id"], record.labels["sha256"]
        statement = "SELECT frame_id, sha256, size_bytes FROM frames WHERE entry = ? AND timestamp_us = ?"
        for at in record.places(self._stride_us):
            async with self._db.execute(statement, (record.entry, at)) as cursor:
                found = await cursor.fetchone()
            if found is None:
                break
            if found[0] == frame_id:
                if (found[1], found[2]) == (sha256, len(record.body)):
                    return Written(at, existed=True)
                return Conflict("FRAME_ID_REUSED", f"frame id {frame_id} stands for another image")
        async with self._db.execute("INSERT INTO bodies (body) VALUES (?)", (record.body,)) as cursor:
            body_id = cursor.lastrowid
        row = (record.entry, at, frame_id, sha256, _score(record.labels), json.dumps(dict(record.labels)))
        await self._db.execute(
            "INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, record.content_type, len(record.body), body_id),
        )
        return Written(at)

    async def _drop_oldest(self) -> None:
        async with self._db.execute("SELECT coalesce(sum(size_bytes), 0) FROM frames") as cursor:
            row = await cursor.fetchone()
        over = (row[0] if row else 0) - self._quota_bytes
        if over <= 0:
            return
        oldest = "SELECT entry, timestamp_us, size_bytes, body_id FROM frames ORDER BY timestamp_us, entry"
        async with self._db.execute(oldest) as cursor:
            gone = []
            while over > 0 and (found := await cursor.fetchone()) is not None:
                gone.append(found)
                over -= found[2]
        for entry, timestamp_us, _, body_id in gone:
            await self._db.execute("DELETE FROM frames WHERE entry = ? AND timestamp_us = ?", (entry, timestamp_us))
            await self._db.execute("DELETE FROM bodies WHERE id = ?", (body_id,))

    async def counts(self) -> dict[str, int]:
        """How many records each entry has now."""
        async with translated():
            rows = await self._db.execute_fetchall("SELECT entry, COUNT(*) FROM frames GROUP BY entry")
        return {str(entry): int(count) for entry, count in rows}

    async def horizon_us(self) -> int | None:
        """What is older than this goes as soon as it is written."""
        statement = "SELECT min(timestamp_us), coalesce(sum(size_bytes), 0), coalesce(max(size_bytes), 0) FROM frames"
        async with translated():
            ((oldest_us, total, largest),) = await self._db.execute_fetchall(statement)
        return int(oldest_us) if self._quota_bytes and total + largest > self._quota_bytes else None

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        """Label stored records in one transaction; see the port."""
        try:
            async with self._lock, translated(), _transaction(self._db):
                return [await self._label_one(change) for change in changes]
        except Unavailable as error:
            return [error] * len(changes)

    async def _label_one(self, change: Labelling) -> VigilError | None:
        try:
            gate.check_change(change)
        except InvalidInput as error:
            return error
        statement = "UPDATE frames SET labels = json_patch(labels, ?) WHERE entry = ? AND timestamp_us = ?"
        place = (change.entry, change.timestamp_us)
        async with self._db.execute(statement, (json.dumps(dict(change.labels)), *place)) as cursor:
            return None if cursor.rowcount else NotFound("UNKNOWN_RECORD", f"no record at {place[0]} {place[1]}")

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these stand there now."""
        if not expected:
            return set()
        statement = "SELECT timestamp_us, sha256 FROM frames WHERE entry = ? AND timestamp_us BETWEEN ? AND ?"
        async with translated():
            rows = await self._db.execute_fetchall(statement, (entry, min(expected), max(expected)))
        return {at for at, sha256 in rows if expected.get(at) == sha256}

    def forget(self, model: str) -> None:
        """Nothing is known here that is not in the file."""

    async def uptime_s(self) -> float:
        """Nothing is lost with a restart: it has always been up."""
        return math.inf

    async def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records by time; see the port."""
        entries: list[str] = []
        arguments: list[object] = []
        for entry in where.entries:
            if entry.endswith("/*"):
                # "0" follows "/": everything that begins with "MODEL/".
                entries.append("(entry >= ? AND entry < ?)")
                arguments += [entry[:-1], f"{entry[:-2]}0"]
            else:
                entries.append("entry = ?")
                arguments.append(entry)
        clauses = [f"({' OR '.join(entries) or 'FALSE'})"]
        bounds = (
            ("timestamp_us >= ?", where.start_us),
            ("timestamp_us < ?", where.stop_us),
            ("score >= ?", where.min_score),
            ("score <= ?", where.max_score),
        )
        for clause, bound in bounds:
            if bound is not None:
                clauses.append(clause)
                arguments.append(bound)
        for name, value in where.equals.items():
            gate.check_labels({name: value})
            clauses.append("frame_id = ?" if name == "frame_id" else f"json_extract(labels, '$.{name}') = ?")
            arguments.append(value)
        for names, test in ((where.present, "NOT NULL"), (where.absent, "NULL")):
            for name in names:
                gate.check_labels({name: ""})
                clauses.append(f"json_extract(labels, '$.{name}') IS {test}")
        # Every name in it has passed the gate; values are bound.
        statement = f"SELECT {_COLUMNS} FROM frames WHERE {' AND '.join(clauses)} ORDER BY timestamp_us, entry LIMIT ?"  # noqa: S608
        async with translated():
            rows = await self._db.execute_fetchall(statement, (*arguments, max(0, limit)))
        for row in rows:
            yield _stored(row)

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body, checked against its digest."""
        statement = (
            f"SELECT {_COLUMNS}, body FROM frames JOIN bodies ON id = body_id WHERE entry = ? AND timestamp_us = ?"  # noqa: S608
        )
        async with translated():
            rows = list(await self._db.execute_fetchall(statement, (entry, timestamp_us)))
        if not rows:
            raise NotFound("UNKNOWN_RECORD", f"no record at {entry} {timestamp_us}")
        *row, body = rows[0]
        stored = _stored(row)
        if hashlib.sha256(body).hexdigest() != stored.labels["sha256"]:
            raise DataLost("DIGEST_MISMATCH", f"the image at {entry} {timestamp_us} is not what was written")
        return stored, body

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id; the index makes the search near its time a matter of taste."""
        return await find_frame(self, model, frame_id, camera)

    async def close(self) -> None:
        """Close the database."""
        await self._db.close()
