"""Bins of fixed histograms: a million frames need no more room than a thousand, and no count is ever rounded away.

Scores of two models may have any two scales, so each is placed by its own version's threshold: `CELLS` cells, the
threshold in the middle, finest there and coarser far from it. A score of a model normalised as Anomalib does it (0 to
1, threshold 0.5) is told apart to 1/512 near the threshold and to 1/128 at the ends.
"""

from __future__ import annotations

import math

CELLS = 512
HALF = CELLS // 2
# Of shares between 0 and 1: score differences up to there, map distances, overlaps.
SHARES = 256
# Eight bins to an octave of microseconds; ratios of two times have 32, from 1/256 to 256.
TIMES_PER_OCTAVE = 8
RATIOS_PER_OCTAVE = 32
RATIO_OCTAVES = 8


def position(score: float, threshold: float) -> float:
    """Where a score stands between 0 and 1, its threshold at one half."""
    distance = score - threshold
    scale = abs(threshold) or 1.0
    return 0.5 + 0.5 * distance / (abs(distance) + scale)


def cell_of(score: float, threshold: float, *, anomalous: bool) -> int:
    """The cell of a score, on the side of the middle that its label says, however it was rounded on its way."""
    cell = min(CELLS - 1, int(position(score, threshold) * CELLS))
    return max(cell, HALF) if anomalous else min(cell, HALF - 1)


def score_at(place: float, threshold: float) -> float:
    """The score at a position: the inverse of `position`; the ends stand for scores without bound."""
    scale = abs(threshold) or 1.0
    share = min(max(2 * place - 1, -1 + 1 / CELLS), 1 - 1 / CELLS)
    return threshold + scale * share / (1 - abs(share))


def share_bin(share: float) -> int:
    """The bin of a share, rounded up; past 1, as differences of scores of any scale are, of as many as ratios have."""
    if share > 1:
        return SHARES + math.ceil(math.log2(share) * RATIOS_PER_OCTAVE)
    return max(0, math.ceil(share * SHARES))


def share_of(index: int) -> float:
    """The greatest share of a bin."""
    return index / SHARES if index <= SHARES else float(2 ** ((index - SHARES) / RATIOS_PER_OCTAVE))


def time_bin(time_us: int) -> int:
    """The bin of a time."""
    return round(math.log2(max(1, time_us)) * TIMES_PER_OCTAVE)


def time_of(index: int) -> float:
    """Microseconds in the middle of a bin."""
    return float(2 ** (index / TIMES_PER_OCTAVE))


def ratio_bin(ratio: float) -> int:
    """The bin of a ratio over 0, rounded up, from 0 on."""
    octaves = min(RATIO_OCTAVES, max(-RATIO_OCTAVES, math.log2(ratio)))
    return math.ceil((octaves + RATIO_OCTAVES) * RATIOS_PER_OCTAVE)


def ratio_of(index: int) -> float:
    """The greatest ratio of a bin."""
    return float(2 ** (index / RATIOS_PER_OCTAVE - RATIO_OCTAVES))
