"""Queries of frames, and model versions; free of transport."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from vigil_common.access import principal
from vigil_common.audit import audit
from vigil_common.bundle import MAX_BUNDLE_BYTES, NAME
from vigil_common.errors import Conflict, InvalidInput
from vigil_common.store.ports import ModelInfo

from vigil_storage import domain
from vigil_storage.bundles import Incoming

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vigil_common.store.ports import FrameFilter, FrameStore, ModelStore, StoredRecord

DEFAULT_PAGE = 100
MAX_PAGE = 1_000
MAX_REASON = 1_000
# A version is the time of its record in ReductStore, which no longer lists any once one stands at 2**64 - 1.
MAX_VERSION = 2**31 - 1
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Storage:
    """What the service offers.

    Args:
        frames: Where frames are.
        models: Where model versions are.
        now_us: Microseconds since 1970.
    """

    def __init__(
        self,
        frames: FrameStore,
        models: ModelStore,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        self.frames = frames
        self.models = models
        self._now_us = now_us
        self._publishing = asyncio.Lock()
        # A lock is there as long as somebody holds it or waits for it.
        self._uploads: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def query(self, where: FrameFilter, *, page_size: int, token: str) -> tuple[list[StoredRecord], str]:
        """A page of records, oldest first, and the token of the next; empty where that was the last."""
        if page_size > MAX_PAGE:
            raise InvalidInput("PAGE_TOO_LARGE", f"a page has at most {MAX_PAGE} frames")
        size = page_size or DEFAULT_PAGE
        after = domain.PageToken.decode(token) if token else None
        limit = size + 1
        if after:
            where = replace(where, start_us=max(after.timestamp_us, where.start_us or 0))
            limit += len(after.entries)
        found = [record async for record in self.frames.query(where, limit=limit)]
        given, following = domain.page(found, size, after)
        return given, following.encode() if following else ""

    async def get(self, model: str, frame_id: str, camera: str, *, header_only: bool) -> tuple[StoredRecord, bytes]:
        """A frame by its id, its image empty where only the header is asked for."""
        if not model or not frame_id:
            raise InvalidInput("ID_MISSING", "model and frame_id are needed")
        stored = await self.frames.find(model, frame_id, camera or None)
        if header_only:
            return stored, b""
        return await self.frames.read(stored.entry, stored.timestamp_us)

    async def publish(
        self, chunks: AsyncIterator[bytes], *, name: str, version: int, digest: str, size_bytes: int
    ) -> tuple[ModelInfo, bool]:
        """Keep a bundle as a new version; it is checked and written as it comes.

        Args:
            chunks: Of the tar.
            name: Of the model.
            version: At most `MAX_VERSION`; 0 takes the next free one.
            digest: What the bundle must hash to.
            size_bytes: Its length.

        Returns:
            The version, and whether it is new: the same bundle again has the version it had.
        """
        if not NAME.fullmatch(name) or not DIGEST.fullmatch(digest):
            raise InvalidInput("HEADER_INVALID", "the header names the model, and its bundle's digest as sha256:HEX")
        if not 0 < size_bytes <= MAX_BUNDLE_BYTES:
            raise InvalidInput("BUNDLE_TOO_LARGE", f"size_bytes is between 1 and {MAX_BUNDLE_BYTES}, not {size_bytes}")
        if version > MAX_VERSION:
            raise InvalidInput("VERSION_INVALID", f"a version is a number up to {MAX_VERSION:,}, not {version:,}")
        upload = self._uploads.setdefault(digest, asyncio.Lock())
        async with upload:
            return await self._publish(chunks, name, version, digest, size_bytes)

    async def _publish(
        self, chunks: AsyncIterator[bytes], name: str, version: int, digest: str, size_bytes: int
    ) -> tuple[ModelInfo, bool]:
        incoming = Incoming(chunks, name=name, digest=digest, size_bytes=size_bytes)
        stands = any(info.digest == digest for info in await self.models.list(name))
        if stands:  # read all the same: a client that still writes would not hear the answer
            async for _ in incoming.chunks():
                pass
        else:
            await self.models.upload(name, digest, size_bytes, incoming.chunks())
        bundle = incoming.bundle
        async with self._publishing:
            known = await self.models.list(name)
            for info in known:
                if info.digest == digest and version in (0, info.version):
                    return info, False
            if any(info.version == version for info in known):
                raise Conflict("VERSION_EXISTS", f"{name} has another version {version}")
            info = ModelInfo(
                name=name,
                version=version or max((info.version for info in known), default=0) + 1,
                digest=digest,
                size_bytes=size_bytes,
                formats=bundle.formats,
                published_at_us=self._now_us(),
                manifest=bundle.text,
                published_by=principal().name,
            )
            await self.models.publish(info)
        audit("published", model=name, version=info.version, digest=digest)
        return info, True

    async def deprecate(self, name: str, version: int, reason: str) -> ModelInfo:
        """Say why a version should not be used any more."""
        if not reason.strip() or len(reason) > MAX_REASON:
            raise InvalidInput("REASON_INVALID", f"say why, in 1 to {MAX_REASON:,} characters")
        info = await self.models.deprecate(name, version, reason.strip())
        audit("deprecated", model=name, version=version)
        return info
