"""What a version does with the frames of its model."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """As the route says."""

    IDLE = "idle"
    LIVE = "live"
    CANDIDATE = "candidate"
