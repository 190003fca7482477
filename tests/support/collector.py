"""A collector that speaks OTLP by its own protocol's servicer, and keeps the spans it is sent."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span


def _plain(attributes: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in attributes}


@dataclass(frozen=True)
class Received:
    """A span as it came, and who sent it."""

    service: str
    span: Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def attributes(self) -> dict[str, Any]:
        return _plain(self.span.attributes)

    def follows(self, other: Received) -> bool:
        """Whether it is the other's child."""
        return (self.span.trace_id, self.span.parent_span_id) == (other.span.trace_id, other.span.span_id)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens while it is entered, on `port`."""

    def __init__(self, bind: str = "127.0.0.1:0") -> None:
        self.spans: list[Received] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(bind)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(  # noqa: N802 - the protocol's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        del context
        for resource in request.resource_spans:
            service = _plain(resource.resource.attributes)["service.name"]
            self.spans += [Received(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    async def wait_for(self, count: int, deadline_s: float = 20.0) -> list[Received]:
        """So many spans."""
        deadline = time.monotonic() + deadline_s
        while len(self.spans) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.spans)} spans of {count}: {sorted(span.name for span in self.spans)}")
            await asyncio.sleep(0.05)
        return self.spans
