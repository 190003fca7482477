"""Model versions in ReductStore."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from reduct import BucketSettings, QuotaType, ReductError

from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound, Unavailable
from vigil_common.store.ports import ModelInfo
from vigil_common.store.reduct_client import (
    BROKEN,
    CONFLICT,
    NOT_FOUND,
    TOO_EARLY,
    TROUBLE,
    open_bucket,
    status,
    translate,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHUNK_BYTES = 1 << 20
POINTERS = "index"


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
        return cls(*await open_bucket(url, token, bucket, settings, None), settle_s)

    async def publish(self, info: ModelInfo, bundle: bytes) -> None:
        """Keep a version; see the port."""
        if hashlib.sha256(bundle).hexdigest() != info.digest.removeprefix("sha256:"):
            raise InvalidInput("DIGEST_MISMATCH", "the bundle does not hash to its digest")
        async with self._lock, translated():
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
                if error.status_code == CONFLICT:
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
            if error.status_code != NOT_FOUND:
                raise

    async def _stored_digest(self, info: ModelInfo) -> str | None:
        """The digest of the bytes that stand there; None where there are none or they are broken."""
        digest = hashlib.sha256()
        try:
            async with self._bucket.read(_bundle_entry(info), info.version) as record:
                async for chunk in record.read(CHUNK_BYTES):
                    digest.update(chunk)
        except (ReductError, aiohttp.ClientPayloadError) as error:
            if status(error) in (NOT_FOUND, TOO_EARLY, BROKEN) or isinstance(error, aiohttp.ClientError):
                return None
            raise
        return f"sha256:{digest.hexdigest()}"

    async def _size(self, info: ModelInfo) -> int | None:
        try:
            async with self._bucket.read(_bundle_entry(info), info.version, head=True) as record:
                return int(record.size)
        except ReductError as error:
            if error.status_code != NOT_FOUND:
                raise
            return None

    async def _pointer(self, name: str, version: int) -> ModelInfo | None:
        if version <= 0:
            return None
        try:
            async with self._bucket.read(f"{POINTERS}/{name}", version) as record:
                return _info(await record.read_all())
        except ReductError as error:
            if error.status_code != NOT_FOUND:
                raise
            return None

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number."""
        async with translated():
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
        async with translated():
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
        except TROUBLE as error:
            if status(error) in (NOT_FOUND, TOO_EARLY, BROKEN):
                raise DataLost("BUNDLE_BROKEN", f"the bundle of {name} version {version} is gone") from error
            raise translate(error) from error
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
