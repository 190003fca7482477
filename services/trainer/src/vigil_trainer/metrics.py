"""How well scores and maps tell normal from anomalous, as the field measures it.

Image level: AUROC, the best F1 and its threshold (as Anomalib's F1AdaptiveThreshold), the confusion at any threshold.
Pixel level: AUROC, and PRO, the per-region overlap up to a false positive rate of 0.3 (Bergmann et al., "The MVTec
Anomaly Detection Dataset", 2021; Anomalib's AUPRO has the same limit).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.floating[Any]]

FPR_LIMIT = 0.3
# Pixel scores are counted in so many bins from 0 to 1: memory does not grow with the number of images.
BINS = 4096


@dataclass(frozen=True, slots=True)
class Confusion:
    """Images by what they are and what they were called."""

    true_anomalous: int
    false_anomalous: int
    true_normal: int
    false_normal: int

    @property
    def precision(self) -> float:
        """Of those called anomalous, the share that is; 0 where none was called so."""
        called = self.true_anomalous + self.false_anomalous
        return self.true_anomalous / called if called else 0.0

    @property
    def recall(self) -> float:
        """Of the anomalous, the share that was called so; 0 where there is none."""
        there = self.true_anomalous + self.false_normal
        return self.true_anomalous / there if there else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        wrong = self.false_anomalous + self.false_normal
        return 2 * self.true_anomalous / (2 * self.true_anomalous + wrong) if self.true_anomalous else 0.0


def auroc(normal: Scores, anomalous: Scores) -> float:
    """The share of pairs in which the anomalous one scores higher; ties count half."""
    order = np.sort(normal)
    below = np.searchsorted(order, anomalous, side="left")
    not_above = np.searchsorted(order, anomalous, side="right")
    return float((below + not_above).sum() / (2 * len(normal) * len(anomalous)))


def confusion(normal: Scores, anomalous: Scores, threshold: float) -> Confusion:
    """What becomes of both where scores at or over the threshold are called anomalous."""
    alarms, hits = int((normal >= threshold).sum()), int((anomalous >= threshold).sum())
    return Confusion(hits, alarms, len(normal) - alarms, len(anomalous) - hits)


def best_f1(normal: Scores, anomalous: Scores) -> tuple[float, float]:
    """The threshold with the highest F1, and that F1.

    It is the middle of the gap between two scores, as far from what is called normal as from what is called anomalous;
    of several gaps the lowest.
    """
    candidates = np.unique(np.concatenate([normal, anomalous]))
    hits = len(anomalous) - np.searchsorted(np.sort(anomalous), candidates, side="left")
    alarms = len(normal) - np.searchsorted(np.sort(normal), candidates, side="left")
    f1 = 2 * hits / (hits + alarms + len(anomalous))
    best = int(np.argmax(f1))
    lower = candidates[max(best - 1, 0)]
    return (float(lower) + float(candidates[best])) / 2, float(f1[best])


@dataclass(slots=True)
class PixelMetrics:
    """Counts the pixels of one image after another."""

    _normal: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    _anomalous: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    # Sum over regions of the share of their pixels in each bin.
    _regions: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.float64))
    _region_count: int = 0

    def add(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """Count an image: its map from 0 to 1, of any size, and where it is anomalous [H, W]."""
        if anomaly_map.shape != mask.shape:
            height, width = mask.shape
            picture = Image.fromarray(anomaly_map.astype(np.float32))
            anomaly_map = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
        bins = (np.clip(np.nan_to_num(anomaly_map), 0, 1) * (BINS - 1)).astype(np.int64)
        self._normal += np.bincount(bins[~mask], minlength=BINS)
        self._anomalous += np.bincount(bins[mask], minlength=BINS)
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        # Each pixel weighs as little as its region is large.
        regions = labels[mask]
        weights = 1 / np.bincount(regions, minlength=count + 1)[regions]
        self._regions += np.bincount(bins[mask], weights, minlength=BINS)
        self._region_count += count

    @property
    def auroc(self) -> float | None:
        """Over all pixels; None where they are all of one kind."""
        normal, anomalous = int(self._normal.sum()), int(self._anomalous.sum())
        if not normal or not anomalous:
            return None
        below = np.cumsum(self._normal) - self._normal
        return float((self._anomalous * (below + self._normal / 2)).sum() / (normal * anomalous))

    @property
    def pro(self) -> float | None:
        """Mean overlap of the regions, integrated up to FPR_LIMIT and divided by it; None as `auroc`."""
        if not self._region_count or not self._normal.sum():
            return None
        # From the highest threshold down, beginning where nothing is called anomalous.
        fpr = np.concatenate([[0.0], np.cumsum(self._normal[::-1]) / self._normal.sum()])
        overlap = np.concatenate([[0.0], np.cumsum(self._regions[::-1]) / self._region_count])
        at_limit = float(np.interp(FPR_LIMIT, fpr, overlap))
        inside = fpr < FPR_LIMIT
        x, y = np.append(fpr[inside], FPR_LIMIT), np.append(overlap[inside], at_limit)
        return float(np.trapezoid(y, x) / FPR_LIMIT)
