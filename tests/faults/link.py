"""A TCP connection's way between two parts that can be cut, stalled and slowed, on any machine and without root."""

from __future__ import annotations

import asyncio
import contextlib
import enum

from vigil_cli.local.process import free_port

CHUNK_BYTES = 1 << 16


class Mode(enum.Enum):
    """How the way is."""

    OPEN = "open"
    # Connections end, and none are taken.
    CUT = "cut"
    # Connections stay, and nothing passes: as behind a router that lost its power.
    STALLED = "stalled"
    # Everything passes, later.
    SLOW = "slow"


class Link:
    """One way.

    Args:
        name: For people.
        target: Where it leads, as "HOST:PORT".
    """

    def __init__(self, name: str, target: str) -> None:
        self.name = name
        self.port = free_port()
        self._target = target
        self._mode = Mode.OPEN
        self._delay_s = 0.0
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())

    @property
    def address(self) -> str:
        """Where its near end is."""
        return f"127.0.0.1:{self.port}"

    def set(self, mode: Mode, delay_s: float = 0.0) -> None:
        """Change how the way is."""
        self._mode, self._delay_s = mode, delay_s
        if mode is Mode.STALLED:
            self._flows.clear()
        else:
            self._flows.set()
        if mode is Mode.CUT:
            self._end_all()

    def lead_to(self, target: str) -> None:
        """Lead elsewhere from now on; connections to where it led end."""
        self._target = target
        self._end_all()

    async def close(self) -> None:
        """End everything."""
        await self._starting
        if self._server is not None:
            self._server.close()
        self._flows.set()
        self._end_all()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def _end_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode is Mode.CUT:
            writer.transport.abort()
            return
        host, _, port = self._target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        finally:
            for one in both:
                one.transport.abort()
            self._writers -= both

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._flows.wait()
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
