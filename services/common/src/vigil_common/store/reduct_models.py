"""Model versions in ReductStore."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from reduct import BucketSettings, QuotaType, ReductError

from vigil_common.errors import Conflict, DataLost, NotFound, Unavailable
from vigil_common.store.bundles import Measured, checked
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
LOOKS, LOOK_AGAIN_S = 5, 0.02
BUNDLES, POINTERS, DEPRECATED = "bundles", "index", "deprecated"
WRITTEN = "written_us"


class ReductModelStore:
    """Model versions in one bucket without a quota.

    The bundle stands in entry `bundles/NAME/DIGEST`; a pointer, `index/NAME` at time VERSION, holds its ModelInfo as
    JSON. A pointer is written once the whole bundle stands, and only what has both is listed: on its way to an edge
    the pointer may be first. Why a version is deprecated stands in `deprecated/NAME` at time VERSION, since a published
    record never changes.
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
            settle_s: How long after a write to an entry the next one may follow: longer than two of the server's
                compaction intervals, see `_append`.
        """
        settings = BucketSettings(quota_type=QuotaType.NONE)
        return cls(*await open_bucket(url, token, bucket, settings, None), settle_s)

    async def upload(self, name: str, digest: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """Keep a bundle's bytes; see the port."""
        entry = _bundle_entry(name, digest)
        measured = Measured(chunks, size_bytes)
        # A time of its own: the server may still hold the one of an upload that was cut off a moment ago (409). What
        # counts is the latest; nothing is uploaded any more once a version points at it.
        at = time.time_ns() // 1_000
        try:
            async with translated():
                try:
                    await self._bucket.write(
                        entry,
                        measured.chunks(),
                        timestamp=at,
                        content_length=size_bytes,
                        content_type="application/x-tar",
                        labels={"digest": digest, "size": str(size_bytes)},
                    )
                finally:
                    # The library hides what the chunks raise behind an error of its own.
                    measured.reraise()
        except BaseException:
            await asyncio.shield(self._give_up(entry, at))
            raise

    async def _give_up(self, entry: str, at: int) -> None:
        # What stays all the same is broken, has no pointer, and is never the latest again.
        with suppress(*TROUBLE):
            await self._bucket.remove_record(entry, at)

    async def publish(self, info: ModelInfo) -> None:
        """Show an uploaded bundle; see the port."""
        async with translated():
            if await self._pointer(info.name, info.version) is not None:
                raise Conflict("VERSION_EXISTS", f"{info.name} has a version {info.version}")
            if await self._place(info) is None:
                raise _not_kept()
            body = json.dumps({key: value for key, value in asdict(info).items() if key != "deprecated"}).encode()
            await self._append(f"{POINTERS}/{info.name}", info.version, body)
            if await self._pointer(info.name, info.version) != info or await self._place(info) is None:
                raise _not_kept()

    async def _append(self, entry: str, version: int, body: bytes) -> None:
        """Write a small record for good.

        A killed server keeps what it acknowledged, unless it dies in the middle of the next write to the same entry:
        then it drops all that it has not compacted there. So the next write waits until the one before is safe.
        """
        async with self._lock:
            await asyncio.sleep(await self._rest_s(entry))
            labels = {WRITTEN: str(time.time_ns() // 1_000)}
            try:
                await self._bucket.write(entry, body, timestamp=version, content_type="application/json", labels=labels)
            except ReductError as error:
                if error.status_code == CONFLICT:
                    raise Conflict("VERSION_EXISTS", f"{entry} has a record of version {version}") from error
                raise

    async def _rest_s(self, entry: str) -> float:
        """How long the entry is still to be left alone, whoever wrote there last."""
        newest_us = 0
        try:
            async for record in self._bucket.query(entry, head=True):
                newest_us = max(newest_us, int(record.labels.get(WRITTEN, 0)))
        except ReductError as error:
            if error.status_code != NOT_FOUND:
                raise
        return min(max(self._settle_s + newest_us / 1e6 - time.time(), 0.0), self._settle_s)

    async def deprecate(self, name: str, version: int, reason: str) -> ModelInfo:
        """Say why; see the port."""
        info = await self.get(name, version)
        if info.deprecated:
            return info
        async with translated():
            try:
                await self._append(f"{DEPRECATED}/{name}", version, json.dumps(reason).encode())
            except Conflict:  # somebody else was first
                return await self.get(name, version)
        return replace(info, deprecated=reason)

    async def _place(self, info: ModelInfo) -> int | None:
        """Where the whole bundle stands; None where it doesn't.

        While the record of an upload that was cut off goes, the server may overlook this one for some milliseconds, in
        a query as when asked for the latest. So it is asked again before that is believed.
        """
        for _ in range(LOOKS):
            found = None
            try:
                async for record in self._bucket.query(_bundle_entry(info.name, info.digest), head=True):
                    if record.size == info.size_bytes:
                        found = int(record.timestamp)
            except ReductError as error:
                if error.status_code not in (NOT_FOUND, TOO_EARLY, BROKEN):
                    raise
            if found is not None:
                return found
            await asyncio.sleep(LOOK_AGAIN_S)
        return None

    async def _read(self, entry: str, version: int) -> Any:
        """A small record's JSON; None where there is none."""
        if version <= 0:
            return None
        try:
            async with self._bucket.read(entry, version) as record:
                return json.loads(await record.read_all())
        except ReductError as error:
            if error.status_code != NOT_FOUND:
                raise
            return None

    async def _pointer(self, name: str, version: int) -> ModelInfo | None:
        fields = await self._read(f"{POINTERS}/{name}", version)
        if fields is None:
            return None
        return _info(fields, await self._read(f"{DEPRECATED}/{name}", version) or "")

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number."""
        async with translated():
            reasons = await self._read_all(DEPRECATED, name)
            pointers = await self._read_all(POINTERS, name)
            found = [_info(fields, reasons.get(place, "")) for place, fields in pointers.items()]
            places = await asyncio.gather(*(self._place(info) for info in found))
        whole = [info for info, place in zip(found, places, strict=True) if place is not None]
        return sorted(whole, key=lambda info: (info.name, info.version))

    async def _read_all(self, kind: str, name: str | None) -> dict[tuple[str, int], Any]:
        """Small records of one model or all, by name and version.

        One query per entry: of several at once the library takes the bodies in another order than the server sends.
        """
        existing = [entry.name for entry in await self._bucket.get_entry_list()]
        entries = [
            entry for entry in existing if entry.startswith(f"{kind}/") and name in (None, entry[len(kind) + 1 :])
        ]
        return {
            (entry[len(kind) + 1 :], record.timestamp): json.loads(await record.read_all())
            for entry in entries
            async for record in self._bucket.query(entry)
        }

    async def get(self, name: str, version: int | None = None) -> ModelInfo:
        """One version, the newest where none is given."""
        if version is None:
            versions = await self.list(name)
            if versions:
                return versions[-1]
            raise NotFound("UNKNOWN_MODEL", f"no model {name} has been published")
        async with translated():
            info = await self._pointer(name, version)
            place = None if info is None else await self._place(info)
        if info is not None and place is None:
            what = f"the bundle of {name} version {version} is not all here; it may be on its way from the centre"
            raise Unavailable("BUNDLE_INCOMPLETE", f"{what}, else publish it again", retry_after_s=5.0)
        if info is None:
            known = await self.list(name)
            reason = "UNKNOWN_VERSION" if known else "UNKNOWN_MODEL"
            raise NotFound(reason, f"model {name} has no version {version}")
        return info

    async def download(self, info: ModelInfo) -> AsyncIterator[bytes]:
        """The bundle, checked against its digest at the end."""
        try:
            place = await self._place(info)
            if place is None:
                raise DataLost("BUNDLE_BROKEN", f"the bundle of {info.name} version {info.version} is gone")
            async with self._bucket.read(_bundle_entry(info.name, info.digest), place) as record:
                async for chunk in checked(record.read(CHUNK_BYTES), info):
                    yield chunk
        except TROUBLE as error:
            if status(error) in (NOT_FOUND, TOO_EARLY, BROKEN) or isinstance(error, aiohttp.ClientPayloadError):
                what = f"the bundle of {info.name} version {info.version} is gone"
                raise DataLost("BUNDLE_BROKEN", what) from error
            raise translate(error) from error

    async def close(self) -> None:
        """Release connections."""
        await self._client.__aexit__(None, None, None)


def _bundle_entry(name: str, digest: str) -> str:
    return f"{BUNDLES}/{name}/{digest.removeprefix('sha256:')}"


def entries_of(name: str) -> tuple[str, str, str]:
    """Where everything about a model stands, as wildcards."""
    return f"{BUNDLES}/{name}/*", f"{POINTERS}/{name}", f"{DEPRECATED}/{name}"


def _info(fields: dict[str, Any], deprecated: str) -> ModelInfo:
    return ModelInfo(**{**fields, "formats": tuple(fields["formats"]), "deprecated": deprecated})


def _not_kept() -> Unavailable:
    return Unavailable("NOT_KEPT", "the store restarted meanwhile; publish it again", retry_after_s=5.0)
