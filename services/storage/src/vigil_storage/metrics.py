"""Storage's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

# result: written, existed, rejected (kept under another id or without its labels), dropped, vanished
FRAMES = Counter("vigil_storage_frames_total", "Frames by what became of them", ["model", "result"])
CONFIRMED = Counter("vigil_storage_confirmed_total", "Frames found again in the store and freed", ["model"])
UNCONFIRMED = Gauge("vigil_storage_unconfirmed_frames", "Frames written and not yet confirmed", ["model"])
WRITE_SECONDS = Histogram("vigil_storage_write_seconds", "One batch, retries included", ["model"])

# result: labelled, no_frame (never stored, or dropped by retention), refused
COMPARISONS = Counter("vigil_storage_comparisons_total", "Comparisons by what became of them", ["model", "result"])

ANNOTATIONS = Counter("vigil_storage_annotations_total", "What people said and is known to be kept", ["model"])
REFUSED_ANNOTATIONS = Counter(
    "vigil_storage_refused_annotations_total", "What people said and the store does not take", ["model"]
)

# why: sample (never stored), quota (pushed out by newer ones)
DROPPED = Counter("vigil_storage_dropped_frames_total", "Normal frames that are not kept", ["model", "why"])

# Of each model's queue in Redis; every replica tells the same.
QUEUE_FRAMES = Gauge("vigil_queue_frames", "Frames in the queue", ["model"])
QUEUE_BYTES = Gauge("vigil_queue_image_bytes", "Their bytes, of the queue's budget", ["model"])
QUEUE_UNJUDGED = Gauge("vigil_queue_unjudged_frames", "Frames that live has yet to judge", ["model"])
QUEUE_UNSTORED = Gauge("vigil_queue_unstored_frames", "Frames judged and not yet known to be kept", ["model"])
QUEUE_DEAD = Gauge("vigil_queue_dead_frames", "Frames given up on", ["model"])
