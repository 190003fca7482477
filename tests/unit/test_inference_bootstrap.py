"""How much a worker takes on at a time."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from vigil_inference import bootstrap

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("share", "expected"),
    [("max 100000", 4), ("100000 100000", 1), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_worker_counts_the_cpus_it_may_use_and_no_others(
    share: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(share)
    monkeypatch.setattr(bootstrap, "CPU_SHARE", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    assert bootstrap.cpus() == expected


def test_without_control_groups_all_it_may_run_on_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CPU_SHARE", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert bootstrap.cpus() == 1


@pytest.mark.parametrize(
    ("engine", "run_s", "expected"),
    [("onnxruntime", 0.0001, 8), ("onnxruntime", 0.005, 6), ("onnxruntime", 0.02, 1), ("openvino", 0.0001, 1)],
)
def test_only_a_quick_model_takes_several_images_in_one_run(engine: str, run_s: float, expected: int) -> None:
    model: Any = SimpleNamespace(engine=SimpleNamespace(name=engine), proven=SimpleNamespace(run_s=run_s))
    assert bootstrap.usual_batch_size(model) == expected
