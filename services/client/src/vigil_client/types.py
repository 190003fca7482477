"""What callers hand in and get back; no protobuf here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import uuid_utils

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime


def new_frame_id() -> str:
    """A fresh UUIDv7: sorts by time, and tells the server when the frame was made."""
    return str(uuid_utils.uuid7())


class SettingError(ValueError):
    """What a client was made with can't be used; the message says why."""


class WaitFor(enum.Enum):
    """What an answer means."""

    ACCEPTED = "accepted"
    VERDICT = "verdict"


class Visualization(enum.Enum):
    """Which picture the verdict should bring along."""

    NONE = "none"
    SIMPLE = "simple"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Frame:
    """One image on its way in.

    Attributes:
        image: Encoded JPEG, PNG, BMP, TIFF or WebP.
        model: The model's name.
        frame_id: The id that makes sending it again harmless.
        camera: Where it was taken; the server's default where None.
        captured_at: When it was taken, local time where it has no zone; the frame id's time where None.
        model_version: Refuse unless this version is live.
        labels: Own labels, kept with the frame.
        visualization: The picture wanted with the verdict.
        anomaly_map: Whether the anomaly map is wanted.
        mask: Whether the mask is wanted.
    """

    image: bytes = field(repr=False)
    model: str
    frame_id: str = field(default_factory=new_frame_id)
    camera: str | None = None
    captured_at: datetime | None = None
    model_version: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    visualization: Visualization = Visualization.NONE
    anomaly_map: bool = False
    mask: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a model version says of a frame.

    Attributes:
        frame_id: The frame judged.
        model: The model's name.
        version: The version that judged it.
        digest: That version's bundle.
        score: The anomaly score.
        anomalous: Whether the score reached the threshold.
        threshold: The threshold that decided.
        queue_s: From acceptance until a worker read it.
        decode_s: Decoding and preparing.
        inference_s: The model's run.
        total_s: From acceptance until the verdict.
        anomaly_map: Grey PNG, where asked for.
        mask: Grey PNG, where asked for.
        visualization: Encoded picture, where asked for.
    """

    frame_id: str
    model: str
    version: int
    digest: str
    score: float
    anomalous: bool
    threshold: float
    queue_s: float = 0.0
    decode_s: float = 0.0
    inference_s: float = 0.0
    total_s: float = 0.0
    anomaly_map: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    visualization: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer.

    Attributes:
        code: Name of the gRPC status, such as "INVALID_ARGUMENT".
        reason: In capitals, for programs; empty where the other side gave none.
        message: For people.
        retry_after_s: Set where the server said that trying again helps.
    """

    code: str
    reason: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one frame: a verdict, an acceptance or an error.

    Attributes:
        frame_id: The frame's id.
        latency_s: From the first sending until the answer, retries included.
        verdict: Set where it was judged.
        accepted: Whether it is safe in the queue (true for a verdict, too).
        error: Set where it failed for good.
        attempts: How often it was sent.
    """

    frame_id: str
    latency_s: float
    verdict: Verdict | None = None
    accepted: bool = False
    error: Failure | None = None
    attempts: int = 1


class HumanLabel(enum.Enum):
    """What a person says of a frame."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"
    UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What a person said of a frame.

    Attributes:
        annotation_id: Its own id.
        label: Normal, anomalous or unsure.
        author: Who said so.
        annotated_at: When.
        note: Free text; empty beside a frame of a query.
        masked: Whether a mask came with it.
    """

    annotation_id: str
    label: HumanLabel
    author: str
    annotated_at: datetime
    note: str = ""
    masked: bool = False


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame as the store keeps it.

    Attributes:
        frame_id: The frame's id.
        model: The model's name.
        camera: Its camera.
        captured_at: When it was taken.
        stored_at: The record's own time.
        content_type: Media type of the image.
        width: Pixels.
        height: Pixels.
        image_bytes: Size of the encoded image.
        labels: Every label the store has.
        verdict: None where it could not be judged.
        failure_reason: Why it could not be judged.
        annotation: What people say of it now; None where nobody has said anything.
    """

    frame_id: str
    model: str
    camera: str
    captured_at: datetime
    stored_at: datetime
    content_type: str
    width: int
    height: int
    image_bytes: int
    labels: Mapping[str, str]
    verdict: Verdict | None
    failure_reason: str = ""
    annotation: Annotation | None = None


@dataclass(frozen=True, slots=True)
class ReviewedFrame:
    """A frame with its image and all that people said of it.

    Attributes:
        frame: The frame.
        image: Encoded, as it came.
        annotations: Oldest first; the last one stands.
        mask: Of the one that stands, as grey PNG (0 normal, 255 anomalous); None where it has none.
    """

    frame: StoredFrame
    image: bytes = field(repr=False)
    annotations: tuple[Annotation, ...]
    mask: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """A frame to look at, and why: "disagreement", "uncertain" or "random"."""

    frame: StoredFrame
    reason: str


@dataclass(frozen=True, slots=True)
class Model:
    """A published version.

    Attributes:
        name: The model's name.
        version: Counted up by one at each publication.
        digest: The bundle's identity.
        size_bytes: The bundle's size.
        formats: Runtimes it has artefacts for.
        published_at: When.
        manifest: The text of vigil.yaml.
        published_by: Name of the token that did.
        deprecated: Why it should not be used any more; empty while it may.
        created: After a publication: False where this very bundle had been published before.
    """

    name: str
    version: int
    digest: str
    size_bytes: int
    formats: tuple[str, ...]
    published_at: datetime
    manifest: str = field(repr=False)
    published_by: str
    deprecated: str
    created: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """Roles of a model's versions.

    Attributes:
        model: The model's name.
        live: The version whose verdicts count.
        candidate: The version compared with it; None where there is none.
        comparison: Number of the comparison under way; 0 where there is none.
    """

    model: str
    live: int
    candidate: int | None
    comparison: int


class ServiceError(Exception):
    """A call failed for good.

    Args:
        failure: Code, reason and message as the service gave them.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.reason or failure.code}: {failure.message}")
        self.failure = failure
