"""Storage's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

# result: written, existed, rejected (kept under another id or without its labels), dropped, vanished
FRAMES = Counter("vigil_storage_frames_total", "Frames by what became of them", ["model", "result"])
CONFIRMED = Counter("vigil_storage_confirmed_total", "Frames found again in the store and freed", ["model"])
UNCONFIRMED = Gauge("vigil_storage_unconfirmed_frames", "Frames written and not yet confirmed", ["model"])
WRITE_SECONDS = Histogram("vigil_storage_write_seconds", "One batch, retries included", ["model"])
