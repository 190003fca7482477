"""TLS and tokens of a gRPC server, and of channels between services."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from vigil_common.access import Principal, Role, Tokens, enter, require
from vigil_common.errors import Forbidden, InvalidInput, Unauthenticated, Unavailable, VigilError
from vigil_common.grpc.errors import to_status
from vigil_common.grpc.handlers import behaviour_of, drained, with_behaviour
from vigil_common.grpc.reloading import ReloadingChannel
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from vigil_common.config import SecuritySettings

# Service's full name -> method ("*" for the others) -> roles that may call it.
Access = Mapping[str, Mapping[str, frozenset[Role]]]
# A stream lives for days; so long at most it outlives its token.
RECHECK_S = 5.0
# A server that says nothing while a call is under way is asked whether it is there; its node may have vanished.
KEEPALIVE_MS, PING_TIMEOUT_MS = 30_000, 20_000

log = get_logger()


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """TLS as set, None without; a new certificate is taken at the next handshake.

    Raises:
        InvalidInput: TLS_INCOMPLETE.
    """
    cert, key, client_ca = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    if cert is None and key is None:
        if client_ca is not None:
            raise InvalidInput("TLS_INCOMPLETE", "VIGIL_TLS_CLIENT_CA_FILE needs a certificate and key of our own")
        return None
    if cert is None or key is None:
        raise InvalidInput("TLS_INCOMPLETE", "set VIGIL_TLS_CERT_FILE and VIGIL_TLS_KEY_FILE, or neither")

    files: list[Path] = [cert, key, *([client_ca] if client_ca else [])]

    def load() -> tuple[tuple[int, ...], grpc.ServerCertificateConfiguration]:
        changed = tuple(path.stat().st_mtime_ns for path in files)
        configuration = grpc.ssl_server_certificate_configuration(
            [(key.read_bytes(), cert.read_bytes())], client_ca.read_bytes() if client_ca else None
        )
        return changed, configuration

    seen, first = load()

    def reload() -> Any:  # None: nothing new
        nonlocal seen
        try:
            if tuple(path.stat().st_mtime_ns for path in files) == seen:
                return None
            seen, configuration = load()
        except OSError as error:  # in the middle of a rotation: what is loaded stays
            log.warning("certificate_unreadable", detail=str(error))
            return None
        log.info("certificate_reloaded", file=str(cert))
        return configuration

    return grpc.dynamic_ssl_server_credentials(first, reload, require_client_authentication=client_ca is not None)


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    """Lets a call through only with a token that may make it; probes need none.

    A stream ends soon after its token no longer allows it, or allows something else.

    Args:
        tokens: Who has which.
        access: Roles per service and method; what is not in it only an admin may call.
    """

    def __init__(self, tokens: Tokens, access: Access) -> None:
        self._tokens = tokens
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Check before the request is read."""
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if service == health.SERVICE_NAME:
            return await continuation(handler_call_details)
        metadata: Mapping[str, Any] = dict(handler_call_details.invocation_metadata or ())
        authorization, full_name = metadata.get("authorization"), handler_call_details.method
        methods = self._access.get(service, {})

        def caller() -> Principal:
            who = self._tokens.authenticate(authorization)
            require(who, methods.get(method, methods.get("*", frozenset())), full_name)
            return who

        try:
            who = caller()
        except (Unauthenticated, Forbidden) as error:
            log.info("call_refused", method=full_name, reason=error.reason)
            return _refusal(await continuation(handler_call_details), error)
        handler = await continuation(handler_call_details)
        return None if handler is None else _entered(handler, who, caller)


class _Recheck:
    """Looks every few seconds whether the caller is still the same, and ends the call's next wait where not.

    Attributes:
        refusal: Why the call ends.
    """

    def __init__(self, who: Principal, caller: Callable[[], Principal], limit: asyncio.Timeout) -> None:
        self.refusal: VigilError | None = None
        self._who, self._caller, self._limit = who, caller, limit
        self._sending = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(RECHECK_S, self._look)

    def _look(self) -> None:
        try:
            if self._caller() != self._who:
                self.refusal = Unavailable("TOKEN_CHANGED", "what this token may do has changed; call again")
        except (Unauthenticated, Forbidden) as error:
            self.refusal = error
        finally:  # whatever else went wrong, the next look is not left out
            if self.refusal is None:
                self._timer = self._loop.call_later(RECHECK_S, self._look)
            elif not self._sending:
                self._limit.reschedule(self._loop.time())

    def sending(self) -> None:
        """GRPC has a response: what waits now is not ours to interrupt."""
        self._sending = True

    def sent(self) -> None:
        """It has gone.

        Raises:
            TimeoutError: The call ends.
        """
        self._sending = False
        if self.refusal is not None:
            raise TimeoutError

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()


@asynccontextmanager
async def _rechecked(
    who: Principal, caller: Callable[[], Principal], request: Any, context: Any
) -> AsyncIterator[_Recheck]:
    refusal = None
    try:
        async with asyncio.timeout(None) as limit:
            recheck = _Recheck(who, caller, limit)
            try:
                yield recheck
            finally:
                recheck.stop()
                refusal = recheck.refusal
    except TimeoutError:
        if refusal is None:
            raise
        log.info("call_ended", token=who.name, reason=refusal.reason)
        await _refuse(request, context, refusal)


def _entered(handler: Any, who: Principal, caller: Callable[[], Principal]) -> Any:
    """The handler, with the caller known to whatever it calls, and held to what the caller may while it streams."""
    method = behaviour_of(handler)

    async def call(request: Any, context: Any) -> Any:
        enter(who)
        return await method(request, context)

    async def upload(request: Any, context: Any) -> Any:
        enter(who)
        async with _rechecked(who, caller, request, context):
            return await method(request, context)

    async def stream(request: Any, context: Any) -> Any:
        enter(who)
        async with (
            _rechecked(who, caller, request, context) as recheck,
            aclosing(method(request, context)) as responses,
        ):
            async for response in responses:
                recheck.sending()
                yield response
                recheck.sent()

    if handler.response_streaming:
        return with_behaviour(handler, stream)
    return with_behaviour(handler, upload if handler.request_streaming else call)


async def _refuse(request: Any, context: Any, error: VigilError) -> None:
    await drained(request)
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _refusal(handler: Any, error: VigilError) -> Any:
    if handler is None:
        return None

    async def refuse(request: Any, context: Any) -> None:
        await _refuse(request, context, error)

    async def refuse_stream(request: Any, context: Any) -> Any:
        await refuse(request, context)
        yield  # makes it a generator

    return with_behaviour(handler, refuse_stream if handler.response_streaming else refuse)


def connect(address: str, settings: SecuritySettings, *, server_name: str | None = None) -> grpc.aio.Channel:
    """A channel to another service, with TLS, client certificate and token as set; files are read again as they change.

    Args:
        address: HOST:PORT.
        settings: Files.
        server_name: What its certificate is issued for, where that is not the address' host.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", 64 << 20),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.lb_policy_name", "round_robin"),
        # Pods that were replaced have other addresses; by itself gRPC asks for them again after 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        # By itself gRPC waits for 60 s; its keepalive_timeout_ms changes nothing of that.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    interceptors: list[Any] = []
    if settings.token_file is not None:
        interceptors = [kind(settings.token_file) for kind in (_UnaryToken, _UnaryStreamToken, _StreamUnaryToken)]
    if settings.tls_ca_file is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    files = [settings.tls_ca_file]
    if settings.tls_key_file is not None and settings.tls_cert_file is not None:
        files += [settings.tls_key_file, settings.tls_cert_file]

    def secure() -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

    return ReloadingChannel(files, secure)


class _Token:
    """Adds the token, read anew each time since it may be rotated."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _with_token(self, details: Any) -> Any:
        token = ("authorization", f"Bearer {self._path.read_text().strip()}")
        metadata = grpc.aio.Metadata(*(details.metadata or ()), token)
        return details._replace(metadata=metadata)


class _UnaryToken(_Token, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._with_token(client_call_details), request)


class _UnaryStreamToken(_Token, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._with_token(client_call_details), request)


class _StreamUnaryToken(_Token, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._with_token(client_call_details), request_iterator)
