"""Verdicts on their way to Redis: in the order in which they were ready, in groups while much is to do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vigil_common.logging import get_logger

from vigil_inference.roles import Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vigil_common.streams.ports import Emission, FrameSource

EMIT_AT_MOST = 32
# With large pictures few go together: what a slow line doesn't carry within Redis' time-out would be sent for ever.
EMIT_BYTES = 4 << 20
# Past this, a worker takes no more frames.
OUTBOX_AT_MOST, OUTBOX_BYTES = 128, 64 << 20

log = get_logger()


class Outbox:
    """What is judged and not emitted yet.

    Args:
        sources: Where the frames of each role were read, and their verdicts go.
        coming: How many frames are being judged now.
        gather: Waits while a candidate's verdicts, which nobody waits for, may get company.

    Attributes:
        together: How many go together while as many are still coming: a call for each verdict alone would cost Redis,
            ingest and the client a good part of what they do for it.
        emptied: Set while nothing is in it.
    """

    def __init__(
        self,
        sources: Mapping[Role, FrameSource],
        *,
        together: int,
        coming: Callable[[], int],
        gather: Callable[[], Awaitable[None]],
    ) -> None:
        self._sources = sources
        self._coming = coming
        self._gather = gather
        self._waiting: list[tuple[Role, Emission]] = []
        self._outgoing = asyncio.Event()
        self.together = together
        self.emptied = asyncio.Event()
        self.emptied.set()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether Redis has to take some first."""
        return len(self._waiting) >= OUTBOX_AT_MOST or sum(_bytes(one) for _, one in self._waiting) >= OUTBOX_BYTES

    def held(self, role: Role) -> set[str]:
        """The stream's entries that these answer."""
        return {emission.entry_id for of, emission in self._waiting if of is role}

    def put(self, role: Role, emission: Emission) -> None:
        """Add one; it leaves by `emit`."""
        self._waiting.append((role, emission))
        self.emptied.clear()
        self.let_out()

    def let_out(self) -> None:
        """Let what is ready be emitted, unless it soon has company; to be called when fewer are coming."""
        if self._waiting and (len(self._waiting) >= self.together or self._coming() < self.together):
            self._outgoing.set()
        else:
            self._outgoing.clear()

    async def emit(self) -> None:
        """Wait for something to send and send it; what becomes ready meanwhile goes with the next.

        Raises:
            Unavailable: Redis is away; nothing has left.
        """
        await self._outgoing.wait()
        role = self._waiting[0][0]
        if role is Role.CANDIDATE and len(self._waiting) < EMIT_AT_MOST:
            await self._gather()
        batch: list[Emission] = []
        size = 0
        for of, emission in self._waiting[:EMIT_AT_MOST]:
            size += _bytes(emission)
            if of is not role or (batch and size > EMIT_BYTES):
                break
            batch.append(emission)
        won = await self._sources[role].emit(batch)
        del self._waiting[: len(batch)]
        self.let_out()
        if not self._waiting:
            self.emptied.set()
        if not all(won):
            log.info("others_were_first", frames=won.count(False))


def _bytes(emission: Emission) -> int:
    """What it sends."""
    reply = 0 if emission.reply is emission.outcome else len(emission.reply)
    return len(emission.outcome) + reply + len(emission.compared)
