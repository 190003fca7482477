"""Between protobuf and the application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil.ingest.v1 import ingest_pb2
from vigil_common.grpc.errors import to_status

from vigil_ingest.domain import Submission

if TYPE_CHECKING:
    from vigil.types.v1 import types_pb2
    from vigil_common.errors import VigilError

DEFAULT_CAMERA = "default"


def submission(frame: ingest_pb2.Frame) -> Submission:
    """The frame as the application takes it."""
    return Submission(
        frame_id=frame.frame_id,
        model=frame.model,
        model_version=frame.model_version if frame.HasField("model_version") else None,
        camera=frame.camera or DEFAULT_CAMERA,
        captured_at_us=frame.captured_at.ToMicroseconds() if frame.HasField("captured_at") else None,
        labels=frame.labels,
        image=frame.image,
    )


def acceptance(received_at_us: int) -> ingest_pb2.Acceptance:
    """The answer to who asked for no more."""
    answer = ingest_pb2.Acceptance()
    answer.received_at.FromMicroseconds(received_at_us)
    return answer


def failed(frame_id: str, error: VigilError) -> ingest_pb2.StreamResponse:
    """One frame's error on a stream that goes on."""
    return ingest_pb2.StreamResponse(frame_id=frame_id, error=to_status(error))


def answered(outcome: types_pb2.Outcome) -> ingest_pb2.StreamResponse:
    """One frame's outcome."""
    if outcome.HasField("failure"):
        return ingest_pb2.StreamResponse(frame_id=outcome.frame_id, error=outcome.failure)
    return ingest_pb2.StreamResponse(frame_id=outcome.frame_id, verdict=outcome.verdict)
