"""What Vigil needs of its backbone; `redis` and `memory` provide it and pass the same contract suite.

The way of a frame: `FrameQueue.admit` (ingest) → `FrameSource.read` (worker) → `FrameSource.emit` (verdict and
acknowledgement as one step) → `ReplySource.read` (ingest) and `OutcomeSource.read` (storage) → `OutcomeSource.done`
once the store has confirmed it. Everything is per model.

Shadow's way beside it: while a candidate is compared, `FrameSource.emit` also copies live's outcome to the shadow
verdicts, and a candidate's source emits there alone. `VerdictSource.read` gives both to the shadow service, which keeps
its report by `ReportStore.commit`, one step at a time; each comparison goes on to storage by `ComparisonSource`.
"""

from __future__ import annotations

import enum
import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vigil_common.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


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
        outcome: Serialised Outcome for storage, without pictures; a candidate's is for shadow, with small ones, and
            empty for a frame outside its sample.
        reply: Serialised Outcome for the client, with pictures where asked for; a candidate's is never sent.
        dead_reason: Set where the frame could not be judged.
        compared: Serialised Outcome for shadow, with small pictures; empty where it is the outcome.
        header: Serialised FrameHeader; only a candidate's is read.
    """

    entry_id: str
    frame_id: str
    outcome: bytes
    reply: bytes
    dead_reason: str = ""
    compared: bytes = b""
    header: bytes = b""


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
        """Serialised Outcomes after this place, and the new place ("0" to begin with).

        Asking says that those before it have come: with pictures they are kept no longer. Unread, the oldest go first
        where there are too many of them, or they are too large.
        """
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

    async def claim(self, *, min_idle_ms: int, count: int, held: Collection[str] = ()) -> list[QueuedFrame]:
        """Frames that a consumer took and left; `deliveries` counts this one.

        Args:
            min_idle_ms: Taken so long ago.
            count: Of so many that were, looked at from where the last call ended.
            held: Entries that this consumer still has in hand: another one may take them, if it is stuck.
        """
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


def check_threshold(threshold: float | None) -> None:
    """Raise `InvalidInput` THRESHOLD_INVALID for one that no score reaches, as NaN: every frame would be normal."""
    if threshold is not None and not math.isfinite(threshold):
        raise InvalidInput("THRESHOLD_INVALID", f"threshold {threshold}: it must be a finite number")


@dataclass(frozen=True, slots=True)
class Live:
    """The version whose verdicts count.

    Attributes:
        version: Its number.
        digest: Its bundle's digest.
        threshold: Serving-time threshold; None where the bundle's own counts.

    Raises:
        InvalidInput: THRESHOLD_INVALID.
    """

    version: int
    digest: str
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)


@dataclass(frozen=True, slots=True)
class Candidate:
    """The version that is compared with live, on the same frames.

    Attributes:
        version: Its number.
        digest: Its bundle's digest.
        threshold: Serving-time threshold; None where the bundle's own counts.
        sample_fraction: Which part of the frames it gets, over 0 and up to 1; see `sampled`.

    Raises:
        InvalidInput: SAMPLE_FRACTION_INVALID, THRESHOLD_INVALID.
    """

    version: int
    digest: str
    threshold: float | None = None
    sample_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not 0 < self.sample_fraction <= 1:
            raise InvalidInput(
                "SAMPLE_FRACTION_INVALID", f"sample fraction {self.sample_fraction}: it must be over 0 and at most 1"
            )


@dataclass(frozen=True, slots=True)
class Route:
    """Roles of a model's versions.

    Attributes:
        model: The model's name.
        live: The live version.
        candidate: The one in shadow; None where there is none.
        generation: Grows with each change.
        comparison: The generation in which this candidate began to be compared with this live version under these
            thresholds; 0 where nothing is compared.
        managed_by: The AnomalyModel that decides, as "NAMESPACE/NAME"; empty where people do.
    """

    model: str
    live: Live
    candidate: Candidate | None
    generation: int
    comparison: int = 0
    managed_by: str = ""


def sampled(frame_id: str, fraction: float) -> bool:
    """Whether a frame is in a sample: the same answer for the same id, everywhere, and nested in larger samples."""
    place = int(hashlib.sha1(frame_id.encode(), usedforsecurity=False).hexdigest()[:8], 16)
    return place / 2**32 < fraction


def route_changed(model: str) -> Unavailable:
    """What a write says that was made for another route than the one that stands."""
    return Unavailable("ROUTE_CHANGED", f"somebody else changed the route of {model} just now; try again")


def check_roles(live: Live, candidate: Candidate | None) -> None:
    """Raise `InvalidInput` CANDIDATE_IS_LIVE where a version would be compared with itself."""
    if candidate is not None and candidate.digest == live.digest:
        raise InvalidInput(
            "CANDIDATE_IS_LIVE", f"version {candidate.version} is the live one; compare it with another version"
        )


class RoutingTable(Protocol):
    """Roles of the versions, one record per model, changed in one step."""

    async def get(self, model: str) -> Route | None:
        """The model's route; None where nothing is live."""
        ...

    async def models(self) -> list[str]:
        """Every model that has a route, or that something was left of: frames, or what people said since."""
        ...

    async def write(
        self,
        model: str,
        *,
        live: Live,
        candidate: Candidate | None = None,
        after: int | None = None,
        managed_by: str = "",
    ) -> Route:
        """Write the whole record; workers, ingest and shadow follow within a second.

        Another candidate, live version or threshold than before begins a new comparison, with the frames admitted from
        then on. `InvalidInput` CANDIDATE_IS_LIVE where both are the same. With `after`, `Unavailable` ROUTE_CHANGED
        where another generation stands meanwhile (0: nothing is live).
        """
        ...

    async def promote(
        self, model: str, *, version: int, digest: str, threshold: float | None, after: int | None = None
    ) -> Route:
        """Make a version live and end any comparison; `after` as for `write`."""
        ...

    async def remove(self, model: str) -> None:
        """Delete the route: ingest takes no more frames of the model. What was accepted stays until it is stored."""
        ...

    async def kept_fraction(self, model: str) -> float | None:
        """Which part of the model's normal frames is stored, as `keep_fraction` wrote it; None where nothing says."""
        ...

    async def keep_fraction(self, model: str, fraction: float | None) -> None:
        """Say which part of the model's normal frames is stored; None takes it back, as the route's removal does."""
        ...

    async def wait(self, model: str, generation: int, *, block_ms: int) -> Route | None:
        """The route once its generation is another than this, or whatever it is after the wait."""
        ...


@dataclass(frozen=True, slots=True)
class QueuedAnnotation:
    """What a person said of a frame, on its way into the store.

    Attributes:
        place: Its place in the log; a later one was said later ("MILLISECONDS-NUMBER").
        annotation_id: The id that makes saying it again harmless.
        body: What was said, serialised.
        mask: Encoded mask; empty where there is none.
    """

    place: str
    annotation_id: str
    body: bytes
    mask: bytes


class ReviewLog(Protocol):
    """What people say, safe until the store is known to keep it, and what each has been given to look at."""

    async def put(self, model: str, annotation_id: str, body: bytes, mask: bytes) -> tuple[str, bytes] | None:
        """Place and body of what waits under this id, the first that was put; None where there is no room."""
        ...

    async def read(self, model: str, after: str, *, count: int, block_ms: int) -> list[QueuedAnnotation]:
        """What was said after this place ("0" to begin with), in order."""
        ...

    async def done(self, model: str, annotations: Sequence[QueuedAnnotation]) -> None:
        """They are confirmed in the store: forget them."""
        ...

    async def give(self, model: str, reviewer: str, frame_ids: Sequence[str]) -> None:
        """Remember that a reviewer has been given these frames; the oldest of many are forgotten."""
        ...

    async def given(self, model: str, reviewer: str) -> list[str]:
        """What a reviewer has been given, the longest ago first."""
        ...


@dataclass(frozen=True, slots=True)
class ComparedVerdict:
    """One side's outcome of a frame that is compared.

    Attributes:
        entry_id: Its place in the stream.
        number: Counts all of them; a gap is what fell off before it was read.
        comparison: Which one it belongs to.
        candidate: Whether it is the candidate's.
        frame_id: The frame's id.
        outcome: Serialised Outcome.
        header: Serialised FrameHeader on the candidate's.
    """

    entry_id: str
    number: int
    comparison: int
    candidate: bool
    frame_id: str
    outcome: bytes
    header: bytes


class VerdictSource(Protocol):
    """Shadow's side of one model; one owner at a time."""

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease on this model's comparison; False while another holds it."""
        ...

    async def read(self, after: str, *, count: int, block_ms: int) -> list[ComparedVerdict]:
        """Verdicts after this place."""
        ...

    async def close(self) -> None:
        """Release the lease."""
        ...


@dataclass(frozen=True, slots=True)
class Disagreed:
    """A frame of which both versions say different things; `detail` is a serialised Disagreement."""

    frame_id: str
    severity: float
    detail: bytes


@dataclass(frozen=True, slots=True)
class ReportStep:
    """What one step adds to a report.

    Attributes:
        after: The place that it was computed from.
        upto: The place it ends at.
        number: Of the last verdict read.
        adds: What to add to which field.
        greatest: Fields that keep the greatest value, of 0 and more.
        facts: Fields that have this value from now on.
        joint: What to add to which cell of the joint histogram.
        open: Frames between their first verdict and being forgotten; empty bytes forget.
        disagreements: The worst are kept.
        comparisons: Serialised Comparisons for storage.
    """

    after: str
    upto: str
    number: int
    adds: Mapping[str, int] = field(default_factory=dict)
    greatest: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    joint: Mapping[str, int] = field(default_factory=dict)
    open: Mapping[str, bytes] = field(default_factory=dict)
    disagreements: Sequence[Disagreed] = ()
    comparisons: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """How far a report has read, and which frames are open (see `ReportStep`)."""

    place: str
    number: int
    open: Mapping[str, bytes]


class ReportStore(Protocol):
    """Reports of comparisons; a run is a comparison's number, or `replay-ID`, which has a place of its own."""

    async def latest(self, model: str) -> str | None:
        """The run of the comparison under way, or of the last one; None where there has been none."""
        ...

    async def place(self, model: str, run: str) -> ReportPlace:
        """Where to go on."""
        ...

    async def commit(self, model: str, run: str, step: ReportStep) -> bool:
        """Add a step, all of it or nothing; False where the report stands elsewhere than the step began."""
        ...

    async def begin(self, model: str, run: str, fields: Mapping[str, str]) -> None:
        """Write fields that describe a run; those that are there already stay."""
        ...

    async def fields(self, model: str, run: str) -> dict[str, str]:
        """Counts and what describes the run; empty where there is no such report."""
        ...

    async def joint(self, model: str, run: str) -> dict[str, int]:
        """The joint histogram's cells."""
        ...

    async def worst(self, model: str, run: str, *, start: int, count: int) -> list[bytes]:
        """Details of disagreements, worst first."""
        ...


class ComparisonSource(Protocol):
    """Comparisons on their way to storage; read by whoever owns the model's outcomes."""

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[tuple[str, bytes]]:
        """Places and serialised Comparisons; with `pending`, those that were taken and not finished."""
        ...

    async def done(self, places: Sequence[str]) -> None:
        """They are on their frames: forget them."""
        ...
