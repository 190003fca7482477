"""What `make fuzz` starts from and what it once found, and a few hundred mutations of it, in the everyday tests."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.seeds import CORPUS, changed, seeds
from tests.fuzz.targets import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_comes_in_is_taken_or_refused_with_a_reason(target: str) -> None:
    pool, chance = seeds(target), random.Random(target)
    assert {"taken", "answered"} & {run(TARGETS[target], data) for data in pool}
    for _ in range(60):
        run(TARGETS[target], changed(target, pool, chance))


def test_every_kept_input_belongs_to_a_target() -> None:
    assert {path.parent.name for path in CORPUS.glob("*/*")} <= set(TARGETS)
