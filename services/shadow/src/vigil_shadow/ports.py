"""What shadow needs of other services."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vigil_shadow.domain import Failed, Origin, Said
    from vigil_shadow.report import Report


class Reviews(Protocol):
    """What people said of disagreements."""

    async def counts(self, report: Report) -> tuple[int, int]:
        """In how many of them the candidate is right, and live. `Unavailable` where nobody can tell."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame as storage has it; time in microseconds since 1970."""

    frame_id: str
    origin: Origin
    stored_at_us: int
    live: Said | Failed


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Which stored frames: of a camera, or all where it is empty; from `start_us`, before `stop_us`."""

    camera: str
    start_us: int
    stop_us: int


class Archive(Protocol):
    """Stored frames."""

    async def page(self, model: str, where: StoredRange, *, size: int, token: str) -> tuple[list[StoredFrame], str]:
        """Frames by time, and where the next page begins; empty where that was the last."""
        ...

    async def image(self, model: str, frame: StoredFrame) -> bytes | None:
        """A frame's image; None where it has been dropped meanwhile."""
        ...


class Judge(Protocol):
    """A candidate's worker, asked directly."""

    async def version(self) -> tuple[str, int, str]:
        """Model, version and digest that it has."""
        ...

    async def judge(self, frame_id: str, image: bytes) -> Said | Failed:
        """What it says of an image. `Unavailable` where it is away."""
        ...

    async def close(self) -> None:
        """Release the connection."""
        ...
