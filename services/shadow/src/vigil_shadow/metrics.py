"""Shadow's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

VERDICTS = Counter("vigil_shadow_verdicts_total", "Verdicts read, of live and candidate", ["model"])
FRAMES = Counter("vigil_shadow_frames_total", "Frames that both versions judged", ["model"])
# result: missing, unmatched, late, duplicate, foreign, lost, malformed
UNPAIRED = Counter("vigil_shadow_unpaired_total", "Verdicts that made no pair", ["model", "result"])
DISAGREEMENTS = Counter("vigil_shadow_disagreements_total", "Frames with two labels", ["model"])
STEP_SECONDS = Histogram(
    "vigil_shadow_step_seconds",
    "Pairing a batch and keeping it",
    ["model"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
)
OWNED = Gauge("vigil_shadow_owned", "Whether this process keeps the model's report", ["model"])
