"""Errors as gRPC statuses with google.rpc.ErrorInfo, and the one interceptor that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from vigil_common.errors import (
    DOMAIN,
    DataLost,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    VigilError,
)
from vigil_common.grpc.handlers import behaviour_of, drained, with_behaviour
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

# What a caller is told that asks in vain; all else may pass by itself.
_IN_VAIN: dict[str, type[VigilError]] = {
    kind.status: kind for kind in (InvalidInput, Unauthenticated, Forbidden, NotFound, DataLost)
}

log = get_logger()


def to_status(error: VigilError) -> status_pb2.Status:
    """The error as google.rpc.Status: code, sentence, ErrorInfo and, where trying again helps, RetryInfo."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_call(error: grpc.aio.AioRpcError) -> VigilError:
    """What another service answered, as an error of the caller's; `Unavailable` where it may pass by itself."""
    status = rpc_status.from_call(cast("grpc.Call", error))  # it reads what both have
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
    name = error.code().name
    return _IN_VAIN.get(name, Unavailable)(info.reason or name, error.details() or name)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    """Ends a call that raised a `VigilError` with its status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler, whatever its shape."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        wrap = _streaming if handler.response_streaming else _single
        return with_behaviour(handler, wrap(behaviour_of(handler)))


def _single(method: Any) -> Any:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except VigilError as error:
            await drained(request)
            await context.abort_with_status(rpc_status.to_status(to_status(error)))

    return call


def _streaming(method: Any) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(request, context):
                yield response
        except VigilError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))

    return call
