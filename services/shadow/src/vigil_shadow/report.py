"""A report's numbers, from its counts; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from vigil_common.evidence import ReportNumbers, median_bounds

from vigil_shadow import scale

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Report:
    """Counts of one run, and what follows from them.

    Attributes:
        model: The model's name.
        run: A comparison's number, or "replay-ID".
        fields: As the report store has them.
        joint: Cells of the joint histogram.
        candidate_right: Reviewed disagreements in which people said the candidate is right.
        live_right: The others that people decided.
    """

    model: str
    run: str
    fields: Mapping[str, str]
    joint: Mapping[str, int] = field(default_factory=dict)
    candidate_right: int = 0
    live_right: int = 0

    def count(self, name: str) -> int:
        """A field that counts; 0 where nothing has."""
        return int(self.fields.get(name) or 0)

    def text(self, name: str) -> str:
        """A field that describes."""
        return self.fields.get(name, "")

    def threshold(self, side: str) -> float:
        """The threshold that decided labels, as the verdicts said; 0 before the first."""
        return float(self.fields.get(f"{side}_threshold_used") or 0)

    @property
    def elapsed_s(self) -> float:
        """For how long verdicts came."""
        return self.count("compared_ms") / 1000

    @cached_property
    def _histograms(self) -> dict[str, dict[int, int]]:
        found: dict[str, dict[int, int]] = {}
        for name, value in self.fields.items():
            kind, colon, index = name.partition(":")
            if colon:
                found.setdefault(kind, {})[int(index)] = int(value)
        return found

    def _quantile(self, kind: str, part: float) -> int | None:
        """The bin that holds this part of what was counted; None where nothing was."""
        bins = sorted(self._histograms.get(kind, {}).items())
        total = sum(count for _, count in bins)
        rank = max(1, math.ceil(part * total))
        running = 0
        for index, count in bins:
            running += count
            if running >= rank:
                return index
        return None

    def share(self, kind: str, part: float) -> float:
        """A quantile of shares between 0 and 1; 0 where nothing was counted."""
        return scale.share_of(self._quantile(kind, part) or 0)

    def mean_share(self, kind: str) -> float:
        """The mean of shares, to 1/256; 0 where nothing was counted."""
        bins = self._histograms.get(kind, {})
        total = sum(bins.values())
        return sum(scale.share_of(index) * count for index, count in bins.items()) / total if total else 0.0

    def time_us(self, side: str, part: float) -> float | None:
        """A quantile of inference times; None where none was measured."""
        index = self._quantile(f"{side}_time", part)
        return None if index is None else scale.time_of(index)

    @cached_property
    def numbers(self) -> ReportNumbers:
        """What the gates look at."""
        names = ("frames", "live_anomalous", "new_alarms", "new_misses", "candidate_failed")
        counts = {name: self.count(name) for name in names}
        bins = sorted(self._histograms.get("ratio", {}).items())
        if not bins:
            return ReportNumbers(**counts, candidate_right=self.candidate_right, live_right=self.live_right)
        places = median_bounds(list(accumulate(count for _, count in bins)))
        ratio, low, high = (scale.ratio_of(bins[place][0]) for place in places)
        return ReportNumbers(
            **counts,
            latency_ratio=ratio,
            latency_ratio_low=low,
            latency_ratio_high=high,
            candidate_right=self.candidate_right,
            live_right=self.live_right,
        )

    @cached_property
    def _matrix(self) -> NDArray[np.int64]:
        """Frames by live's and the candidate's cell."""
        matrix = np.zeros((scale.CELLS, scale.CELLS), dtype=np.int64)
        for cell, count in self.joint.items():
            live, _, candidate = cell.partition(":")
            matrix[int(live), int(candidate)] = count
        return matrix

    @cached_property
    def kendall_tau(self) -> float | None:
        """Kendall's tau-b of both rankings, ties within a cell; None where one side gives all frames one score."""
        matrix = self._matrix
        total = int(matrix.sum())
        below = np.zeros((scale.CELLS + 1, scale.CELLS + 1), dtype=np.int64)
        below[1:, 1:] = matrix.cumsum(axis=0).cumsum(axis=1)
        # For each cell, the frames that are less in both, and those less in live and greater in the candidate.
        less = below[:-1, :-1]
        greater = below[:-1, -1:] - below[:-1, 1:]
        concordant, discordant = int((matrix * less).sum()), int((matrix * greater).sum())

        def untied(counts: NDArray[np.int64]) -> int:
            return total * (total - 1) // 2 - int((counts * (counts - 1) // 2).sum())

        scope = untied(matrix.sum(axis=1)) * untied(matrix.sum(axis=0))
        return (concordant - discordant) / math.sqrt(scope) if scope else None

    def flips_by_threshold(self) -> Iterator[tuple[float, int, int]]:
        """Thresholds of the candidate with the new alarms and new misses there would be; live's labels stand."""
        matrix = self._matrix
        normal, anomalous = matrix[: scale.HALF].sum(axis=0), matrix[scale.HALF :].sum(axis=0)
        alarms, misses = int(normal.sum()), 0
        for cell in range(scale.CELLS):
            if normal[cell] or anomalous[cell] or cell == scale.HALF:
                yield scale.score_at(cell / scale.CELLS, self.threshold("candidate")), alarms, misses
            alarms -= int(normal[cell])
            misses += int(anomalous[cell])

    def joint_scores(self) -> Iterator[tuple[float, float, int]]:
        """Scores in the middle of each cell, with its frames."""
        for cell, count in sorted(self.joint.items()):
            live, _, candidate = cell.partition(":")
            places = ((int(index) + 0.5) / scale.CELLS for index in (live, candidate))
            first, second = places
            yield (
                scale.score_at(first, self.threshold("live")),
                scale.score_at(second, self.threshold("candidate")),
                count,
            )
