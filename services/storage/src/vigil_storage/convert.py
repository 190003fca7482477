"""Protobuf in and out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput
from vigil_common.store import labels as gate
from vigil_common.store.ports import FrameFilter, Record

from vigil_storage import domain
from vigil_storage.reviews import Remark

if TYPE_CHECKING:
    from google.rpc.status_pb2 import Status
    from vigil_common.store.ports import ModelInfo, StoredRecord
    from vigil_common.streams.ports import Candidate, Live, QueuedOutcome, Route

    from vigil_storage.annotations import Annotation

LABELS = {
    types_pb2.LABEL_NORMAL: "normal",
    types_pb2.LABEL_ANOMALOUS: "anomalous",
    types_pb2.LABEL_UNSURE: "unsure",
}
LABEL_VALUES = {name: value for value, name in LABELS.items()}
REASONS = {
    "disagreement": storage_pb2.REVIEW_REASON_DISAGREEMENT,
    "uncertain": storage_pb2.REVIEW_REASON_UNCERTAIN,
    "random": storage_pb2.REVIEW_REASON_RANDOM,
    "": storage_pb2.REVIEW_REASON_UNSPECIFIED,
}


def to_us(time: Timestamp) -> int:
    """Microseconds since 1970."""
    return time.seconds * 1_000_000 + time.nanos // 1_000


def from_us(time_us: int) -> Timestamp:
    """A Timestamp of microseconds since 1970."""
    return Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1_000)


def _reason(status: Status) -> str:
    for detail in status.details:
        info = ErrorInfo()
        if detail.Unpack(info) and info.reason:
            return str(info.reason)
    return "UNKNOWN"


def record_of(model: str, queued: QueuedOutcome) -> Record:
    """What to store of an outcome; `InvalidInput` where there is nothing that could be."""
    if queued.frame is None:
        raise InvalidInput("FRAME_GONE", "the outcome's frame is no longer in the queue")
    outcome, header = types_pb2.Outcome(), types_pb2.FrameHeader()
    try:
        outcome.ParseFromString(queued.outcome)
        header.ParseFromString(queued.frame.header)
    except DecodeError as error:
        raise InvalidInput("OUTCOME_MALFORMED", "the outcome or its frame's header is no protobuf of ours") from error
    received_us = to_us(header.received_at)
    frame = domain.Frame(
        frame_id=header.frame_id,
        model=model,
        camera=header.camera,
        captured_at_us=to_us(header.captured_at) or received_us,
        received_at_us=received_us,
        sha256=header.sha256.hex(),
        width=header.width,
        height=header.height,
        traceparent=header.traceparent,
        labels=header.labels,
    )
    result: domain.Verdict | domain.Failure
    if outcome.HasField("verdict"):
        verdict = outcome.verdict
        total = verdict.timing.total
        result = domain.Verdict(
            version=verdict.model.version,
            digest=verdict.model.digest,
            score=verdict.score,
            anomalous=verdict.label == types_pb2.LABEL_ANOMALOUS,
            threshold=verdict.threshold,
            latency_us=total.seconds * 1_000_000 + total.nanos // 1_000,
        )
    else:
        result = domain.Failure(_reason(outcome.failure))
    return Record(
        entry=f"{model}/{header.camera}",
        timestamp_us=frame.captured_at_us,
        labels=domain.labels_of(frame, result),
        body=queued.frame.image,
        content_type=header.content_type or "application/octet-stream",
        otherwise_us=frame.received_at_us,
    )


def stored_frame(record: StoredRecord) -> storage_pb2.StoredFrame:
    """A record as the API shows it."""
    labels = record.labels

    def number(name: str) -> int:
        return int(labels.get(name, "0"))

    header = types_pb2.FrameHeader(
        frame_id=labels["frame_id"],
        model=labels.get("model", ""),
        camera=labels.get("camera", ""),
        captured_at=from_us(number("captured_at_us")),
        received_at=from_us(number("received_at_us")),
        labels=domain.client_labels(labels),
        content_type=record.content_type,
        width=number("width"),
        height=number("height"),
        sha256=bytes.fromhex(labels["sha256"]),
        traceparent=labels.get("traceparent", ""),
    )
    frame = storage_pb2.StoredFrame(
        header=header,
        failure_reason=labels.get("reason", ""),
        stored_at=from_us(record.timestamp_us),
        labels=labels,
        image_bytes=record.size_bytes,
    )
    if "score" in labels:
        anomalous = labels.get("anomalous") == "true"
        frame.verdict.CopyFrom(
            types_pb2.Verdict(
                frame_id=labels["frame_id"],
                model=types_pb2.ModelVersion(
                    name=labels.get("model", ""), version=number("version"), digest=labels.get("digest", "")
                ),
                score=float(labels["score"]),
                label=types_pb2.LABEL_ANOMALOUS if anomalous else types_pb2.LABEL_NORMAL,
                threshold=float(labels.get("threshold", "0")),
            )
        )
        frame.verdict.timing.total.FromMicroseconds(number("latency_us"))
    if "human" in labels:
        frame.annotation.CopyFrom(
            storage_pb2.Annotation(
                annotation_id=labels.get("annotation", ""),
                label=LABEL_VALUES.get(labels["human"], types_pb2.LABEL_UNSPECIFIED),
                author=labels.get("human_by", ""),
                annotated_at=from_us(number("human_at_us")),
                masked=labels.get("human_mask") == "true",
            )
        )
    return frame


def entry_filter(model: str, camera: str) -> FrameFilter:
    """All frames of a model and camera; `InvalidInput` for a name that can't be one."""
    if not gate.ENTRY.fullmatch(f"{model}/{camera or 'any'}"):
        text = "letters, digits, - and _, at most 64"
        raise InvalidInput("NAME_INVALID", f"model {model!r}, camera {camera!r}: names are {text}")
    return FrameFilter([f"{model}/{camera or '*'}"])


def _range(start: Timestamp | None, stop: Timestamp | None) -> tuple[int | None, int | None]:
    start_us = to_us(start) if start is not None else None
    stop_us = to_us(stop) if stop is not None else None
    if start_us is not None and stop_us is not None and stop_us < start_us:
        raise InvalidInput("RANGE_INVALID", "the end lies before the beginning")
    return _storable(start_us), _storable(stop_us)


def _storable(time_us: int | None) -> int | None:
    """The nearest time that a store can be asked for; no frame stands outside of these."""
    return None if time_us is None else min(max(time_us, 0), gate.MAX_TIMESTAMP_US)


def filter_of(request: storage_pb2.QueryRequest) -> FrameFilter:
    """What a query asks for; `InvalidInput` for a name that can't be one."""
    start_us, stop_us = _range(
        request.start if request.HasField("start") else None, request.stop if request.HasField("stop") else None
    )
    equals = domain.asked_labels(request.labels)
    if request.version:
        equals["version"] = str(request.version)
    if request.label in LABELS:
        equals["label"] = LABELS[request.label]
    if request.failed:
        equals["outcome"] = "failed"
    if request.human_label in LABELS:
        equals["human"] = LABELS[request.human_label]
    if request.HasField("disagreement"):
        equals["agree"] = "false" if request.disagreement else "true"
    reviewed = request.reviewed if request.HasField("reviewed") else None
    least = request.min_score if request.HasField("min_score") else None
    most = request.max_score if request.HasField("max_score") else None
    if any(score is not None and not math.isfinite(score) for score in (least, most)):
        raise InvalidInput("RANGE_INVALID", "min_score and max_score must be numbers, such as 0.5")
    if least is not None and most is not None and most < least:
        raise InvalidInput("RANGE_INVALID", f"no score is at least {least:g} and at most {most:g}")
    return replace(
        entry_filter(request.model, request.camera),
        start_us=start_us,
        stop_us=stop_us,
        equals=equals,
        present=("human",) if reviewed else (),
        absent=("human",) if reviewed is False else (),
        min_score=least,
        max_score=most,
    )


def export_filter(request: storage_pb2.ExportRequest) -> FrameFilter:
    """What an export takes."""
    start_us, stop_us = _range(
        request.since if request.HasField("since") else None, request.until if request.HasField("until") else None
    )
    return replace(entry_filter(request.model, request.camera), start_us=start_us, stop_us=stop_us)


def remark_of(request: storage_pb2.AnnotateRequest) -> Remark:
    """What a person wants to say; `InvalidInput` without a label."""
    if request.label not in LABELS:
        raise InvalidInput("LABEL_MISSING", "say normal, anomalous or unsure")
    return Remark(
        model=request.model,
        frame_id=request.frame_id,
        camera=request.camera,
        label=LABELS[request.label],
        mask=request.mask,
        note=request.note,
        author=request.author,
        annotation_id=request.annotation_id,
    )


def annotation(said: Annotation) -> storage_pb2.Annotation:
    """What was said, as the API shows it."""
    return storage_pb2.Annotation(
        annotation_id=said.annotation_id,
        label=LABEL_VALUES[said.label],
        author=said.author,
        annotated_at=from_us(said.annotated_at_us),
        note=said.note,
        masked=bool(said.mask_sha256),
    )


def review_item(record: StoredRecord, reason: str) -> storage_pb2.ReviewItem:
    """A frame to look at, and why."""
    return storage_pb2.ReviewItem(frame=stored_frame(record), reason=REASONS[reason])


def model_of(info: ModelInfo) -> storage_pb2.Model:
    """A version as the API shows it."""
    return storage_pb2.Model(
        version=types_pb2.ModelVersion(name=info.name, version=info.version, digest=info.digest),
        size_bytes=info.size_bytes,
        formats=info.formats,
        published_at=from_us(info.published_at_us),
        manifest=info.manifest,
        published_by=info.published_by,
        deprecated=info.deprecated,
    )


def route_of(route: Route) -> storage_pb2.Route:
    """Roles of a model's versions."""

    def version(found: Live | Candidate) -> types_pb2.ModelVersion:
        return types_pb2.ModelVersion(name=route.model, version=found.version, digest=found.digest)

    candidate = version(route.candidate) if route.candidate else None
    return storage_pb2.Route(
        live=version(route.live), candidate=candidate, comparison=route.comparison, managed_by=route.managed_by
    )
