"""W3C trace context (https://www.w3.org/TR/trace-context/): carried along, or begun where a client brings none."""

from __future__ import annotations

import os
import re

HEADER = "traceparent"
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def continued(traceparent: str) -> str:
    """The context for what follows: the caller's where it is valid, else the start of a new trace, not sampled."""
    if _TRACEPARENT.fullmatch(traceparent):
        return traceparent
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"


def trace_id(traceparent: str) -> str:
    """The trace's id, for logs; empty where there is none."""
    return traceparent.split("-", 2)[1] if "-" in traceparent else ""
