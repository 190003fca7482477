"""Model versions in the embedded store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound
from vigil_common.store.embedded import open_database, translated
from vigil_common.store.ports import ModelInfo

if TYPE_CHECKING:
    import aiosqlite


MODEL_COLUMNS = "name, version, digest, size_bytes, formats, published_at_us, manifest"
MODELS = """
CREATE TABLE IF NOT EXISTS models (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    formats TEXT NOT NULL, published_at_us INTEGER NOT NULL, manifest TEXT NOT NULL,
    PRIMARY KEY (name, version)) WITHOUT ROWID;
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
        connection = await open_database(Path(folder) / "models.db", MODELS)
        await asyncio.to_thread(bundles.mkdir, exist_ok=True)
        return cls(connection, bundles)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.tar"

    async def publish(self, info: ModelInfo, bundle: bytes) -> None:
        """Keep a version; see the port."""
        if hashlib.sha256(bundle).hexdigest() != info.digest.removeprefix("sha256:"):
            raise InvalidInput("DIGEST_MISMATCH", "the bundle does not hash to its digest")
        async with translated():
            await asyncio.to_thread(_write_file, self._path(info.digest), bundle)
            row = (info.name, info.version, info.digest, info.size_bytes)
            try:
                await self._db.execute(
                    "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, json.dumps(info.formats), info.published_at_us, info.manifest),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict("VERSION_EXISTS", f"{info.name} has a version {info.version}") from error

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number."""
        statement = f"SELECT {MODEL_COLUMNS} FROM models WHERE ?1 IS NULL OR name = ?1 ORDER BY name, version"  # noqa: S608
        async with translated():
            rows = await self._db.execute_fetchall(statement, (name,))
        return [ModelInfo(row[0], row[1], row[2], row[3], tuple(json.loads(row[4])), row[5], row[6]) for row in rows]

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

    async def download(self, name: str, version: int) -> bytes:
        """The bundle, checked against its digest."""
        info = await self.get(name, version)
        try:
            bundle = await asyncio.to_thread(self._path(info.digest).read_bytes)
        except FileNotFoundError as error:
            raise DataLost("BUNDLE_BROKEN", f"the bundle of {name} version {version} is gone") from error
        if f"sha256:{hashlib.sha256(bundle).hexdigest()}" != info.digest:
            raise DataLost("DIGEST_MISMATCH", f"the bundle of {name} version {version} is not what was published")
        return bundle

    async def close(self) -> None:
        """Close the database."""
        await self._db.close()


def _write_file(path: Path, body: bytes) -> None:
    """Whole or not at all, and on the disk when it returns."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
