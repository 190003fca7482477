"""Frames to send, from whatever gives them, without keeping answers waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from vigil_client.types import Frame


async def as_async(frames: AsyncIterable[Frame] | Iterable[Frame], *, ahead: int) -> AsyncIterator[Frame]:
    """Each frame of a source; one that may block, as a generator that waits for a camera, is read in a thread.

    Args:
        frames: The source; what it raises is raised here.
        ahead: How many frames the thread may have read that nobody has taken yet, 1 at least.
    """
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    elif isinstance(frames, Sequence):
        for frame in frames:
            yield frame
    else:
        async for frame in _read_in_thread(frames, ahead):
            yield frame


async def _read_in_thread(frames: Iterable[Frame], ahead: int) -> AsyncIterator[Frame]:
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[Frame | None] = asyncio.Queue()
    ended: asyncio.Future[None] = loop.create_future()
    free = threading.Semaphore(ahead)
    left = threading.Event()

    def end(error: BaseException | None) -> None:
        found.put_nowait(None)
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def read() -> None:
        error: BaseException | None = None
        try:
            for frame in frames:
                free.acquire()
                if left.is_set():
                    return
                loop.call_soon_threadsafe(found.put_nowait, frame)
        except BaseException as raised:  # noqa: BLE001 - the caller's
            error = raised
        loop.call_soon_threadsafe(end, error)

    def read_until_left() -> None:
        with suppress(RuntimeError):  # the loop may be closed by the time a camera has its next frame
            read()

    # Not one of the loop's own threads: a source may wait for as long as it likes, and there may be many.
    threading.Thread(target=read_until_left, name="vigil-source", daemon=True).start()
    try:
        while (frame := await found.get()) is not None:
            free.release()
            yield frame
        await ended
    finally:
        left.set()
        free.release()
        ended.cancel()
