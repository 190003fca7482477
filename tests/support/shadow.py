"""Verdicts of two versions, and what a report must say of them, worked out the plain way."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from google.rpc import code_pb2, error_details_pb2, status_pb2
from PIL import Image
from vigil.types.v1 import types_pb2
from vigil_common.streams.ports import ComparedVerdict

if TYPE_CHECKING:
    from collections.abc import Iterable

MODEL = "cells"
LIVE, CANDIDATE = "sha256:live", "sha256:candidate"
THRESHOLD = 0.5


@dataclass(frozen=True)
class Answer:
    """What one version says of a frame, as exactly as a verdict does; a score of None could not be judged."""

    frame_id: str
    candidate: bool
    score: float | None
    inference_us: int = 10_000
    threshold: float = THRESHOLD
    digest: str = ""
    side: int = 0

    def __post_init__(self) -> None:
        if self.score is not None:
            object.__setattr__(self, "score", float(np.float32(self.score)))

    @property
    def anomalous(self) -> bool:
        """The label."""
        return self.score is not None and self.score >= self.threshold

    def outcome(self) -> bytes:
        """As a worker emits it; with a picture of `side` pixels where asked for."""
        if self.score is None:
            info = error_details_pb2.ErrorInfo(reason="IMAGE_TRUNCATED", domain="vigil.dev")
            failure = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT)
            failure.details.add().Pack(info)
            return types_pb2.Outcome(frame_id=self.frame_id, failure=failure).SerializeToString()
        digest = self.digest or (CANDIDATE if self.candidate else LIVE)
        version = types_pb2.ModelVersion(name=MODEL, version=2 if self.candidate else 1, digest=digest)
        verdict = types_pb2.Verdict(frame_id=self.frame_id, model=version, score=self.score, threshold=self.threshold)
        verdict.label = types_pb2.LABEL_ANOMALOUS if self.anomalous else types_pb2.LABEL_NORMAL
        verdict.timing.inference.FromMicroseconds(self.inference_us)
        if self.side:
            pixels = np.full((self.side, self.side), round(255 * self.score), dtype=np.uint8)
            verdict.anomaly_map.data = png(pixels)
            verdict.mask.data = png((pixels >= 128).astype(np.uint8) * np.uint8(255))
        return types_pb2.Outcome(frame_id=self.frame_id, verdict=verdict).SerializeToString()

    def header(self) -> bytes:
        """The frame's."""
        header = types_pb2.FrameHeader(frame_id=self.frame_id, model=MODEL, camera="line-1")
        header.captured_at.FromMicroseconds(1_700_000_000_000_000)
        return header.SerializeToString()


def png(pixels: np.typing.NDArray[np.uint8]) -> bytes:
    """Grey pixels as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbered(answers: Iterable[Answer], *, start: int = 1, gap_ms: int = 10, run: int = 1) -> list[ComparedVerdict]:
    """Answers as shadow reads them."""
    return [
        ComparedVerdict(
            f"{number * gap_ms}-0",
            number,
            run,
            answer.candidate,
            answer.frame_id,
            answer.outcome(),
            answer.header() if answer.candidate else b"",
        )
        for number, answer in enumerate(answers, start)
    ]


def expected(answers: Iterable[Answer]) -> dict[str, int]:
    """Counts of a report on answers that come once each, in a window larger than them all."""
    sides: dict[str, dict[bool, Answer]] = {}
    for answer in answers:
        sides.setdefault(answer.frame_id, {})[answer.candidate] = answer
    counts: Counter[str] = Counter()
    for found in sides.values():
        if len(found) == 1:
            counts["waiting"] += 1
            continue
        live, candidate = found[False], found[True]
        if live.score is None or candidate.score is None:
            both = live.score is None and candidate.score is None
            counts["both_failed" if both else "live_failed" if live.score is None else "candidate_failed"] += 1
            continue
        counts["frames"] += 1
        counts["live_anomalous"] += live.anomalous
        counts["candidate_anomalous"] += candidate.anomalous
        counts["new_alarms"] += candidate.anomalous and not live.anomalous
        counts["new_misses"] += live.anomalous and not candidate.anomalous
        counts["difference_micro"] += round((candidate.score - live.score) * 1_000_000)
    return {name: count for name, count in counts.items() if count}


COUNTS = frozenset(
    (
        *("waiting", "both_failed", "live_failed", "candidate_failed", "frames", "live_anomalous"),
        *("candidate_anomalous", "new_alarms", "new_misses", "difference_micro", "missing", "unmatched", "late"),
        *("duplicate", "foreign", "lost", "malformed"),
    )
)
