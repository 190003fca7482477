"""A gRPC server as every service has it: health, reflection, errors, limits, drain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vigil_common.grpc.errors import ErrorInterceptor

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADROOM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server with its health.

    Attributes:
        server: Add servicers here, then `start()`.
        port: What it is bound to.
    """

    server: grpc.aio.Server
    port: int
    _health: health.aio.HealthServicer
    _services: tuple[str, ...]

    async def start(self) -> None:
        """Serve; not healthy until `ready` says so."""
        await self.ready(serving=False)
        await self.server.start()

    async def ready(self, *, serving: bool = True) -> None:
        """Tell the probes."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, state)

    async def drain(self, grace_s: float) -> None:
        """Stop taking calls, let those under way end within the grace."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def create_server(
    bind: str,
    *,
    services: Sequence[str],
    max_message_bytes: int = 64 << 20,
    max_concurrent_rpcs: int | None = None,
) -> ServerHandle:
    """Bind a server.

    Args:
        bind: "HOST:PORT"; port 0 takes a free one.
        services: Full names of the services it will have, for health and reflection.
        max_message_bytes: Larger requests are refused before they are read.
        max_concurrent_rpcs: Further calls are refused with RESOURCE_EXHAUSTED.
    """
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes + HEADROOM_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ],
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return ServerHandle(server, server.add_insecure_port(bind), checker, tuple(services))
