"""A gRPC server as every service has it: TLS, tokens, health, reflection, errors, limits, drain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vigil_common.access import Tokens
from vigil_common.grpc.errors import ErrorInterceptor
from vigil_common.grpc.security import Access, AccessInterceptor, server_credentials

if TYPE_CHECKING:
    from vigil_common.config import SecuritySettings

HEADROOM_BYTES = 1 << 20
# As HTTP/2 has it; by itself gRPC cuts everything into frames of 16 KiB.
MAX_FRAME_BYTES = (1 << 24) - 1
MAX_PROBES = 16


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
    _probes: grpc.aio.Server | None

    async def start(self) -> None:
        """Serve; not healthy until `ready` says so."""
        await self.ready(serving=False)
        if self._probes is not None:
            await self._probes.start()
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
        if self._probes is not None:
            await self._probes.stop(0)


def create_server(
    bind: str,
    *,
    access: Access,
    security: SecuritySettings,
    max_message_bytes: int = 64 << 20,
    max_concurrent_rpcs: int | None = None,
    stream_window_bytes: int | None = None,
) -> ServerHandle:
    """Bind a server.

    Args:
        bind: "HOST:PORT"; port 0 takes a free one.
        access: The services it will have, by full name, for health and reflection, and the roles that may call them.
        security: TLS and tokens.
        max_message_bytes: Larger requests are refused before they are read.
        max_concurrent_rpcs: Further calls are refused with RESOURCE_EXHAUSTED.
        stream_window_bytes: How much of a stream may wait here unread. By itself gRPC lets as much come as the line
            could carry meanwhile: on a busy machine, hundreds of megabytes of a large bundle.

    Raises:
        InvalidInput: TLS_INCOMPLETE, TOKENS_INVALID.
    """
    interceptors: list[grpc.aio.ServerInterceptor] = []
    if security.tokens_file is not None:
        interceptors.append(AccessInterceptor(Tokens(security.tokens_file), access))
    window: list[tuple[str, int]] = []
    if stream_window_bytes is not None:
        window = [
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", stream_window_bytes),
            ("grpc.http2.max_frame_size", min(stream_window_bytes, MAX_FRAME_BYTES)),
        ]
    server = grpc.aio.server(
        interceptors=[*interceptors, ErrorInterceptor()],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes + HEADROOM_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            # Who opens a connection and says nothing, or floods it with headers or streams, costs little.
            ("grpc.server_handshake_timeout_ms", 20_000),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.max_concurrent_streams", 4096),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            *window,
        ],
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection((*access, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    probes = None
    if security.health_bind:
        probes = grpc.aio.server(maximum_concurrent_rpcs=MAX_PROBES)
        health_pb2_grpc.add_HealthServicer_to_server(checker, probes)
        probes.add_insecure_port(security.health_bind)
    credentials = server_credentials(security)
    port = server.add_secure_port(bind, credentials) if credentials else server.add_insecure_port(bind)
    return ServerHandle(server, port, checker, tuple(access), probes)
