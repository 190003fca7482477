"""What a frame must be to be accepted: pure checks, no transport."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vigil_common.errors import InvalidInput
from vigil_common.store.ids import uuid7_time_us
from vigil_common.store.labels import MAX_VALUE_BYTES, check_client_names, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

FRAME_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
CAMERA = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MODEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
# Printable ASCII without comma and double quote: the store carries labels as HTTP headers.
LABEL_VALUE = re.compile(r"[!#-+\--~](?:[ !#-+\--~]{0,1022}[!#-+\--~])?")
# The store keeps 7,000 of a record, and Vigil's own, and those that come later, need their part.
MAX_LABELS_BYTES = 4_096
# The store compares labels that read as numbers as numbers: 007 would be found as 7.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|true|false|inf|nan|infinity", re.IGNORECASE)
RESERVED = frozenset(
    {
        "frame_id", "sha256", "model", "version", "digest", "score", "label", "anomalous", "threshold", "camera",
        "latency_us", "captured_at_us", "received_at_us", "outcome", "reason", "width", "height", "content_type",
        "candidate_version", "candidate_digest", "candidate_score", "candidate_label", "candidate_threshold", "agree",
    }
)  # fmt: skip
YEAR_2000_US = 946_684_800_000_000
MAX_AHEAD_US = 300_000_000


@dataclass(frozen=True, slots=True)
class Submission:
    """A frame as a client sent it; times in microseconds, None where the client gave none.

    `traceparent` is the trace that it belongs to (W3C), `client` is who sent it.
    """

    frame_id: str
    model: str
    model_version: int | None
    camera: str
    captured_at_us: int | None
    labels: Mapping[str, str]
    image: bytes
    traceparent: str
    client: str = ""


def is_frame_id(text: str) -> bool:
    """Whether a frame may be called so."""
    return FRAME_ID.fullmatch(text) is not None and NUMBER.fullmatch(text) is None


def check(frame: Submission, *, now_us: int) -> int:
    """Check every field but the image.

    Returns:
        When the frame was captured: as said, as its UUIDv7 says, else now.

    Raises:
        InvalidInput: FRAME_ID_INVALID, MODEL_NAME_INVALID, CAMERA_INVALID, LABEL_INVALID, CAPTURED_AT_OUT_OF_RANGE.
    """
    if not is_frame_id(frame.frame_id):
        raise InvalidInput(
            "FRAME_ID_INVALID",
            "frame_id must be 1 to 64 letters, digits, dots, dashes, underscores or colons, begin with a letter or "
            "digit, and not read as a number; a UUIDv7 is a good one",
        )
    if not MODEL.fullmatch(frame.model):
        raise InvalidInput("MODEL_NAME_INVALID", "model must be 1 to 63 lower-case letters, digits and dashes")
    if not CAMERA.fullmatch(frame.camera):
        raise InvalidInput("CAMERA_INVALID", "camera must be 1 to 64 letters, digits, dashes and underscores")
    _check_labels(frame.labels)
    captured_at_us = frame.captured_at_us
    if captured_at_us is None:
        made_at_us = uuid7_time_us(frame.frame_id)
        plausible = made_at_us is not None and YEAR_2000_US <= made_at_us <= now_us + MAX_AHEAD_US
        return made_at_us if made_at_us is not None and plausible else now_us
    if not YEAR_2000_US <= captured_at_us <= now_us + MAX_AHEAD_US:
        raise InvalidInput(
            "CAPTURED_AT_OUT_OF_RANGE",
            "captured_at must not be before the year 2000 nor more than 300 s ahead of the server's clock",
        )
    return captured_at_us


def _check_labels(labels: Mapping[str, str]) -> None:
    check_client_names(labels.keys(), "this one has")
    total = 0
    for name, value in labels.items():
        if name in RESERVED:
            raise InvalidInput("LABEL_INVALID", f"label {name} is Vigil's own; choose another name")
        if not LABEL_VALUE.fullmatch(value):
            raise InvalidInput(
                "LABEL_INVALID",
                f"label {name} must be 1 to 1,024 printable ASCII characters without comma, double quote or spaces at "
                "its ends",
            )
        if (size := len(encode(value))) > MAX_VALUE_BYTES:
            text = (
                f"label {name} takes {size:,} bytes in the store, and may {MAX_VALUE_BYTES:,}: with a % in it each sign"
            )
            raise InvalidInput("LABEL_INVALID", f"{text} but letters, digits and _.-~ takes three")
        total += len(name) + size
    if total > MAX_LABELS_BYTES:
        text = f"a frame's labels take at most {MAX_LABELS_BYTES:,} bytes together, these {total:,}"
        raise InvalidInput("LABEL_INVALID", text)
