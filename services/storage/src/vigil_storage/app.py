"""Queries of frames, and model versions; free of transport."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vigil_common.errors import Conflict, InvalidBundle, InvalidInput
from vigil_common.store.ports import ModelInfo

from vigil_storage import domain

if TYPE_CHECKING:
    from collections.abc import Callable

    from vigil_common.store.ports import FrameFilter, FrameStore, ModelStore, StoredRecord

    from vigil_storage.bundles import Inspected

DEFAULT_PAGE = 100
MAX_PAGE = 1_000


class Storage:
    """What the service offers.

    Args:
        frames: Where frames are.
        models: Where model versions are.
        inspect: Reads a bundle; raises `InvalidBundle` for one that can't be trusted or run.
        now_us: Microseconds since 1970.
    """

    def __init__(
        self,
        frames: FrameStore,
        models: ModelStore,
        inspect: Callable[[bytes], Inspected],
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        self.frames = frames
        self.models = models
        self._inspect = inspect
        self._now_us = now_us
        self._publishing = asyncio.Lock()

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

    async def publish(self, bundle: bytes, *, name: str, version: int, digest: str) -> tuple[ModelInfo, bool]:
        """Keep a bundle as a new version.

        Args:
            bundle: The tar.
            name: Of the model; empty takes the manifest's.
            version: 0 takes the next free one.
            digest: Where given, what the bundle must hash to.

        Returns:
            The version, and whether it is new: the same bundle again has the version it had.
        """
        computed = f"sha256:{await asyncio.to_thread(lambda: hashlib.sha256(bundle).hexdigest())}"
        if digest and digest != computed:
            raise InvalidBundle("DIGEST_MISMATCH", f"the bundle hashes to {computed}, not to {digest}")
        inspected = await asyncio.to_thread(self._inspect, bundle)
        if name and name != inspected.name:
            raise InvalidBundle("NAME_MISMATCH", f"the bundle is of model {inspected.name}, not of {name}")
        async with self._publishing:
            known = await self.models.list(inspected.name)
            for info in known:
                if info.digest == computed and version in (0, info.version):
                    return info, False
            if any(info.version == version for info in known):
                raise Conflict("VERSION_EXISTS", f"{inspected.name} has another version {version}")
            info = ModelInfo(
                name=inspected.name,
                version=version or max((info.version for info in known), default=0) + 1,
                digest=computed,
                size_bytes=len(bundle),
                formats=inspected.formats,
                published_at_us=self._now_us(),
                manifest=inspected.manifest,
            )
            await self.models.publish(info, bundle)
        return info, True
