"""What interceptors need: another behaviour in a handler of the same shape."""

from __future__ import annotations

from typing import Any

import grpc

_MAKERS: dict[tuple[bool, bool], Any] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def behaviour_of(handler: Any) -> Any:
    """What a handler does, whatever its shape."""
    return handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream


def with_behaviour(handler: Any, behaviour: Any) -> Any:
    """The handler, doing this instead."""
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
