"""Spans to an OpenTelemetry collector by OTLP over gRPC, as the standard OTEL_* variables say.

A thread of the SDK's sends them in batches. While the collector is away at most OTEL_BSP_MAX_QUEUE_SIZE (2,048) spans
wait; the oldest are dropped, and frames never wait for any of it. OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG
decide where a trace begins; who comes after follows.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace import set_span_in_context as with_parent

from vigil_common import trace
from vigil_common.errors import InvalidInput
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    import opentelemetry.trace as api

CLOSE_S = 3.0

log = get_logger()


class _Logged(logging.Handler):
    """What the SDK has to say becomes lines of this process's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("otlp", detail=record.getMessage())


@dataclass(frozen=True, slots=True)
class OtlpSpan:
    """A span under way."""

    _span: api.Span

    @property
    def traceparent(self) -> str:
        """Its context."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, attributes: trace.Attributes, *, error: str = "") -> None:
        """It is done."""
        self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class OtlpTracer:
    """This process's spans, and the thread that sends them.

    Args:
        service: Its name; the resource is `vigil-SERVICE` unless OTEL_SERVICE_NAME says otherwise.

    Raises:
        InvalidInput: OTLP_PROTOCOL_UNSUPPORTED: the environment asks for another than gRPC.
    """

    def __init__(self, service: str) -> None:
        named = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next((os.environ[name] for name in named if os.environ.get(name)), "grpc")
        if protocol != "grpc":
            raise InvalidInput("OTLP_PROTOCOL_UNSUPPORTED", f"spans go by OTLP over grpc, not {protocol}")
        quiet = logging.getLogger("opentelemetry")
        quiet.propagate = False
        quiet.handlers = [_Logged(logging.WARNING)]
        about = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"vigil-{service}",
            "service.namespace": "vigil",
            "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        }
        self._exporter = OTLPSpanExporter()
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.sdk = self._provider.get_tracer("vigil")

    def begin(self, name: str, parent: str) -> OtlpSpan:
        """A server's step."""
        return OtlpSpan(self.sdk.start_span(name, _context(parent), SpanKind.SERVER))

    def record(self, name: str, parent: str, *, began_ns: int, attributes: trace.Attributes, error: str) -> None:
        """A consumer's step."""
        span = self.sdk.start_span(name, _context(parent), SpanKind.CONSUMER, start_time=began_ns)
        OtlpSpan(span).end(attributes, error=error)

    def close(self) -> None:
        """Send what waits, for at most CLOSE_S: a collector that is away holds up no stop."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()
            log.warning("otlp_not_sent")


def _context(traceparent: str) -> Context:
    if not trace.valid(traceparent):
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    remote = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return with_parent(NonRecordingSpan(remote), Context())
