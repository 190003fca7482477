"""What is compared; no transport, no protobuf. Named tuples, since millions of them are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Said(NamedTuple):
    """What one version says of one frame.

    Attributes:
        digest: Of the version's bundle.
        version: Its number.
        score: A finite number.
        threshold: Which decided the label.
        anomalous: The label.
        inference_us: The model's run, in microseconds; 0 where it was not measured.
        map: A small anomaly map as grey PNG; empty where there is none.
        mask: A small mask as grey PNG; empty where there is none.
    """

    digest: str
    version: int
    score: float
    threshold: float
    anomalous: bool
    inference_us: int = 0
    map: bytes = b""
    mask: bytes = b""


class Failed(NamedTuple):
    """One version could not judge the frame."""

    reason: str


class Origin(NamedTuple):
    """Where a frame came from; time in microseconds since 1970."""

    camera: str
    captured_at_us: int


class Pair(NamedTuple):
    """A frame that both versions answered."""

    frame_id: str
    live: Said | Failed
    candidate: Said | Failed
    origin: Origin


@dataclass(frozen=True, slots=True)
class Compared:
    """Who is compared in a run.

    Attributes:
        model: The model's name.
        live_digest: Empty in a replay, where any version of the past is live.
        candidate_digest: The candidate's.
    """

    model: str
    live_digest: str
    candidate_digest: str
