"""A network link between two servers that a test can cut."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self


class Link:
    """Passes connections on to a port of this machine, until it is cut; then it refuses them, until it is mended.

    Attributes:
        target: The port; another one is for new connections, as behind a Service whose endpoint changed.

    Args:
        port: The port.
        pause_s: After each 64 KiB, either way: a slow line.
    """

    def __init__(self, port: int, *, pause_s: float = 0.0) -> None:
        self.target = port
        self._pause_s = pause_s
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """This end."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def mend(self) -> None:
        """Pass connections on again, on the same port."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def cut(self) -> None:
        """End every connection and take no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()

    def lose(self) -> None:
        """Let nothing more through what is open and end nothing, as where a node vanishes; the next ones pass."""
        for task in self._tasks:
            task.cancel()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._open |= {writer, back}
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer), return_exceptions=True)
            for end in (writer, back):
                end.close()
                self._open.discard(end)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
            if self._pause_s:
                await asyncio.sleep(self._pause_s)
        writer.close()
