"""The search for frames, the same on every store."""

from __future__ import annotations

import time
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
# Each look back reaches so many times as far as the one before: a dozen until there was no camera.
FURTHER = 4


async def find_frame(store: FrameStore, model: str, frame_id: str, camera: str | None) -> StoredRecord:
    """The latest record of a frame id; see `FrameStore.find`."""
    everywhere = FrameFilter([f"{model}/{camera or '*'}"], equals={"frame_id": frame_id})
    for start_us, stop_us in _windows(uuid7_time_us(frame_id)):
        found = None
        async for record in store.query(replace(everywhere, start_us=start_us, stop_us=stop_us), limit=2**31):
            found = record
        if found is not None:
            return found
    raise NotFound("UNKNOWN_FRAME", f"no frame {frame_id} of model {model} is stored")


def _windows(made_us: int | None) -> Iterator[tuple[int, int | None]]:
    """Where to look, first near the time that an id tells, then ever further back: what people ask for is recent."""
    if made_us is not None:
        yield max(0, made_us - WINDOW_US), made_us + WINDOW_US
    span_us, stop_us = WINDOW_US, None
    start_us = time.time_ns() // 1_000 - span_us
    while True:
        yield max(0, start_us), stop_us
        if start_us <= 0:
            return
        span_us *= FURTHER
        start_us, stop_us = start_us - span_us, start_us


def runs(times: Sequence[int], gap_us: int) -> Iterator[tuple[int, int]]:
    """First and last of each run of ascending times that are near each other; at least one time is needed."""
    start = times[0]
    for before, after in pairwise(times):
        if after - before > gap_us:
            yield start, before
            start = after
    yield start, times[-1]
