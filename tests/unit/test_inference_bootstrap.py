"""How much a worker takes on at a time."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from vigil_inference import bootstrap
from vigil_inference.config import Settings

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


@pytest.mark.parametrize(
    ("frozen", "asked", "takes", "expected"),
    [
        (None, 0, True, 8),
        (None, 4, True, 4),
        (None, 4, False, 1),
        (None, 0, False, 1),
        (2, 4, False, 2),
        (1, 0, True, 1),
    ],
)
def test_no_run_has_more_images_than_the_graph_takes(
    frozen: int | None,
    asked: int,
    takes: bool,  # noqa: FBT001
    expected: int,
) -> None:
    model: Any = SimpleNamespace(
        engine=SimpleNamespace(name="onnxruntime"),
        proven=SimpleNamespace(run_s=0.0001),
        manifest=SimpleNamespace(fixed_batch=frozen),
        takes=lambda _: takes,
    )
    assert bootstrap.batch_size_of(model, asked) == expected


async def test_a_worker_that_waits_for_storage_ends_when_it_is_asked_to() -> None:
    settings = Settings(model="cells", storage_address="127.0.0.1:1", inference_bind="127.0.0.1:0")
    stop = asyncio.Event()
    serving = asyncio.create_task(bootstrap.serve(settings, stop))
    await asyncio.sleep(0.1)
    assert not serving.done()
    stop.set()
    await asyncio.wait_for(serving, 5)
