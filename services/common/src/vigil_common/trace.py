"""W3C trace context (https://www.w3.org/TR/trace-context/): carried along, or begun where a client brings none.

Where this process exports spans (`otlp.py`), a frame's are begun and recorded through here: ingest's is the child of
the client's, the worker's and storage's are children of ingest's. Who exports none pays a comparison a frame.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vigil_common.otlp import OtlpSpan, OtlpTracer

    Attributes = Mapping[str, str | int | float | bool]

HEADER = "traceparent"
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_tracer: OtlpTracer | None = None


def valid(traceparent: str) -> bool:
    """Whether it is a trace context."""
    return _TRACEPARENT.fullmatch(traceparent) is not None


def continued(traceparent: str) -> str:
    """The context for what follows: the caller's where it is valid, else the start of a new trace, not sampled."""
    return traceparent if valid(traceparent) else f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"


def trace_id(traceparent: str) -> str:
    """The trace's id, for logs; empty where there is none."""
    return traceparent.split("-", 2)[1] if "-" in traceparent else ""


@contextmanager
def traced(service: str) -> Iterator[OtlpTracer | None]:
    """Export this process's spans meanwhile, where the environment names a collector.

    Raises:
        InvalidInput: OTLP_PROTOCOL_UNSUPPORTED.
    """
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not any(os.environ.get(name) for name in _ENDPOINTS):
        yield None
        return
    from vigil_common.otlp import OtlpTracer  # noqa: PLC0415 - who exports nothing loads none of it

    global _tracer  # noqa: PLW0603 - one per process, as its log
    tracer = _tracer = OtlpTracer(service)
    try:
        yield tracer
    finally:
        _tracer = None
        tracer.close()


def begin(name: str, parent: str) -> OtlpSpan | None:
    """A step of a frame begins now, as the child of this context, or as a trace's first where that is none.

    None where this process exports nothing.
    """
    return None if _tracer is None else _tracer.begin(name, parent)


def wanted(parent: str) -> bool:
    """Whether a step that is the child of this context would be exported."""
    return _tracer is not None and valid(parent) and int(parent[-1], 16) % 2 == 1


def record(name: str, parent: str, *, began_ns: int, attributes: Attributes, error: str = "") -> None:
    """A step that began then (nanoseconds since 1970) is done now; ask `wanted` before."""
    if _tracer is not None:
        _tracer.record(name, parent, began_ns=began_ns, attributes=attributes, error=error)
