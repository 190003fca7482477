"""What Vigil needs of a store for frames and models; `reduct` and `embedded` provide it.

One writer: only the storage service writes, one batch in flight per entry. Labels and bodies come back exactly as
written. Times are microseconds since 1970, UTC.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from vigil_common.errors import VigilError


# More frames of one time than a camera with a clock of whole seconds takes in one.
CROWD = 256


@dataclass(frozen=True, slots=True)
class Record:
    """One record to write.

    Attributes:
        entry: "MODEL/CAMERA".
        timestamp_us: Where it shall stand; see `places`.
        labels: Names as ^[a-z][a-z0-9_]{0,63}$; must hold `frame_id` and `sha256`.
        body: The encoded image.
        content_type: Media type of the body.
        otherwise_us: Where it shall stand instead once `CROWD` others have its time and those next to it.
    """

    entry: str
    timestamp_us: int
    labels: Mapping[str, str]
    body: bytes
    content_type: str
    otherwise_us: int | None = None

    def places(self, stride_us: int) -> Iterator[int]:
        """Where it may stand, without an end: the first of these that is free is its time.

        Each try past those that are taken costs a look, and behind a clock that stands still there would be ever more.
        """
        yield from itertools.islice(itertools.count(self.timestamp_us, stride_us), CROWD)
        others = self.timestamp_us + CROWD * stride_us
        yield from itertools.count(others if self.otherwise_us is None else self.otherwise_us, stride_us)


@dataclass(frozen=True, slots=True)
class Written:
    """Where a record stands.

    Attributes:
        timestamp_us: Its final time.
        existed: The same frame with the same image stood there before.
    """

    timestamp_us: int
    existed: bool = False


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as found, without its body; the entry may be one of several in which its camera's records stand."""

    entry: str
    timestamp_us: int
    labels: Mapping[str, str]
    size_bytes: int
    content_type: str


@dataclass(frozen=True, slots=True)
class FrameFilter:
    """What to look for; None matches everything.

    Attributes:
        entries: Entry names, or "MODEL/*".
        start_us: Inclusive.
        stop_us: Exclusive.
        equals: Labels with these values.
        present: Labels that a record must have, whatever their value.
        absent: Labels that it must not have.
        min_score: Least `score`.
        max_score: Greatest `score`.
    """

    entries: Sequence[str]
    start_us: int | None = None
    stop_us: int | None = None
    equals: Mapping[str, str] = field(default_factory=dict)
    present: Sequence[str] = ()
    absent: Sequence[str] = ()
    min_score: float | None = None
    max_score: float | None = None


@dataclass(frozen=True, slots=True)
class Labelling:
    """Labels that a stored record gets or changes; its others stay.

    Attributes:
        entry: "MODEL/CAMERA".
        timestamp_us: Where the record stands.
        labels: Names of Vigil's own, a fixed few: together they must leave the record readable.
    """

    entry: str
    timestamp_us: int
    labels: Mapping[str, str]


class FrameStore(Protocol):
    """Images with labels."""

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write a batch (at most 64 records, any entries); one result per record, in order.

        A record whose time is taken by another image goes to the next of its places that is free. The same frame id
        with the same sha256 is not written twice. The same frame id with another sha256 at its time gives a
        `Conflict("FRAME_ID_REUSED", ...)`. Trouble that may pass gives `Unavailable`.
        """
        ...

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        """Label stored records; one result per change, in order, None where it is done.

        Changes of one entry, and writes into it, wait for each other here, so that none is lost; callers in several
        processes would lose some: only the owner of the model labels. As with `write`, a killed server may lose what it
        acknowledged. `NotFound("UNKNOWN_RECORD", ...)` where there is no such record.
        """
        ...

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these times (mapped to their sha256) hold that image now, by one head query over their range."""
        ...

    async def uptime_s(self) -> float:
        """Seconds since the server started: a drop means a restart, after which unconfirmed records may be gone."""
        ...

    def forget(self, model: str) -> None:
        """Another process may have written frames of this model: rely on nothing known of them before."""
        ...

    def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records by time, oldest first, over all entries asked for."""
        ...

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body; `NotFound` where there is none."""
        ...

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id, the latest where several have it; `NotFound` where there is none.

        A UUIDv7 id is looked for near its own time first, then back from now.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class PassingStore(FrameStore, Protocol):
    """A store whose oldest records go once a quota is reached."""

    async def counts(self) -> dict[str, int]:
        """How many records each entry has now."""
        ...

    async def horizon_us(self) -> int | None:
        """What is older than this goes as soon as it is written; None while there is room."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A published version as the store knows it.

    Attributes:
        name: The model's name.
        version: Its number.
        digest: "sha256:" and 64 hexadecimal digits.
        size_bytes: Of the bundle.
        formats: Runtimes it has artefacts for.
        published_at_us: Microseconds since 1970.
        manifest: The text of vigil.yaml.
        published_by: Who did.
        deprecated: Why it should not be used any more; empty while it may.
    """

    name: str
    version: int
    digest: str
    size_bytes: int
    formats: tuple[str, ...]
    published_at_us: int
    manifest: str
    published_by: str = ""
    deprecated: str = ""


class ModelStore(Protocol):
    """Model versions, immutable, never under a quota."""

    async def upload(self, name: str, digest: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """Keep a bundle's bytes as they come; nothing shows yet.

        Raises whatever the chunks raise, and `DataLost("BUNDLE_INCOMPLETE", ...)` where they are not of this size; what
        had come by then is dropped. One upload of a digest at a time.
        """
        ...

    async def publish(self, info: ModelInfo) -> None:
        """Show an uploaded bundle as a version, for good.

        `Conflict("VERSION_EXISTS", ...)` where it is taken, `Unavailable("NOT_KEPT", ...)` where the store has lost it.
        """
        ...

    async def deprecate(self, name: str, version: int, reason: str) -> ModelInfo:
        """Say why a version should not be used any more; what was said first stands."""
        ...

    async def list(self, name: str | None = None) -> list[ModelInfo]:
        """Versions by name and number; of every model where no name is given."""
        ...

    async def get(self, name: str, version: int | None = None) -> ModelInfo:
        """One version, the newest where none is given; `NotFound("UNKNOWN_MODEL" | "UNKNOWN_VERSION", ...)`."""
        ...

    def download(self, info: ModelInfo) -> AsyncIterator[bytes]:
        """The bundle in chunks; `DataLost` where it is gone, or at the end where it is not what was published."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
