"""The search for frames, the same on every store."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from vigil_common.errors import NotFound
from vigil_common.store.ids import uuid7_time_us
from vigil_common.store.ports import FrameFilter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vigil_common.store.ports import FrameStore, StoredRecord

WINDOW_US = 120_000_000


async def find_frame(store: FrameStore, model: str, frame_id: str, camera: str | None) -> StoredRecord:
    """The record of a frame id: near a UUIDv7's own time first, then everywhere; see `FrameStore.find`."""
    everywhere = FrameFilter([f"{model}/{camera or '*'}"], equals={"frame_id": frame_id})
    near = uuid7_time_us(frame_id)
    windows = [everywhere]
    if near is not None:
        windows.insert(0, replace(everywhere, start_us=max(0, near - WINDOW_US), stop_us=near + WINDOW_US))
    for window in windows:
        async for record in store.query(window, limit=1):
            return record
    raise NotFound("UNKNOWN_FRAME", f"no frame {frame_id} of model {model} is stored")


def runs(times: Sequence[int], gap_us: int) -> Iterator[tuple[int, int]]:
    """First and last of each run of ascending times that are near each other; at least one time is needed."""
    start = times[0]
    for before, after in pairwise(times):
        if after - before > gap_us:
            yield start, before
            start = after
    yield start, times[-1]
