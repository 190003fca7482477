"""Clients that mean no good, as a process of their own: `python -m tests.support.abuse KIND HOST:PORT`.

Sends the token in VIGIL_TOKEN. Says "at it" once the attack stands, and goes on until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import grpc
from vigil.ingest.v1 import ingest_pb2, ingest_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
CONNECTIONS = 500
STREAMS, CHANNELS = 3000, 30
TOKEN = (("authorization", f"Bearer {os.environ.get('VIGIL_TOKEN', '')}"),)


def _stub(address: str) -> Any:
    return ingest_pb2_grpc.IngestServiceStub(grpc.aio.insecure_channel(address, options=OPTIONS))


def _frame(image: bytes, number: int = 0) -> ingest_pb2.Frame:
    return ingest_pb2.Frame(frame_id=f"f{number}", model="cells", image=image)


async def giant_messages(address: str) -> None:
    """Of twice the size that is taken."""
    request = ingest_pb2.SubmitRequest(frame=_frame(os.urandom(64 << 20)))
    stubs = [_stub(address) for _ in range(2)]
    print("at it", flush=True)
    while True:
        for stub in stubs:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Submit(request, metadata=TOKEN, timeout=30)


async def slow_readers(address: str) -> None:
    """Send and send, and read no answer."""
    request = ingest_pb2.StreamRequest(frame=_frame(b"no image" * 1000))
    calls = [_stub(address).Stream(metadata=TOKEN) for _ in range(8)]

    async def send(call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await call.write(request)

    sending = [asyncio.create_task(send(call)) for call in calls]
    print("at it", flush=True)
    await asyncio.gather(*sending)
    await asyncio.Event().wait()


async def idle_streams(address: str) -> None:
    """Thousands, that say nothing."""
    stubs = [_stub(address) for _ in range(CHANNELS)]
    calls = [stubs[number % CHANNELS].Stream(metadata=TOKEN) for number in range(STREAMS)]
    await asyncio.gather(*(call.wait_for_connection() for call in calls), return_exceptions=True)
    print("at it", flush=True)
    await asyncio.Event().wait()


async def half_open_connections(address: str) -> None:
    """Connect and say nothing, or half of a greeting."""
    host, _, port = address.rpartition(":")
    held = []
    for number in range(CONNECTIONS):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n"[: number % 16])
        held.append((reader, writer))
    print("at it", flush=True)
    await asyncio.Event().wait()


async def header_floods(address: str) -> None:
    """A megabyte of metadata with each call."""
    stub, metadata = _stub(address), tuple((f"x-{number}", "y" * 4000) for number in range(250))
    print("at it", flush=True)
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Submit(ingest_pb2.SubmitRequest(), metadata=(*TOKEN, *metadata), timeout=10)


KINDS: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
    kind.__name__: kind for kind in (giant_messages, slow_readers, idle_streams, half_open_connections, header_floods)
}

if __name__ == "__main__":
    os.nice(10)  # it is the server's work that is measured, not the attacker's
    asyncio.run(KINDS[sys.argv[1]](sys.argv[2]))
