"""What is told of each frame: metrics, one log line, and a span where its trace is sampled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from vigil.types.v1 import types_pb2
from vigil_common import trace
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from vigil_common.errors import VigilError

    from vigil_inference.pipeline import Judged
    from vigil_inference.roles import Role

FRAMES = Counter("vigil_inference_frames_total", "Frames by how judging them ended", ["outcome"])
INFERENCE = Histogram(
    "vigil_inference_run_seconds",
    "The model's run, or an image's share of it",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
QUEUED = Histogram(
    "vigil_inference_queue_seconds",
    "From acceptance until a worker read the frame",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 300),
)
# Their mean moving is the first sign that light, camera or product changed.
SCORES = Histogram(
    "vigil_inference_score",
    "Anomaly scores",
    ["model", "version"],
    buckets=(0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0),
)
# A label's child is looked up once, not for each frame.
JUDGED = FRAMES.labels("judged")

log = get_logger()


class Telemetry:
    """Tells of the frames of one model version."""

    def __init__(self, version: types_pb2.ModelVersion) -> None:
        self._version = version
        self._scores = SCORES.labels(version.name, str(version.version))

    def read(self, header: types_pb2.FrameHeader, read_us: int) -> None:
        """A frame was read at `read_us`, in microseconds since 1970 as below."""
        QUEUED.observe(max(0, read_us - header.received_at.ToMicroseconds()) / 1e6)

    def judged(
        self, role: Role, header: types_pb2.FrameHeader, read_us: int, judged: Judged, found: types_pb2.Verdict
    ) -> None:
        """It has its verdict."""
        JUDGED.inc()
        INFERENCE.observe(judged.inference_s)
        self._scores.observe(judged.score)
        label = types_pb2.Label.Name(found.label)
        duration_s = time.time() - header.received_at.ToMicroseconds() / 1e6
        log.debug("frame_judged", **self._about(header), score=judged.score, label=label, duration_s=duration_s)
        if trace.wanted(header.traceparent):
            said: dict[str, str | float] = {
                "vigil.score": judged.score,
                "vigil.label": label.removeprefix("LABEL_").lower(),
                "vigil.threshold": found.threshold,
                "vigil.queue_s": found.timing.queue.ToMicroseconds() / 1e6,
                "vigil.decode_s": judged.decode_s,
                "vigil.inference_s": judged.inference_s,
            }
            self._span(role, header, read_us, said)

    def failed(self, role: Role, header: types_pb2.FrameHeader, read_us: int, error: VigilError) -> None:
        """Nobody can judge it."""
        FRAMES.labels(error.reason.lower()).inc()
        log.info("frame_dead", **self._about(header), reason=error.reason)
        if trace.wanted(header.traceparent):
            self._span(role, header, read_us, {}, error.reason)

    def _span(
        self, role: Role, header: types_pb2.FrameHeader, read_us: int, said: trace.Attributes, error: str = ""
    ) -> None:
        """From its reading until now."""
        about: dict[str, str | int | float | bool] = {
            "vigil.frame_id": header.frame_id,
            "vigil.model": self._version.name,
            "vigil.version": self._version.version,
            "vigil.role": role.value,
        }
        trace.record(
            "judge frame", header.traceparent, began_ns=read_us * 1000, attributes={**about, **said}, error=error
        )

    def _about(self, header: types_pb2.FrameHeader) -> dict[str, str | int]:
        """What every line on a frame says."""
        return {
            "frame_id": header.frame_id,
            "trace_id": trace.trace_id(header.traceparent),
            "model": self._version.name,
            "version": self._version.version,
        }
