"""A channel that shows and trusts the certificates that are in its files now.

gRPC gives Python no client credentials that read files again, as it does for servers: where files changed, the next
call goes over a channel made anew.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import grpc

from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# The old channel takes its last calls for so long, and waits for those under way.
RETIRE_AFTER_S = 1.0
RETIRE_WITHIN_S = 3600.0

log = get_logger()


class ReloadingChannel(grpc.aio.Channel):  # type: ignore[misc, unused-ignore]
    """A channel made of files.

    Args:
        files: What to look at before each call.
        make: Reads them.
    """

    def __init__(self, files: Sequence[Path], make: Callable[[], grpc.aio.Channel]) -> None:
        self._files = files
        self._make = make
        self._seen = self._changed()
        self._channel = make()
        self._retired: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def _changed(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._files)

    def current(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        try:
            changed = self._changed()
            if changed == self._seen:
                return self._channel
            channel = self._make()
        except OSError as error:  # in the middle of a rotation: what is loaded stays
            log.warning("certificate_unreadable", detail=str(error))
            return self._channel
        log.info("certificate_reloaded", file=str(self._files[0]))
        retiring = asyncio.create_task(_retire(self._channel))
        self._retired[retiring] = self._channel
        retiring.add_done_callback(self._retired.pop)
        self._seen, self._channel = changed, channel
        return channel

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """As of the channel that is current at each call."""
        return _Method(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """Likewise."""
        return _Method(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """Likewise."""
        return _Method(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """Likewise."""
        return _Method(self, "stream_stream", arguments, options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's
        """The current channel's."""
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """The current channel's."""
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """The current channel's."""
        await self.current().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close it, and those before it."""
        retired = dict(self._retired)
        for task in retired:
            task.cancel()
        await asyncio.gather(*(channel.close(grace) for channel in (self._channel, *retired.values())))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Method:
    """A method of whichever channel is current."""

    def __init__(self, channel: ReloadingChannel, kind: str, arguments: tuple[Any, ...], options: Any) -> None:
        self._of = channel
        self._kind, self._arguments, self._options = kind, arguments, options
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        channel = self._of.current()
        if channel is not self._channel:
            self._channel = channel
            self._call = getattr(channel, self._kind)(*self._arguments, **self._options)
        return self._call(*arguments, **options)


async def _retire(channel: grpc.aio.Channel) -> None:
    await asyncio.sleep(RETIRE_AFTER_S)  # a call with interceptors begins a moment after it was made
    await channel.close(RETIRE_WITHIN_S)
