"""Scores of one graph on the scale of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Float = TypeVar("Float", bound=np.floating)


def moved(scores: NDArray[Float], threshold: float, onto: float) -> NDArray[Float]:
    """Scores stretched so that 0 and 1 stay where they are and the threshold comes to stand on another.

    Strictly rising, so what ranks higher still does; both thresholds lie between 0 and 1.
    """
    if threshold == onto:
        return scores
    below = scores * (onto / threshold)
    above = onto + (scores - threshold) * ((1 - onto) / (1 - threshold))
    return np.where(scores < threshold, below, above).astype(scores.dtype)
