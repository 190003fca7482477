"""Model versions in the embedded store."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import tempfile
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from vigil_common.errors import Conflict, DataLost, NotFound, Unavailable
from vigil_common.store.bundles import Measured, checked
from vigil_common.store.embedded import open_database, translated
from vigil_common.store.ports import ModelInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiosqlite

CHUNK_BYTES = 1 << 20
COLUMNS = ", ".join(field.name for field in fields(ModelInfo))
SCHEMA = """
CREATE TABLE IF NOT EXISTS models (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    formats TEXT NOT NULL, published_at_us INTEGER NOT NULL, manifest TEXT NOT NULL, published_by TEXT NOT NULL,
    deprecated TEXT NOT NULL, PRIMARY KEY (name, version)) WITHOUT ROWID;
"""


class EmbeddedModelStore:
    """Model versions: index in `models.db`, bundles as `models/DIGEST.tar`."""

    def __init__(self, connection: aiosqlite.Connection, folder: Path) -> None:
        self._db = connection
        self._folder = folder

    @classmethod
    async def open(cls, folder: Path) -> Self:
        """Open the folder, made where it is missing."""
        bundles = Path(folder) / "models"
        connection = await open_database(Path(folder) / "models.db", SCHEMA)
        await asyncio.to_thread(bundles.mkdir, exist_ok=True)
        return cls(connection, bundles)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.tar"

    async def upload(self, name: str, digest: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:  # noqa: ARG002 - a digest has one file, whatever names share it
        """Keep a bundle's bytes; see the port."""
        async with translated():
            handle, temporary = await asyncio.to_thread(tempfile.mkstemp, dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    async for chunk in Measured(chunks, size_bytes).chunks():
                        await asyncio.to_thread(file.write, chunk)
                    await asyncio.to_thread(_settle, file)
                await asyncio.to_thread(_place, Path(temporary), self._path(digest))
            finally:
                await asyncio.to_thread(Path(temporary).unlink, missing_ok=True)

    async def publish(self, info: ModelInfo) -> None:
        """Show an uploaded bundle; see the port."""
        if not await asyncio.to_thread(self._path(info.digest).exists):
            raise Unavailable("NOT_KEPT", "the bundle is not there; publish it again", retry_after_s=5.0)
        async with translated():
            row = [json.dumps(value) if isinstance(value, tuple) else value for value in astuple(info)]
            places = ", ".join("?" * len(row))
            try:
                await self._db.execute(f"INSERT INTO models ({COLUMNS}) VALUES ({places})", row)  # noqa: S608
            except sqlite3.IntegrityError as error:
                raise Conflict("VERSION_EXISTS", f"{info.name} has a version {info.version}") from error

    async def deprecate(self, name: str, version: int, reason: str) -> ModelInfo:
        """Say why; see the port."""
        await self.get(name, version)
        async with translated():
            await self._db.execute(
                "UPDATE models SET deprecated = ? WHERE name = ? AND version = ? AND deprecated = ''",
                (reason, name, version),
            )
        return await self.get(name, version)

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number."""
        statement = f"SELECT {COLUMNS} FROM models WHERE ?1 IS NULL OR name = ?1 ORDER BY name, version"  # noqa: S608
        async with translated():
            rows = await self._db.execute_fetchall(statement, (name,))
        found = [ModelInfo(*row) for row in rows]
        return [replace(info, formats=tuple(json.loads(str(info.formats)))) for info in found]

    async def get(self, name: str, version: int | None = None) -> ModelInfo:
        """One version, the newest where none is given."""
        versions = await self.list(name)
        if not versions:
            raise NotFound("UNKNOWN_MODEL", f"no model {name} has been published")
        if version is None:
            return versions[-1]
        for info in versions:
            if info.version == version:
                return info
        raise NotFound("UNKNOWN_VERSION", f"model {name} has no version {version}")

    async def download(self, info: ModelInfo) -> AsyncIterator[bytes]:
        """The bundle, checked against its digest at the end."""
        try:
            async for chunk in checked(self._read(info.digest), info):
                yield chunk
        except FileNotFoundError as error:
            what = f"the bundle of {info.name} version {info.version} is gone"
            raise DataLost("BUNDLE_BROKEN", what) from error

    async def _read(self, digest: str) -> AsyncIterator[bytes]:
        with await asyncio.to_thread(self._path(digest).open, "rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    async def close(self) -> None:
        """Close the database."""
        await self._db.close()


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _place(temporary: Path, path: Path) -> None:
    """Give it its name, for good."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
