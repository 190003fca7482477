"""What a page shows; pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

BINS = 20


@dataclass(frozen=True, slots=True)
class Version:
    """A published version; `metrics` as its lineage has them."""

    version: int
    digest: str
    published_at: datetime
    published_by: str
    deprecated: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Said:
    """What a person said of a frame; `label` is "normal", "anomalous" or "unsure"."""

    label: str
    author: str
    at: datetime
    note: str
    masked: bool


@dataclass(frozen=True, slots=True)
class Frame:
    """A stored frame.

    Attributes:
        frame_id: Its id.
        camera: Its camera.
        captured_at: When it was taken.
        stored_at: Its record's time.
        content_type: Media type of its image.
        width: Pixels, as people see the image: after EXIF rotation.
        height: Pixels.
        version: The live version that judged it; 0 where none could.
        score: Its score; None where it could not be judged.
        threshold: What decided its label.
        label: "normal", "anomalous", or why it could not be judged.
        candidate: What the candidate said, such as "anomalous 0.71 (version 3)"; empty where none did.
        human: What people say now; empty where nobody has said anything.
    """

    frame_id: str
    camera: str
    captured_at: datetime
    stored_at: datetime
    content_type: str
    width: int
    height: int
    version: int
    score: float | None
    threshold: float
    label: str
    candidate: str
    human: str


@dataclass(frozen=True, slots=True)
class Detail:
    """A frame with what was said of it, oldest first, and the mask that stands (PNG)."""

    frame: Frame
    image: bytes
    history: tuple[Said, ...]
    mask: bytes


@dataclass(frozen=True, slots=True)
class Camera:
    """What a camera's last frames say.

    Attributes:
        name: Of the camera.
        frames: How many were judged.
        anomalous: How many of them are anomalous.
        per_minute: Frames per minute over the time looked at.
        threshold: What decides now: of the newest of all cameras' frames.
        low: The histogram's left end.
        high: Its right end.
        bins: Frames per score range: normal ones and anomalous ones, as each was called.
    """

    name: str
    frames: int
    anomalous: int
    per_minute: float
    threshold: float
    low: float
    high: float
    bins: tuple[tuple[int, int], ...]


def cameras(frames: Iterable[Frame], span_s: float) -> list[Camera]:
    """Rate and histogram of each camera, by name; all on one scale, so that they can be compared."""
    judged: dict[str, list[tuple[float, Frame]]] = defaultdict(list)
    for frame in frames:
        if frame.score is not None:
            judged[frame.camera].append((frame.score, frame))
    scores = [score for found in judged.values() for score, _ in found]
    low, high = min([0.0, *scores]), max([1.0, *scores])
    of_all = [frame for found in judged.values() for _, frame in found]
    newest = max(of_all, key=lambda frame: frame.stored_at, default=None)
    threshold = newest.threshold if newest else 0.0
    return [_camera(name, judged[name], span_s, threshold, (low, high)) for name in sorted(judged)]


def _camera(
    name: str, found: list[tuple[float, Frame]], span_s: float, threshold: float, scale: tuple[float, float]
) -> Camera:
    low, high = scale
    bins = [[0, 0] for _ in range(BINS)]
    for score, frame in found:
        bins[min(BINS - 1, int((score - low) / (high - low) * BINS))][frame.label == "anomalous"] += 1
    return Camera(
        name=name,
        frames=len(found),
        anomalous=sum(frame.label == "anomalous" for _, frame in found),
        per_minute=len(found) / span_s * 60 if span_s > 0 else 0.0,
        threshold=threshold,
        low=low,
        high=high,
        bins=tuple((normal, anomalous) for normal, anomalous in bins),
    )
