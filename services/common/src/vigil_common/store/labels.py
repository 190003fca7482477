"""What both stores ask of a record, so that neither takes what the other can't keep."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from vigil_common.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from vigil_common.store.ports import Labelling, Record

MAX_LABELS = 80
MAX_VALUE_BYTES = 1024
# Of a frame, from its client.
MAX_CLIENT_LABELS = 32
# All labels of a record come back in one header line, and common HTTP clients read 8,190 bytes of one.
MAX_BYTES = 7_000
# What may come later, all changes together; the rest is left for what has to be kept short by its nature.
MAX_CHANGE_BYTES = 600
MAX_TIMESTAMP_US = 2**62
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
# The third part is a track's number, as found in a store.
ENTRY = re.compile(r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}(/[0-9]{1,2})?")
CONTENT_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")
# Printable ASCII without comma, quote and percent, and no blank at either end: travels as it is.
_PLAIN = re.compile(r"[!#$&-+\--~](?:[ !#$&-+\--~]*[!#$&-+\--~])?")
_EMPTY = "%"


def encode(value: str) -> str:
    """A label's value as header text; anything but plain ASCII percent-encoded, so that it comes back as it was."""
    if _PLAIN.fullmatch(value):
        return value
    return quote(value, safe="") or _EMPTY


def decode(text: str) -> str:
    """The value behind `encode`."""
    if "%" not in text:
        return text
    return "" if text == _EMPTY else unquote(text)


def check(record: Record) -> None:
    """Raise `InvalidInput` for what can't be kept.

    A label name that is no HTTP token kills ReductStore at the next read of its record: nothing gets past this gate.
    """
    if not ENTRY.fullmatch(record.entry):
        raise InvalidInput("ENTRY_INVALID", f"{record.entry!r} is no entry name: MODEL/CAMERA")
    if not 0 < record.timestamp_us < MAX_TIMESTAMP_US:
        raise InvalidInput("TIME_INVALID", f"{record.timestamp_us} µs is no time to store a frame at")
    if not CONTENT_TYPE.fullmatch(record.content_type):
        raise InvalidInput("CONTENT_TYPE_INVALID", f"{record.content_type!r} is no media type")
    check_labels(record.labels)
    if not {"frame_id", "sha256"} <= record.labels.keys():
        raise InvalidInput("LABELS_INCOMPLETE", "a record needs the labels frame_id and sha256")


def check_client_names(names: Collection[str], said: str) -> None:
    """Raise `InvalidInput` LABEL_INVALID for names that a client can't have given a frame's labels.

    Args:
        names: Of all labels.
        said: What stands before their number, such as "this one has".
    """
    if len(names) > MAX_CLIENT_LABELS:
        text = f"a frame carries at most {MAX_CLIENT_LABELS} labels, {said} {len(names)}"
        raise InvalidInput("LABEL_INVALID", text)
    if not all(map(NAME.fullmatch, names)):
        raise InvalidInput("LABEL_INVALID", "label names are 1 to 64 of a-z, 0-9 and _, and begin with a letter")


def check_change(change: Labelling) -> None:
    """Raise `InvalidInput` for labels that a stored record can't be given."""
    if not ENTRY.fullmatch(change.entry):
        raise InvalidInput("ENTRY_INVALID", f"{change.entry!r} is no entry name: MODEL/CAMERA")
    if not 0 < change.timestamp_us < MAX_TIMESTAMP_US:
        raise InvalidInput("TIME_INVALID", f"{change.timestamp_us} µs is no time to store a frame at")
    check_labels(change.labels, max_bytes=MAX_CHANGE_BYTES)


def check_labels(labels: Mapping[str, str], *, max_bytes: int = MAX_BYTES) -> None:
    """Raise `InvalidInput` for labels that can't be kept."""
    if len(labels) > MAX_LABELS:
        raise InvalidInput("TOO_MANY_LABELS", f"{len(labels)} labels; at most {MAX_LABELS} are kept")
    total = 0
    for name, value in labels.items():
        if not NAME.fullmatch(name):
            raise InvalidInput("LABEL_NAME_INVALID", f"{name!r} is no label name: {NAME.pattern}")
        try:
            size = len(encode(value))
        except UnicodeEncodeError as error:
            raise InvalidInput("LABEL_VALUE_INVALID", f"the value of label {name} is no text") from error
        if size > MAX_VALUE_BYTES:
            raise InvalidInput("LABEL_VALUE_TOO_LONG", f"label {name} has {size} bytes; at most {MAX_VALUE_BYTES}")
        total += len(name) + size + 6
    if total > max_bytes:
        raise InvalidInput("LABELS_TOO_LONG", f"the labels have {total} bytes; at most {max_bytes} are kept")
