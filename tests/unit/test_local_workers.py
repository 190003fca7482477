"""Workers as processes: how often one has failed, and what stays of a resource that was deleted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from vigil_cli.local.operator import STEADY_S, LocalWorkers, _loop
from vigil_cli.local.resources import ResourceFiles
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Live
from vigil_operator.observed import Resource
from vigil_operator.spec import Spec

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_cli.local.stack import LocalStack

DIGEST = "sha256:" + "1" * 64
SPEC = Spec.model_validate({"source": {"model": "cells", "version": "1"}})
RESOURCE = Resource("cells", "default", "1-2-3", 1, SPEC, None, "")


class Stack:
    """A worker that runs or not."""

    runs = False
    launched = 0

    def __init__(self) -> None:
        self.told: list[str] = []

    def pid(self, _: str) -> int | None:
        return 1 if self.runs else None

    def say_that_it_ended(self, name: str) -> None:
        self.told.append(name)

    def tail(self, _: str) -> str:
        return "killed"

    async def ready(self, _: str) -> bool:
        return self.runs

    def launch_worker(self, *_: object, **__: object) -> None:
        self.launched += 1
        self.runs = True


async def test_a_worker_that_ran_for_long_has_not_failed_often() -> None:
    stack, now = Stack(), [0.0]
    workers = LocalWorkers(cast("LocalStack", stack), clock=lambda: now[0])

    async def step(seconds: float) -> bool | None:
        """Look as the operator does; whether there is a problem for good, None without one."""
        now[0] += seconds
        found = await workers.observe(RESOURCE, describe=None)
        await workers.ensure(RESOURCE, 1, DIGEST, SPEC.runtime.numerics)
        problems: list[Any] = [problem for workload in found.values() for problem in workload.problems]
        return problems[0].final if problems else None

    async def ended_after(seconds: float) -> bool | None:
        stack.runs = False
        said = await step(seconds)
        await step(10)  # past its pause
        return said

    await step(0)
    assert [await ended_after(1) for _ in range(4)] == [False, False, False, True]
    assert (stack.launched, len(stack.told)) == (5, 4)
    # An hour of work is a new start, and three more failures are needed.
    assert await ended_after(STEADY_S) is False
    assert [await ended_after(1) for _ in range(3)] == [False, False, True]


async def test_what_was_deleted_while_no_platform_ran_is_gone_with_the_next_one(tmp_path: Path) -> None:
    files, streams, stop = ResourceFiles(tmp_path), MemoryStreams(), asyncio.Event()
    files.apply(
        "{apiVersion: vigil.dev/v1alpha1, kind: AnomalyModel, metadata: {name: line},"
        ' spec: {source: {model: cells, version: "1"}}}'
    )
    files.write_status("line", {"phase": "Live"})
    # Another's, and a person's own.
    for model, decides in (("cells", "local/line"), ("plates", "factory/line"), ("tubes", "")):
        await streams.routing.write(model, live=Live(1, DIGEST, None), managed_by=decides)
    files.delete("line")

    class Stopping(Stack):
        def note_live(self, model: str, name: str | None) -> None:
            assert (model, name) == ("cells", None)
            stop.set()

    workers = LocalWorkers(cast("LocalStack", Stopping()))
    async with asyncio.timeout(5):
        await _loop(files, workers, cast("Any", None), cast("Any", streams), stop)
    assert [await streams.routing.get(model) is None for model in ("cells", "plates", "tubes")] == [True, False, False]
    assert not list((tmp_path / "resources").iterdir())
