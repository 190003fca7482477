"""Between protobuf and the types of this package."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from vigil.ingest.v1 import ingest_pb2
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2

from vigil_client.types import (
    Annotation,
    Failure,
    Frame,
    HumanLabel,
    Model,
    ReviewedFrame,
    ReviewItem,
    Route,
    ServiceError,
    StoredFrame,
    Verdict,
    Visualization,
    WaitFor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_WAIT = {WaitFor.ACCEPTED: ingest_pb2.WAIT_FOR_ACCEPTED, WaitFor.VERDICT: ingest_pb2.WAIT_FOR_VERDICT}
HUMAN_LABELS = {
    HumanLabel.NORMAL: types_pb2.LABEL_NORMAL,
    HumanLabel.ANOMALOUS: types_pb2.LABEL_ANOMALOUS,
    HumanLabel.UNSURE: types_pb2.LABEL_UNSURE,
}
_HUMAN_LABELS = {value: label for label, value in HUMAN_LABELS.items()}
_REASONS = {
    storage_pb2.REVIEW_REASON_UNSPECIFIED: "",
    storage_pb2.REVIEW_REASON_DISAGREEMENT: "disagreement",
    storage_pb2.REVIEW_REASON_UNCERTAIN: "uncertain",
    storage_pb2.REVIEW_REASON_RANDOM: "random",
}
VISUALIZATIONS = {
    Visualization.NONE: types_pb2.VISUALIZATION_NONE,
    Visualization.SIMPLE: types_pb2.VISUALIZATION_SIMPLE,
    Visualization.FULL: types_pb2.VISUALIZATION_FULL,
}


# What gRPC says of a message over its limit, which never reaches the service.
_TOO_LARGE = "message larger than max"


@contextmanager
def service_errors() -> Iterator[None]:
    """What a call ends with as `ServiceError`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise ServiceError(rpc_failure(error)) from error


def wait_for(what: WaitFor) -> ingest_pb2.WaitFor.ValueType:
    """The protobuf value."""
    return _WAIT[what]


# None may stand for what is not said.
_FIELD_TYPES = {
    "image": bytes,
    "model": str,
    "frame_id": str,
    "camera": str | None,
    "captured_at": datetime | None,
    "model_version": int | None,
    "labels": Mapping,
    "visualization": Visualization,
    "anomaly_map": bool,
    "mask": bool,
}


def unsendable(frame: Frame, error: Exception) -> Failure:
    """Why a frame can't be put into a message: the first field of another type, else what the library said."""
    message = f"a field is not of its type or range: {error}"
    for name, kind in _FIELD_TYPES.items():
        if not isinstance(value := getattr(frame, name), kind):
            wanted = getattr(kind, "__name__", str(kind))
            message = f"{name} is {type(value).__name__}, not {wanted}"
            break
    else:
        for name, value in frame.labels.items():
            if not (isinstance(name, str) and isinstance(value, str)):
                message = f"label {name!r} is {type(value).__name__}: names and values of labels are str"
                break
    return Failure("INVALID_ARGUMENT", "FRAME_INVALID", message)


def frame_message(frame: Frame) -> ingest_pb2.Frame:
    """The frame as ingest takes it."""
    message = ingest_pb2.Frame(
        frame_id=frame.frame_id,
        model=frame.model,
        model_version=frame.model_version,
        camera=frame.camera or "",
        labels=dict(frame.labels),
        outputs=types_pb2.OutputOptions(
            visualization=VISUALIZATIONS[frame.visualization], anomaly_map=frame.anomaly_map, mask=frame.mask
        ),
        image=frame.image,
    )
    if frame.captured_at is not None:
        message.captured_at.FromDatetime(frame.captured_at.astimezone(UTC))
    return message


def verdict(message: types_pb2.Verdict) -> Verdict:
    """A verdict as callers get it."""

    def picture(found: types_pb2.Picture) -> bytes | None:
        return found.data or None

    timing = message.timing
    return Verdict(
        frame_id=message.frame_id,
        model=message.model.name,
        version=message.model.version,
        digest=message.model.digest,
        score=message.score,
        anomalous=message.label == types_pb2.LABEL_ANOMALOUS,
        threshold=message.threshold,
        queue_s=timing.queue.ToMicroseconds() / 1e6,
        decode_s=timing.decode.ToMicroseconds() / 1e6,
        inference_s=timing.inference.ToMicroseconds() / 1e6,
        total_s=timing.total.ToMicroseconds() / 1e6,
        anomaly_map=picture(message.anomaly_map),
        mask=picture(message.mask),
        visualization=picture(message.visualization),
    )


def failure(status: status_pb2.Status) -> Failure:
    """A status with its ErrorInfo and RetryInfo."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if not detail.Unpack(info) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMicroseconds() / 1e6
    return Failure(code_pb2.Code.Name(status.code), info.reason, status.message, retry_after_s)


def rpc_failure(error: grpc.aio.AioRpcError) -> Failure:
    """A call's error, with its details where it carries them."""
    status = rpc_status.from_call(cast("grpc.Call", error))  # it reads what both have
    if status is not None:
        return failure(status)
    details = error.details() or "no details"
    if _TOO_LARGE in details and "CLIENT" in details:
        message = f"the answer is larger than a client takes; ask for fewer outputs, or JPEG pictures ({details})"
        return Failure("RESOURCE_EXHAUSTED", "ANSWER_TOO_LARGE", message)
    if _TOO_LARGE in details:
        return Failure("INVALID_ARGUMENT", "IMAGE_TOO_LARGE", f"the server takes no message that large ({details})")
    return Failure(error.code().name, "", details)


def stored_frame(message: storage_pb2.StoredFrame) -> StoredFrame:
    """A frame as the store keeps it."""
    header = message.header
    return StoredFrame(
        frame_id=header.frame_id,
        model=header.model,
        camera=header.camera,
        captured_at=header.captured_at.ToDatetime(UTC),
        stored_at=message.stored_at.ToDatetime(UTC),
        content_type=header.content_type,
        width=header.width,
        height=header.height,
        image_bytes=message.image_bytes,
        labels=dict(message.labels),
        verdict=verdict(message.verdict) if message.HasField("verdict") else None,
        failure_reason=message.failure_reason,
        annotation=annotation(message.annotation) if message.HasField("annotation") else None,
    )


def annotation(message: storage_pb2.Annotation) -> Annotation:
    """What a person said."""
    return Annotation(
        annotation_id=message.annotation_id,
        label=_HUMAN_LABELS[message.label],
        author=message.author,
        annotated_at=message.annotated_at.ToDatetime(UTC),
        note=message.note,
        masked=message.masked,
    )


def reviewed_frame(message: storage_pb2.GetResponse | storage_pb2.ExportResponse) -> ReviewedFrame:
    """A frame with all that was said of it."""
    said = tuple(annotation(one) for one in message.annotations)
    return ReviewedFrame(stored_frame(message.frame), message.image, said, message.mask or None)


def review_item(message: storage_pb2.ReviewItem) -> ReviewItem:
    """A frame to look at."""
    return ReviewItem(stored_frame(message.frame), _REASONS[message.reason])


def model(message: storage_pb2.Model, *, created: bool = True) -> Model:
    """A published version."""
    return Model(
        name=message.version.name,
        version=message.version.version,
        digest=message.version.digest,
        size_bytes=message.size_bytes,
        formats=tuple(message.formats),
        published_at=message.published_at.ToDatetime(UTC),
        manifest=message.manifest,
        published_by=message.published_by,
        deprecated=message.deprecated,
        created=created,
    )


def route(message: storage_pb2.Route) -> Route:
    """Roles of a model's versions."""
    candidate = message.candidate.version if message.HasField("candidate") else None
    return Route(message.live.name, message.live.version, candidate, message.comparison)
