"""Between protobuf and the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vigil.ingest.v1 import ingest_pb2
from vigil_common.access import ANYBODY, principal
from vigil_common.grpc.errors import to_status
from vigil_common.trace import HEADER, continued

from vigil_ingest.domain import Submission

if TYPE_CHECKING:
    import grpc
    from google.protobuf.timestamp_pb2 import Timestamp
    from vigil.types.v1 import types_pb2
    from vigil_common.errors import VigilError

DEFAULT_CAMERA = "default"


def traceparent(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The trace context that the call brings; empty for none."""
    for name, value in context.invocation_metadata() or ():
        if name == HEADER and isinstance(value, str):
            return value
    return ""


def client(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who calls: the token's name, or the host where tokens are off."""
    who = principal()
    return who.name if who is not ANYBODY else context.peer().rpartition(":")[0]


def _microseconds(time: Timestamp) -> int:
    # Not ToMicroseconds, which raises for what is no date: the application says so with a reason.
    return time.seconds * 1_000_000 + time.nanos // 1_000


def submission(frame: ingest_pb2.Frame, traceparent: str, client: str) -> Submission:
    """The frame as the application takes it; without a valid trace context it begins a trace."""
    return Submission(
        frame_id=frame.frame_id,
        model=frame.model,
        model_version=frame.model_version if frame.HasField("model_version") else None,
        camera=frame.camera or DEFAULT_CAMERA,
        captured_at_us=_microseconds(frame.captured_at) if frame.HasField("captured_at") else None,
        # Not a view of them, which would keep the whole request and its image for as long as the frame waits.
        labels=dict(frame.labels),
        image=frame.image,
        traceparent=continued(traceparent),
        client=client,
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
