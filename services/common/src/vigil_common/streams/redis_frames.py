"""Frames on Redis: into the queue, to the workers, and with their outcomes to storage."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from vigil_common.errors import Unavailable
from vigil_common.logging import get_logger
from vigil_common.streams import redis_connection
from vigil_common.streams.ports import Admission, Admitted, Depth, Emission, QueuedFrame, QueuedOutcome
from vigil_common.streams.redis_connection import (
    LIVE,
    OWN,
    OWNER,
    SHADOW,
    STORAGE,
    Connection,
    OverMemory,
    Script,
    Shared,
    entries_of,
    fields_of,
    prefix,
    raise_errors,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

# An entry costs this much more than its image (header, offsets, listpack), by measurement.
ENTRY_OVERHEAD_BYTES = 512
# Shadow verdicts that wait for the shadow service; what falls off is counted as lost.
SHADOW_VERDICTS_AT_MOST = 16_384
# Frames that the queue may hold for a candidate that is behind live.
SHADOW_FRAMES_AT_MOST = 1_000
# Replies that a replica of ingest has yet to read, pictures included, and for how long they wait for one that is gone:
# for longer than its clients, who wait 30 s unless set otherwise.
REPLIES_BYTES_AT_MOST = 64 << 20
REPLIES_KEPT_S = 60
# What a replica has read it trims from here on: each time would be a write to disk for every verdict without pictures.
REPLIES_READ_BYTES = 256 << 10
# Frames of one read.
READ_AT_MOST = 1_024
# A worker that has not been seen for so long is gone; one that comes back brings its name again.
GONE_MS = 86_400_000
ADMIT, EMIT, EMIT_CANDIDATE, TIDY, TRIM = (
    Script.load(name) for name in ("admit", "emit", "emit_candidate", "tidy", "trim")
)

log = get_logger()


class RedisFrameQueue:
    """Ingest's side."""

    def __init__(self, connection: Connection, *, budget_bytes: int, inflight_ttl_s: int = 86_400) -> None:
        self._connection = connection
        self._budget_bytes = budget_bytes
        self._inflight_ttl_s = inflight_ttl_s
        self._ensured: set[str] = set()
        # Bytes of replies that were read and are still there, by their stream.
        self._read_bytes: dict[str, int] = {}

    async def admit(
        self, model: str, *, frame_id: str, sha256: bytes, header: bytes, image: bytes, reply_to: str
    ) -> Admitted:
        """Put a frame into the queue once."""
        if model not in self._ensured:
            # Over the server's memory the script says so, and still what is known; the groups begin at the beginning.
            with suppress(OverMemory):
                await self._connection.ensure_groups(model)
                self._ensured.add(model)
        start = prefix(model)
        shared = Shared((f"{start}frames", f"{start}budget"), (self._budget_bytes, self._inflight_ttl_s))
        size = len(header) + len(image) + ENTRY_OVERHEAD_BYTES
        reply = await self._connection.script_on_each(
            ADMIT, shared, f"{start}frame:{frame_id}", (sha256, header, image, reply_to, size)
        )
        return Admitted(Admission(reply[0].decode()), reply[1] if len(reply) > 1 else None)

    async def read_replies(self, model: str, reply_to: str, after: str, *, block_ms: int) -> tuple[str, list[bytes]]:
        """Outcomes after this place; those before it go in the same round trip, once they are many bytes."""
        key = f"{prefix(model)}replies:{reply_to}"
        commands: list[tuple[Any, ...]] = [("XREAD", "COUNT", 64, "BLOCK", block_ms, "STREAMS", key, after)]
        if after != "0":
            commands.append(("EXISTS", key))
        if after != "0" and self._read_bytes.get(key, 0) >= REPLIES_READ_BYTES:
            milliseconds, number = after.split("-")
            commands.insert(0, ("XTRIM", key, "MINID", f"{milliseconds}-{int(number) + 1}"))
        with translated():
            results = raise_errors(await self._connection.commands(commands))
        if commands[0][0] == "XTRIM":
            self._read_bytes[key] = 0
            del results[0]
        entries = entries_of(results[0])
        if not entries:
            # Where it has expired, the next one begins at Redis' clock, which may have been set back.
            return "0" if results[1:] == [0] else after, []
        replies = [fields_of(fields)[b"o"] for _, fields in entries]
        self._read_bytes[key] = self._read_bytes.get(key, 0) + sum(map(len, replies))
        return entries[-1][0].decode(), replies

    async def depth(self, model: str) -> Depth:
        """How full it is."""
        start = prefix(model)
        with translated():
            length, budget, unstored, dead, groups = await self._connection.commands(
                [
                    ("XLEN", f"{start}frames"),
                    ("HMGET", f"{start}budget", "total", "head"),
                    ("ZCARD", f"{start}unstored"),
                    ("XLEN", f"{start}dead"),
                    ("XINFO", "GROUPS", f"{start}frames"),
                ]
            )
        unjudged = length
        for group in groups if isinstance(groups, list) else []:
            info = fields_of(group)
            if info[b"name"] == LIVE.encode():
                lag = info.get(b"lag")
                unjudged = int(info[b"pending"]) + (length if lag is None else int(lag))
        total, head = (int(float(value or 0)) for value in budget)
        return Depth(frames=length, image_bytes=total - head, unjudged=unjudged, unstored=unstored, dead=dead)

    async def close(self) -> None:
        """Release connections."""
        await self._connection.close()


class RedisFrameSource:
    """A worker's side of one model."""

    group = LIVE

    def __init__(self, connection: Connection, model: str, consumer: str, dedup_window_s: int) -> None:
        self._connection = connection
        self._model = model
        self._key = f"{prefix(model)}frames"
        self._consumer = consumer
        self._dedup_window_s = dedup_window_s
        self._cursor = "-"
        self._at_most = READ_AT_MOST
        self._tidied = False

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer; fewer after a read that took too long, for what it was to bring is claimed."""
        asked, began = min(count, self._at_most), time.monotonic()
        try:
            entries = await self._fetch(asked, block_ms)
        except Unavailable:
            self._at_most = max(1, asked // 2)
            raise
        slow = time.monotonic() - began > redis_connection.SOCKET_TIMEOUT_S
        self._at_most = max(1, asked // 2) if slow else min(READ_AT_MOST, 2 * self._at_most)
        return [_frame(entry_id, fields) for entry_id, fields in entries]

    async def _fetch(self, count: int, block_ms: int) -> list[tuple[bytes, list[bytes]]]:
        return await self._connection.read_group(
            self._model, "frames", self.group, self._consumer, after=">", count=count, block_ms=block_ms
        )

    async def claim(self, *, min_idle_ms: int, count: int, held: Collection[str] = ()) -> list[QueuedFrame]:
        """Frames that a consumer left; fetched one by one, for all at once may be more than a slow line carries."""
        if not self._tidied:
            # Users of Redis made before may not do this, and work on all the same.
            with suppress(ResponseError):
                await self._connection.script(TIDY, [self._key], [self.group, GONE_MS])
            self._tidied = True
        try:
            pending = await self._connection.command(
                "XPENDING", self._key, self.group, "IDLE", min_idle_ms, self._cursor, "+", count
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._connection.ensure_groups(self._model)
            return []
        self._cursor = f"({pending[-1][0].decode()}" if len(pending) == count else "-"
        claimed: list[QueuedFrame] = []
        for entry_id, _, _, deliveries in pending:
            if entry_id.decode() in held:
                continue
            try:
                found = await self._connection.command(
                    "XCLAIM", self._key, self.group, self._consumer, min_idle_ms, entry_id
                )
                if found:
                    claimed.append(_frame(*found[0], deliveries=int(deliveries) + 1))
                elif not await self._connection.command("XRANGE", self._key, entry_id, entry_id):
                    log.error("frames_lost", model=self._model, entries=[entry_id.decode()])
            except Unavailable:
                if not claimed:
                    raise
                break  # those are ours
        return claimed

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome, reply and acknowledgement in one step."""
        start = prefix(self._model)
        arguments: list[Any] = [start, self._dedup_window_s, SHADOW_VERDICTS_AT_MOST]
        arguments += [REPLIES_BYTES_AT_MOST, REPLIES_KEPT_S]
        for emission in emissions:
            reply = b"" if emission.reply == emission.outcome else emission.reply
            arguments += [emission.entry_id, emission.frame_id, emission.outcome, reply, emission.dead_reason]
            arguments.append(emission.compared)
        names = ("frames", "verdicts", "unstored", "dead", "shadow-verdicts", "shadow-sequence")
        keys = [f"{start}{name}" for name in names]
        return [won == 1 for won in await self._connection.script(EMIT, keys, arguments)]

    async def close(self) -> None:
        """Nothing of its own to release."""


class RedisCandidateSource(RedisFrameSource):
    """A candidate's side of one model: reads in shadow's group, and emits to shadow alone."""

    group = SHADOW

    def __init__(self, connection: Connection, model: str, consumer: str, digest: str) -> None:
        super().__init__(connection, model, consumer, 0)
        self._digest = digest

    async def _fetch(self, count: int, block_ms: int) -> list[tuple[bytes, list[bytes]]]:
        """Nothing where the comparison has just ended."""
        try:
            reply = await self._connection.command(
                *("XREADGROUP", "GROUP", SHADOW, self._consumer, "COUNT", count, "BLOCK", max(1, block_ms)),
                *("STREAMS", self._key, ">"),
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            # The route, which made the group, is about to say so; until then this must not spin.
            await asyncio.sleep(block_ms / 1000)
            return []
        return entries_of(reply)

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome for shadow and acknowledgement in one step."""
        start = prefix(self._model)
        arguments: list[Any] = [start, self._digest, SHADOW_VERDICTS_AT_MOST]
        for emission in emissions:
            arguments += [emission.entry_id, emission.frame_id, emission.outcome, emission.header]
        keys = [f"{start}{name}" for name in ("frames", "shadow-verdicts", "shadow-sequence")]
        return [won == 1 for won in await self._connection.script(EMIT_CANDIDATE, keys, arguments)]


def _frame(entry_id: bytes, flat: Any, *, deliveries: int = 1) -> QueuedFrame:
    fields = fields_of(flat)
    return QueuedFrame(entry_id.decode(), fields[b"h"], fields[b"i"], deliveries)


class RedisOutcomeSource:
    """Storage's side of one model."""

    def __init__(self, connection: Connection, model: str, consumer: str) -> None:
        self._connection = connection
        self._model = model
        self._consumer = consumer
        self._start = prefix(model)
        self._pending_after = "0"

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease."""
        owned = await self._connection.script(OWN, [f"{self._start}owner"], [self._consumer, ttl_ms])
        return bool(owned == 1)

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[QueuedOutcome]:
        """New outcomes with their frames, or those that were taken and not finished."""
        after = self._pending_after if pending else ">"
        entries = await self._connection.read_group(
            self._model, "verdicts", STORAGE, OWNER, after=after, count=count, block_ms=block_ms
        )
        if pending:
            self._pending_after = entries[-1][0].decode() if entries else "0"
        present = [(entry_id, fields_of(flat)) for entry_id, flat in entries if flat]
        if not present:
            return []
        frames_key = f"{self._start}frames"
        with translated():
            frames = await self._connection.commands(
                [("XRANGE", frames_key, fields[b"e"], fields[b"e"]) for _, fields in present]
            )
        read = list(zip(present, raise_errors(frames), strict=True))
        if gone := [fields[b"e"] for (_, fields), found in read if not found]:
            # Somebody took them out by hand; nobody stores them, and all that came after would wait for that.
            await self._connection.command("ZREM", f"{self._start}unstored", *gone)
        return [
            QueuedOutcome(entry_id.decode(), fields[b"v"], _frame(*found[0]) if found else None)
            for (entry_id, fields), found in read
        ]

    async def done(self, outcomes: Sequence[QueuedOutcome]) -> None:
        """Free their frames, then forget them: a crash between the two repeats this, which does no harm."""
        if not outcomes:
            return
        entries = [outcome.frame.entry_id for outcome in outcomes if outcome.frame]
        if entries:
            await self._connection.command("ZREM", f"{self._start}unstored", *entries)
        await self._connection.command(
            "XACK", f"{self._start}verdicts", STORAGE, *(outcome.entry_id for outcome in outcomes)
        )

    async def trim(self) -> int:
        """Drop what nobody needs any more."""
        keys = [f"{self._start}{name}" for name in ("frames", "verdicts", "unstored", "budget", "routing")]
        return max(0, int(await self._connection.script(TRIM, keys, [self._start, SHADOW_FRAMES_AT_MOST])))

    async def close(self) -> None:
        """Give the lease back."""
        await self.own(ttl_ms=0)
