"""The whole platform as real processes, with a real model live, for one test."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from vigil_cli.local.stack import LocalStack
from vigil_client import StorageClient
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import train

from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MODEL = "cells"


@lru_cache(maxsize=1)
def trained_bundle() -> bytes:
    """A model of the built-in trainer."""
    return train(load_cells().train[:80], name=MODEL).bundle


@dataclass
class Platform:
    """What a test asks of the platform."""

    stack: LocalStack
    streams: RedisStreams
    storage: StorageClient
    worker: str

    async def stored(self) -> dict[str, int]:
        """How often each frame id is stored."""
        counts: dict[str, int] = {}
        async for frame in self.storage.frames_query(MODEL):
            counts[frame.frame_id] = counts.get(frame.frame_id, 0) + 1
        return counts

    async def settled(self, deadline_s: float = 60.0) -> None:
        """Wait until every frame in the queue is judged, stored and confirmed."""
        deadline = time.monotonic() + deadline_s
        while True:
            depth = await self.streams.queue.depth(MODEL)
            if not depth.unjudged and not depth.unstored:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"not settled: {depth}\n{self.logs()}")
            await asyncio.sleep(0.1)

    def logs(self) -> str:
        """Ends of every log."""
        folder = self.stack.folder / "logs"
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))


@asynccontextmanager
async def platform(folder: Path, *, bundle: bytes | None = None, **env: str) -> AsyncIterator[Platform]:
    """Start everything; settings without their prefix."""
    settings = {"VIGIL_CLAIM_IDLE_MS": "1500", **{f"VIGIL_{key}": value for key, value in env.items()}}
    async with LocalStack(folder / "stack", env=settings) as stack, StorageClient(stack.storage_address) as storage:
        model = await storage.models_publish(bundle or trained_bundle(), name=MODEL)
        streams = await RedisStreams.connect(stack.redis_url)
        try:
            await streams.routing.promote(MODEL, version=model.version, digest=model.digest, threshold=None)
            worker = await stack.add_worker(MODEL, model.version)
            yield Platform(stack, streams, storage, worker)
        finally:
            await streams.close()
