"""What a pair adds to the report: whole numbers only, so the order of pairs and where a step ends change nothing."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vigil_shadow import scale
from vigil_shadow.domain import Failed, Pair, Said

if TYPE_CHECKING:
    from numpy.typing import NDArray

MICRO = 1_000_000
# Differences of scores beyond this count as this: their sum must stay a whole number that Redis can hold.
MOST_APART = 100_000.0
# Small pictures are at most 64 pixels a side; what is far larger was not made by a worker of ours.
MAX_PICTURE_BYTES = 1 << 20
MAX_PICTURE_PIXELS = 1 << 16
OPAQUE = 128


@dataclass(slots=True)
class Tally:
    """Counts of a step.

    Attributes:
        adds: What to add to which field of the report.
        greatest: Fields that keep the greatest value.
        facts: Fields that take the latest value.
        joint: What to add to which cell "LIVE:CANDIDATE" of the joint histogram.
        disagreements: Pairs with two labels, with their severity.
        pairs: Every pair that both versions judged.
    """

    adds: Counter[str] = field(default_factory=Counter)
    greatest: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    joint: Counter[str] = field(default_factory=Counter)
    disagreements: list[tuple[Pair, float]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    _last: tuple[float, float] | None = None

    def close(self) -> None:
        """Note what only the last pair tells."""
        if self._last is not None:
            self.facts["live_threshold_used"], self.facts["candidate_threshold_used"] = map(repr, self._last)

    def add(self, pair: Pair) -> None:
        """Count a pair."""
        live, candidate = pair.live, pair.candidate
        if isinstance(live, Failed) or isinstance(candidate, Failed):
            both = isinstance(live, Failed) and isinstance(candidate, Failed)
            one = "live_failed" if isinstance(live, Failed) else "candidate_failed"
            self.adds["both_failed" if both else one] += 1
            return
        self.pairs.append(pair)
        adds = self.adds
        adds["frames"] += 1
        if live.anomalous:
            adds["live_anomalous"] += 1
        if candidate.anomalous:
            adds["candidate_anomalous"] += 1
        if live.anomalous != candidate.anomalous:
            adds["new_alarms" if candidate.anomalous else "new_misses"] += 1
            self.disagreements.append((pair, severity(live, candidate)))
        difference = round(max(-MOST_APART, min(MOST_APART, candidate.score - live.score)) * MICRO)
        adds["difference_micro"] += difference
        adds["difference_abs_micro"] += abs(difference)
        adds[f"difference:{scale.share_bin(abs(difference) / MICRO)}"] += 1
        if abs(difference) > self.greatest.get("difference_max_micro", -1):
            self.greatest["difference_max_micro"] = abs(difference)
        self._last = live.threshold, candidate.threshold
        rows = scale.cell_of(live.score, live.threshold, anomalous=live.anomalous)
        columns = scale.cell_of(candidate.score, candidate.threshold, anomalous=candidate.anomalous)
        self.joint[f"{rows}:{columns}"] += 1
        if live.inference_us and candidate.inference_us:
            adds[f"live_time:{scale.time_bin(live.inference_us)}"] += 1
            adds[f"candidate_time:{scale.time_bin(candidate.inference_us)}"] += 1
            adds[f"ratio:{scale.ratio_bin(candidate.inference_us / live.inference_us)}"] += 1
        if (live.map and candidate.map) or (live.mask and candidate.mask):
            self._pictures(live, candidate)

    def _pictures(self, live: Said, candidate: Said) -> None:
        try:
            if live.map and candidate.map:
                first, second = self._both(live.map, candidate.map)
                distance = float(np.abs(first.astype(np.int16) - second).mean()) / 255
                self.adds["maps"] += 1
                self.adds[f"map:{scale.share_bin(distance)}"] += 1
            if live.mask and candidate.mask:
                one, other = (plane >= OPAQUE for plane in self._both(live.mask, candidate.mask))
                union = int((one | other).sum())
                if union:
                    self.adds["masks"] += 1
                    self.adds[f"iou:{scale.share_bin(int((one & other).sum()) / union)}"] += 1
        except (OSError, ValueError, SyntaxError):  # what Pillow raises of broken files
            self.adds["pictures_unreadable"] += 1

    def _both(self, live: bytes, candidate: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both pictures in the size of live's."""
        first, second = _open(live), _open(candidate)
        if second.size != first.size:
            self.adds["pictures_resized"] += 1
            second = second.resize(first.size, Image.Resampling.BOX)
        return np.asarray(first), np.asarray(second)


def _open(data: bytes) -> Image.Image:
    if len(data) > MAX_PICTURE_BYTES:
        raise ValueError("the picture is larger than any of ours")
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if math.prod(image.size) > MAX_PICTURE_PIXELS:
        raise ValueError("the picture is larger than any of ours")
    return image if image.mode == "L" else image.convert("L")


def severity(live: Said, candidate: Said) -> float:
    """How far apart two scores are, each seen from its own threshold; 0 to 1."""
    places = (scale.position(said.score, said.threshold) for said in (live, candidate))
    first, second = places
    return abs(first - second)
