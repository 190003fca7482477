"""What a stored frame's labels say, and where a page of a query ends; pure."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vigil_common.errors import InvalidInput
from vigil_common.store.labels import check_client_names
from vigil_common.store.retained import COPY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vigil_common.store.ports import Record, StoredRecord

# Names that Vigil gives; a client's label of the same name is kept as "client_NAME".
RESERVED = frozenset(
    (
        *("frame_id", "sha256", "model", "camera", "captured_at_us", "received_at_us", "width", "height"),
        *("traceparent", "outcome", "reason", "version", "digest", "score", "label", "anomalous", "threshold"),
        *("latency_us", "reused_frame_id", "labels_refused"),
        *("candidate_version", "candidate_digest", "candidate_score", "candidate_label", "candidate_threshold"),
        *("agree", "annotation", "human", "human_by", "human_at_us", "human_mask", "human_order"),
        COPY,
    )
)
MAX_NAME_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame without its pixels; times in microseconds since 1970, `sha256` in hexadecimal."""

    frame_id: str
    model: str
    camera: str
    captured_at_us: int
    received_at_us: int
    sha256: str
    width: int
    height: int
    traceparent: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the live version said."""

    version: int
    digest: str
    score: float
    anomalous: bool
    threshold: float
    latency_us: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a frame could not be judged."""

    reason: str


def labels_of(frame: Frame, result: Verdict | Failure) -> dict[str, str]:
    """Labels of a record; numbers as Python writes them, so that they come back the same."""
    labels = {(f"client_{name}"[:MAX_NAME_LENGTH] if name in RESERVED else name): v for name, v in frame.labels.items()}
    labels |= {
        "frame_id": frame.frame_id,
        "sha256": frame.sha256,
        "model": frame.model,
        "camera": frame.camera,
        "captured_at_us": str(frame.captured_at_us),
        "received_at_us": str(frame.received_at_us),
        "width": str(frame.width),
        "height": str(frame.height),
    }
    if frame.traceparent:
        labels["traceparent"] = frame.traceparent
    if isinstance(result, Failure):
        return labels | {"outcome": "failed", "reason": result.reason}
    return labels | {
        "outcome": "judged",
        "version": str(result.version),
        "digest": result.digest,
        "score": repr(result.score),
        "label": "anomalous" if result.anomalous else "normal",
        "anomalous": "true" if result.anomalous else "false",
        "threshold": repr(result.threshold),
        "latency_us": str(result.latency_us),
    }


def stays(labels: Mapping[str, str]) -> bool:
    """Whether a frame of these labels, or one that is given them, is kept for good."""
    matters = labels.get("label") == "anomalous" or labels.get("outcome") == "failed"
    return matters or labels.get("agree") == "false" or "human" in labels


def client_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The client's own among a record's labels."""
    return {name: value for name, value in labels.items() if name not in RESERVED}


def asked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The client's labels that a query asks for.

    Raises:
        InvalidInput: LABEL_INVALID.
    """
    check_client_names(labels.keys(), "this asks for")
    for name in labels:
        if name in RESERVED:
            text = f"label {name} is Vigil's own; a client's label of that name is stored as client_{name}"
            raise InvalidInput("LABEL_INVALID", text)
    return dict(labels)


def salvage(record: Record, reason: str) -> Record:
    """A record that the store refused, as it can be kept: for people to look at, under an id that is its own."""
    labels = {name: value for name, value in record.labels.items() if name in RESERVED}
    if reason == "FRAME_ID_REUSED":
        frame_id = labels["frame_id"]
        labels |= {"frame_id": f"{frame_id}.{labels['sha256'][:12]}", "reused_frame_id": frame_id}
        return replace(record, labels={**record.labels, **labels})
    return replace(record, labels={**labels, "labels_refused": reason})


@dataclass(frozen=True, slots=True)
class PageToken:
    """Where the next page begins.

    Attributes:
        timestamp_us: Of the last record given.
        entries: Whose records of that very time have been given; their order is the store's own.
    """

    timestamp_us: int
    entries: tuple[str, ...]

    def encode(self) -> str:
        """As text for a URL."""
        return base64.urlsafe_b64encode(json.dumps([self.timestamp_us, *self.entries]).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> PageToken:
        """Raise `InvalidInput` for what `encode` did not make."""
        try:
            timestamp_us, *entries = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
        except (ValueError, TypeError, binascii.Error) as error:
            raise InvalidInput("PAGE_TOKEN_INVALID", "the page token is not one of ours") from error
        if type(timestamp_us) is not int or not all(isinstance(entry, str) for entry in entries):
            raise InvalidInput("PAGE_TOKEN_INVALID", "the page token is not one of ours")
        return cls(timestamp_us, tuple(entries))


def page(
    found: Sequence[StoredRecord], size: int, token: PageToken | None
) -> tuple[list[StoredRecord], PageToken | None]:
    """Cut a page from records by time, of which there are more than `size` unless these are the last."""
    seen = set(token.entries) if token else set()
    start = token.timestamp_us if token else None
    fresh = [record for record in found if record.timestamp_us != start or record.entry not in seen]
    if len(fresh) <= size:
        return fresh, None
    given = fresh[:size]
    last = given[-1].timestamp_us
    entries = {record.entry for record in given if record.timestamp_us == last} | (seen if last == start else set())
    return given, PageToken(last, tuple(sorted(entries)))
