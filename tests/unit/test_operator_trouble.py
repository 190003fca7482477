"""What the operator makes of what it can't do: of what Kubernetes refuses, and of what another operator decides."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest
from typer.testing import CliRunner
from vigil_cli import rollout
from vigil_cli.main import app
from vigil_common.errors import Unavailable
from vigil_common.streams.ports import Live
from vigil_operator import handlers, metrics
from vigil_operator.observed import REQUEST_ANNOTATION, Problem
from vigil_operator.phases import Phase
from vigil_operator.resource import resource_of

from tests.support.rollout import MODEL, World, digest_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vigil_operator.status import Status

WHY = "quantities must match the regular expression"
ROUNDS = 5


async def rounds(world: World) -> int:
    """How often the status is written while nothing happens."""
    before = world.writes
    for _ in range(ROUNDS):
        await world.settle(1)
    return world.writes - before


async def test_a_candidate_whose_workers_kubernetes_refuses_fails_by_that_and_live_stays() -> None:
    world = World(published=[1, 2])
    await world.settle()
    world.refused[2] = WHY
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure is not None
    assert (world.status.last_failure.reason, WHY in world.status.last_failure.message) == ("Refused", True)
    assert world.condition("Synced") == ("True", "Synced")
    assert await rounds(world) == 0


async def test_a_candidate_waits_for_room_in_a_quota_and_fails_by_it_where_none_comes_in_time() -> None:
    world = World(published=[1, 2, 3])
    await world.settle()
    world.full = {2: "compute", 3: "compute"}
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, world.wake_after_s) == (Phase.VERIFYING, 1.0)
    assert world.status.candidate is not None
    assert world.status.candidate.message == "QuotaExceeded: exceeded quota: compute"
    assert await rounds(world) == 0
    del world.full[2]
    await world.settle(1)
    assert await world.live() == 2
    world.apply(spec_of(3, rollout={"verifyTimeout": "5m"}))
    await world.settle(1)
    await world.settle(301)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 2)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == "QuotaExceeded"


async def test_what_is_refused_of_live_is_said_once_and_over_once_it_is_done() -> None:
    world = World()
    await world.settle()
    world.refused[1] = WHY
    await world.settle(1)
    message = next(one.message for one in world.status.conditions if one.type == "Ready")
    assert WHY in message
    assert await rounds(world) == 0
    world.refused.clear()
    await world.settle(1)
    message = next(one.message for one in world.status.conditions if one.type == "Ready")
    assert WHY not in message


async def test_what_goes_on_failing_is_said_without_a_break() -> None:
    world = World()
    await world.settle()
    world.name_taken = True
    await world.settle(1)
    assert world.condition("Synced") == ("False", "NameTaken")
    assert await rounds(world) == 0
    world.name_taken = False
    await world.settle(1)
    assert world.condition("Synced") == ("True", "Synced")


@pytest.mark.parametrize(
    ("namespaces", "decides", "taken"),
    [
        (("default",), "elsewhere/solar", True),
        (("default", "elsewhere"), "elsewhere/solar", False),  # deleted while the table was away
        ((), "elsewhere/solar", False),
        (("default",), "", False),
    ],
)
async def test_a_model_that_another_operators_resource_has_is_not_taken_from_it(
    namespaces: tuple[str, ...], decides: str, *, taken: bool
) -> None:
    world = World(published=[1, 2], namespaces=namespaces, spec=spec_of(2))
    await world.streams.routing.write(MODEL, live=Live(1, digest_of(1), None), candidate=None, managed_by=decides)
    await world.settle()
    route = await world.route()
    assert route is not None
    if taken:
        assert (route.managed_by, route.live.version, world.workers) == (decides, 1, {})
        for kind in ("Synced", "Ready", "Promoted"):
            assert world.condition(kind) == ("False", "ModelTaken")
    else:
        assert route.managed_by == "default/solar"


def test_a_rollback_that_failed_is_no_success_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(published=[1, 2])

    async def second_version() -> None:
        await world.settle()
        world.apply(spec_of(2, rollout={"strategy": "Immediate", "rollbackWindow": "0s"}))
        await world.settle()
        await world.settle(5)

    class Where:
        def get(self, name: str) -> dict[str, Any]:
            return {"metadata": {"name": name}, "spec": world.spec, "status": world.status.to_json()}

        def patch(self, _: str, patch: Mapping[str, Any]) -> None:
            world.request = patch["metadata"]["annotations"][REQUEST_ANNOTATION]
            asyncio.run(world.settle(1))

    asyncio.run(second_version())
    world.broken[1] = Problem("ImagePullFailed", "the image is gone", final=True)
    monkeypatch.setattr(rollout, "_where", Where())
    answer = CliRunner().invoke(app, ["rollback", "solar"])
    assert answer.exit_code == 1
    assert "the image is gone" in answer.output
    assert (world.status.history[0].version, world.status.history[0].outcome) == (1, "RollbackFailed")


def test_failures_are_counted_from_zero_on_so_that_an_alert_sees_the_first() -> None:
    (counted,) = metrics.TRANSITIONS.collect()
    assert {sample.labels["phase"] for sample in counted.samples} >= {phase.value for phase in Phase}


def test_null_is_as_good_as_absent_wherever_a_resource_is_read() -> None:
    spec = spec_of(1) | {"threshold": None, "rollout": {"gates": {"maxLatencyRatio": None}}}
    body = {"metadata": {"name": "solar", "namespace": "default", "uid": "1"}, "spec": spec}
    assert resource_of(body).spec.rollout.gates.max_latency_ratio == 1.5


async def test_what_is_wrong_with_a_spec_is_said_as_soon_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "RETRY_S", 0.0)
    since = datetime(2026, 1, 1, tzinfo=UTC)
    written: list[Status] = []
    away = [True]

    class Notes:
        async def write_status(self, _: object, status: Status) -> None:
            if away:
                away.pop()
                raise Unavailable("CLUSTER_UNAVAILABLE", "the API server does not answer")
            written.append(status)

    later = since + timedelta(days=1)
    loops = handlers.Loops(*(cast("Any", made) for made in (None, None, Notes(), None, lambda: later)))
    before = {"type": "Synced", "status": "False", "reason": "Refused", "lastTransitionTime": since.isoformat()}
    body: dict[str, Any] = {
        "metadata": {"name": "cells", "namespace": "line-1", "uid": "1", "creationTimestamp": "", "generation": 2},
        "spec": {"source": {"model": MODEL}},
        "status": {"conditions": [before]},
    }
    loop = asyncio.create_task(loops.run(body, lambda: bool(written)))
    async with asyncio.timeout(5):
        while not written:
            await asyncio.sleep(0.01)
    loops.wake(("line-1", "cells"))
    await loop
    (said,) = written[0].conditions
    assert (said.reason, said.observed_generation) == ("InvalidSpec", 2)
    # It was no better before.
    assert said.last_transition_time == since
