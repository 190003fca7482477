"""What people say, on its way to the store, on Redis."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vigil_common.streams.ports import QueuedAnnotation
from vigil_common.streams.redis_connection import Connection, OverMemory, Script, entries_of, fields_of, prefix
from vigil_common.streams.redis_routing import enlist

if TYPE_CHECKING:
    from collections.abc import Sequence

ANNOTATE = Script.load("annotate")


class RedisReviewLog:
    """What people say, in the stream `annotations` (ids that wait in `annotation-ids`), and what they were given."""

    # Each may bring a mask; the store takes hundreds a second.
    LIMIT = 256
    GIVEN = 20_000
    GIVEN_TTL_S = 30 * 86_400

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(self, model: str, annotation_id: str, body: bytes, mask: bytes) -> tuple[str, bytes] | None:
        """Place and body of what waits under the id."""
        start = prefix(model)
        keys = [f"{start}annotations", f"{start}annotation-ids"]
        try:
            # Storage looks for work there, and the model's route may be gone; its frames are not.
            await enlist(self._connection, model)
            waits = await self._connection.script(ANNOTATE, keys, [annotation_id, body, mask, self.LIMIT])
        except OverMemory:
            return None
        return (waits[0].decode(), waits[1]) if waits else None

    async def read(self, model: str, after: str, *, count: int, block_ms: int) -> list[QueuedAnnotation]:
        """What was said after this place."""
        blocking = ("BLOCK", block_ms) if block_ms > 0 else ()
        key = f"{prefix(model)}annotations"
        reply = await self._connection.command("XREAD", "COUNT", count, *blocking, "STREAMS", key, after)
        found = [(place.decode(), fields_of(flat)) for place, flat in entries_of(reply)]
        return [QueuedAnnotation(place, said[b"i"].decode(), said[b"b"], said[b"m"]) for place, said in found]

    async def done(self, model: str, annotations: Sequence[QueuedAnnotation]) -> None:
        """Forget them; the ids first, so that a crash between the two leaves none that can't be said again."""
        if annotations:
            start = prefix(model)
            await self._connection.command(
                "HDEL", f"{start}annotation-ids", *(one.annotation_id for one in annotations)
            )
            await self._connection.command("XDEL", f"{start}annotations", *(one.place for one in annotations))

    async def give(self, model: str, reviewer: str, frame_ids: Sequence[str]) -> None:
        """Remember what a reviewer has been given."""
        if frame_ids:
            key = self._given_key(model, reviewer)
            at = (await self._connection.command("TIME"))[0].decode()
            await self._connection.command("ZADD", key, *(part for one in frame_ids for part in (at, one)))
            await self._connection.command("ZREMRANGEBYRANK", key, 0, -self.GIVEN - 1)
            await self._connection.command("EXPIRE", key, self.GIVEN_TTL_S)

    async def given(self, model: str, reviewer: str) -> list[str]:
        """What a reviewer has been given, the longest ago first."""
        found = await self._connection.command("ZRANGE", self._given_key(model, reviewer), 0, -1)
        return [one.decode() for one in found]

    def _given_key(self, model: str, reviewer: str) -> str:
        return f"{prefix(model)}given:{hashlib.sha256(reviewer.encode()).hexdigest()[:16]}"
