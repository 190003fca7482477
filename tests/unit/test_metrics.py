"""The metrics agree with their definitions, computed the slow way."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vigil_trainer.metrics import PixelMetrics, auroc, best_f1, confusion

SCORES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=30).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order(normal: np.ndarray, anomalous: np.ndarray) -> None:
    pairs = [(a > n) + 0.5 * (a == n) for a in anomalous for n in normal]
    assert auroc(normal, anomalous) == pytest.approx(sum(pairs) / len(pairs))


@given(SCORES, SCORES)
def test_no_threshold_has_a_better_f1_than_the_best(normal: np.ndarray, anomalous: np.ndarray) -> None:
    threshold, f1 = best_f1(normal, anomalous)
    assert confusion(normal, anomalous, threshold).f1 == pytest.approx(f1)
    for other in {*normal.tolist(), *anomalous.tolist()}:
        assert confusion(normal, anomalous, other).f1 <= f1 + 1e-9


def test_the_best_threshold_stands_in_the_middle_between_what_it_tells_apart() -> None:
    assert best_f1(np.array([0.1, 0.2]), np.array([0.8, 0.9])) == pytest.approx((0.5, 1.0))
    assert best_f1(np.array([0.5]), np.array([0.3])) == pytest.approx((0.3, 2 / 3))


def test_a_confusion_counts_what_is_at_the_threshold_as_anomalous() -> None:
    found = confusion(np.array([0.1, 0.5], dtype=np.float32), np.array([0.5, 0.2, 0.9], dtype=np.float32), 0.5)
    assert (found.true_anomalous, found.false_anomalous, found.true_normal, found.false_normal) == (2, 1, 1, 1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)


def test_a_perfect_map_has_pixel_auroc_and_pro_of_one_and_a_blind_one_half_and_the_chance_overlap() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[2:12, 2:12] = mask[30:33, 30:33] = True
    perfect, blind = PixelMetrics(), PixelMetrics()
    perfect.add(mask.astype(np.float32), mask)
    blind.add(np.full(mask.shape, 0.5, dtype=np.float32), mask)
    assert perfect.auroc == pytest.approx(1.0)
    assert perfect.pro == pytest.approx(1.0)
    assert blind.auroc == pytest.approx(0.5)
    # Overlap grows with the false positive rate along the diagonal: half of the limit on average.
    assert blind.pro == pytest.approx(0.15)


def test_pro_weighs_a_small_region_as_much_as_a_large_one() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[2:22, 2:22] = mask[30:32, 30:32] = True
    only_large = np.zeros(mask.shape, dtype=np.float32)
    only_large[2:22, 2:22] = 1.0
    metrics = PixelMetrics()
    metrics.add(only_large, mask)
    assert metrics.auroc is not None
    assert metrics.auroc > 0.98
    assert metrics.pro is not None
    assert 0.5 <= metrics.pro <= 0.66


def test_without_anomalous_pixels_there_is_nothing_to_measure() -> None:
    metrics = PixelMetrics()
    metrics.add(np.zeros((4, 4), dtype=np.float32), np.zeros((4, 4), dtype=bool))
    assert metrics.auroc is None
    assert metrics.pro is None


def test_thousands_of_specks_are_counted_as_quickly_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(wraps=np.bincount)
    monkeypatch.setattr(np, "bincount", counted)
    mask = np.zeros((200, 200), dtype=bool)
    mask[::2, ::2] = True
    found = PixelMetrics()
    found.add(mask.astype(np.float32), mask)
    assert found.pro == pytest.approx(1.0)
    assert counted.call_count < 10
