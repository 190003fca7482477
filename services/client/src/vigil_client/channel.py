"""How channels to Vigil's services are made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc

from vigil_client.types import SettingError

if TYPE_CHECKING:
    from types import TracebackType

# Visualisations and bundles' chunks are larger than gRPC's 4 MiB.
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
TLS_FILES = ("VIGIL_TLS_CA_FILE", "VIGIL_TLS_KEY_FILE", "VIGIL_TLS_CERT_FILE")
# Without a port gRPC would ask 443, and of a URL it says something else.
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:\[\]]+):[0-9]{1,5}|(dns|ipv4|ipv6|unix|unix-abstract|xds):\S+")
_TOKEN = re.compile(r"[!-~]*")
# Calls that may be repeated: storage's are idempotent, ingest's client retries by itself.
_RETRY_UNAVAILABLE = {
    "methodConfig": [
        {
            "name": [
                {"service": f"vigil.storage.v1.{name}"} for name in ("FrameService", "ModelService", "RouteService")
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def connect(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel that finds its server again within seconds.

    Args:
        address: "HOST:PORT".
        credentials: For TLS. None: as VIGIL_TLS_CA_FILE says, with VIGIL_TLS_CERT_FILE and VIGIL_TLS_KEY_FILE as client
            certificate where they are set; plain text where it isn't.
    """
    credentials = credentials or _from_environment()
    options = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Pods that were replaced have other addresses; by itself gRPC asks for them again after 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.service_config", json.dumps(_RETRY_UNAVAILABLE)),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


class Connected:
    """A channel, from `async with` to its end; what every client begins with.

    Where the certificates that the environment names have changed, the next call goes over a channel made of the new
    ones, so that a process may live longer than its certificate.

    Args:
        address: "HOST:PORT".
        credentials: As for `connect`; given here they stay what they are.
        token: Sent as a bearer token.

    Raises:
        SettingError: Neither can be an address or a token.
    """

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None, token: str | None) -> None:
        if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
            raise SettingError(f"{address!r} is no HOST:PORT, such as localhost:50051")
        self._address = address
        self._credentials = credentials
        # The last one takes the calls; streams under way end on theirs.
        self._channels: list[grpc.aio.Channel] = []
        self._made_of: tuple[int, ...] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.metadata = metadata(token)

    async def __aenter__(self) -> Self:
        self._made_of = self._certificates()
        self._loop = asyncio.get_running_loop()
        self._channels = [connect(self._address, self._credentials)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        channels, self._channels = self._channels, []
        await asyncio.gather(*(channel.close() for channel in channels))

    @property
    def channel(self) -> grpc.aio.Channel:
        """The open channel."""
        if not self._channels:
            raise RuntimeError(f"use `async with {type(self).__name__}(...)`, and within it alone")
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(f"this {type(self).__name__} belongs to another event loop; open one in each")
        # What can't be read is in the middle of a rotation: what is loaded stays.
        with contextlib.suppress(OSError):
            if (found := self._certificates()) != self._made_of:
                self._channels.append(connect(self._address))
                self._made_of = found
        return self._channels[-1]

    def _certificates(self) -> tuple[int, ...]:
        """When each file was written."""
        names = () if self._credentials is not None else TLS_FILES
        return tuple(Path(os.environ[name]).stat().st_mtime_ns for name in names if os.environ.get(name))


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The call metadata that carries the token, without what a file has around it.

    Raises:
        SettingError: No header may hold it.
    """
    if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token := token.strip())):
        raise SettingError("a token is a word of printable ASCII; this one holds something else")
    return (("authorization", f"Bearer {token}"),) if token else ()


def _from_environment() -> grpc.ChannelCredentials | None:
    ca, key, certificate = (Path(os.environ[name]).read_bytes() if os.environ.get(name) else None for name in TLS_FILES)
    return grpc.ssl_channel_credentials(ca, key, certificate) if ca else None
