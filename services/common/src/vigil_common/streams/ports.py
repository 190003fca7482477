"""What Vigil needs of its backbone; `redis` and `memory` provide it and pass the same contract suite.

The way of a frame: `FrameQueue.admit` (ingest) → `FrameSource.read` (worker) → `FrameSource.emit` (verdict and
acknowledgement as one step) → `ReplySource.read` (ingest) and `OutcomeSource.read` (storage) → `OutcomeSource.done`
once the store has confirmed it. Everything is per model.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Admission(enum.Enum):
    """What became of a frame offered to the queue."""

    ADMITTED = "admitted"
    # The same id and image is on its way; its reply now comes here.
    PENDING = "pending"
    # It had been judged: `reply` holds the outcome.
    JUDGED = "judged"
    # The id stands for another image.
    REUSED = "reused"
    # No room within the byte budget.
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Admitted:
    """Answer of `admit`; `reply` is a serialised Outcome where it was judged before."""

    state: Admission
    reply: bytes | None = None


@dataclass(frozen=True, slots=True)
class QueuedFrame:
    """A frame as the worker and storage get it.

    Attributes:
        entry_id: Its place in the stream.
        header: Serialised FrameHeader.
        image: The encoded image.
        deliveries: How often it was handed out, this time included.
    """

    entry_id: str
    header: bytes
    image: bytes
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Emission:
    """What a worker found.

    Attributes:
        entry_id: The frame's place in the stream.
        frame_id: The frame's id.
        outcome: Serialised Outcome for storage, without pictures.
        reply: Serialised Outcome for the client, with pictures where asked for.
        dead_reason: Set where the frame could not be judged.
    """

    entry_id: str
    frame_id: str
    outcome: bytes
    reply: bytes
    dead_reason: str = ""


@dataclass(frozen=True, slots=True)
class QueuedOutcome:
    """An outcome for storage; `frame` is None where the frame's entry is gone."""

    entry_id: str
    outcome: bytes
    frame: QueuedFrame | None
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Depth:
    """How full a model's queue is.

    Attributes:
        frames: Entries in the frame stream.
        image_bytes: Bytes counted against the budget.
        unjudged: Frames that live has yet to judge.
        unstored: Frames judged and not yet confirmed by storage.
        dead: Entries in the dead-letter stream.
    """

    frames: int
    image_bytes: int
    unjudged: int
    unstored: int
    dead: int


class FrameQueue(Protocol):
    """Ingest's side."""

    async def admit(
        self, model: str, *, frame_id: str, sha256: bytes, header: bytes, image: bytes, reply_to: str
    ) -> Admitted:
        """Put a frame into the queue once; `reply_to` is empty where nobody waits. `Unavailable` when in doubt."""
        ...

    async def read_replies(self, model: str, reply_to: str, after: str, *, block_ms: int) -> tuple[str, list[bytes]]:
        """Serialised Outcomes after this place, and the new place ("0" to begin with)."""
        ...

    async def depth(self, model: str) -> Depth:
        """How full it is."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class FrameSource(Protocol):
    """A worker's side of one model."""

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer."""
        ...

    async def claim(self, *, min_idle_ms: int, count: int) -> list[QueuedFrame]:
        """Frames that another consumer took and left; `deliveries` counts this one."""
        ...

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome, reply and acknowledgement in one step; False where another consumer was first."""
        ...

    async def close(self) -> None:
        """Release connections; what was read and not emitted will be claimed by others."""
        ...


class OutcomeSource(Protocol):
    """Storage's side of one model; one owner at a time."""

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease on this model's outcomes; False while another holds it."""
        ...

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[QueuedOutcome]:
        """New outcomes with their frames; with `pending`, those an earlier owner took and did not finish."""
        ...

    async def done(self, outcomes: Sequence[QueuedOutcome]) -> None:
        """They are confirmed in the store: free their frames and forget them."""
        ...

    async def trim(self) -> int:
        """Drop the frames and outcomes that nobody needs any more, from the head; returns how many frames."""
        ...

    async def close(self) -> None:
        """Release the lease and connections."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Which version of a model is live.

    Attributes:
        model: The model's name.
        version: The live version.
        digest: Its bundle's digest.
        threshold: Serving-time threshold; None where the bundle's own counts.
        generation: Grows with each change.
    """

    model: str
    version: int
    digest: str
    threshold: float | None
    generation: int


class RoutingTable(Protocol):
    """Roles of the versions, one record per model, changed in one step."""

    async def get(self, model: str) -> Route | None:
        """The model's route; None where nothing is live."""
        ...

    async def models(self) -> list[str]:
        """Every model that has a route."""
        ...

    async def promote(self, model: str, *, version: int, digest: str, threshold: float | None) -> Route:
        """Make a version live; workers and ingest follow within a second."""
        ...

    async def wait(self, model: str, generation: int, *, block_ms: int) -> Route | None:
        """The route once its generation is another than this, or whatever it is after the wait."""
        ...
