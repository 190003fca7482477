"""What a frame id tells by itself."""

from __future__ import annotations

import uuid

_VERSION = 7


def uuid7_time_us(frame_id: str) -> int | None:
    """When a UUIDv7 was made, in microseconds since 1970; None for any other id."""
    try:
        parsed = uuid.UUID(frame_id)
    except ValueError:
        return None
    return (parsed.int >> 80) * 1000 if parsed.version == _VERSION else None
