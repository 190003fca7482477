"""What interceptors need: another behaviour in a handler of the same shape."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc

_MAKERS: dict[tuple[bool, bool], Any] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}

DRAIN_MESSAGES = 64
DRAIN_S = 2.0


def behaviour_of(handler: Any) -> Any:
    """What a handler does, whatever its shape."""
    return handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream


def with_behaviour(handler: Any, behaviour: Any) -> Any:
    """The handler, doing this instead."""
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


async def drained(request: Any) -> None:
    """Read what a client is still sending, within limits, before its call is ended with an error.

    grpc.aio's client loses the status of a call that ends while it writes, and says "Internal error from Core" instead.
    """
    if not hasattr(request, "__aiter__"):
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            left = DRAIN_MESSAGES
            async for _ in request:
                left -= 1
                if left == 0:
                    return
