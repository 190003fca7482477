from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vigil_common.errors import Unavailable
from vigil_operator.effects import RESYNC_S
from vigil_operator.observed import Description, Problem
from vigil_operator.phases import TRANSITIONS, Event, NotAllowed, Phase, after

from tests.support.rollout import BAD, FEW, GOOD, MODEL, Cut, World, digest_of, spec_of

if TYPE_CHECKING:
    from vigil_common.evidence import ReportNumbers

MANUAL = {"rollout": {"approval": "Manual"}}
BF16 = {"runtime": {"precision": "bf16"}}


async def live_v1(**more: Any) -> World:
    """Version 1 is live, version 2 is published."""
    world = World(spec=spec_of(1, **more))
    await world.settle()
    assert await world.live() == 1
    assert world.status.phase is Phase.LIVE
    world.published = [1, 2]
    return world


async def shadowing(**more: Any) -> World:
    """Version 2 is compared with version 1; its evidence is too little."""
    world = await live_v1(**more)
    world.verdicts[2] = FEW
    world.apply(spec_of(2, **more))
    await world.settle()
    assert world.status.phase is Phase.SHADOWING
    return world


async def refused(*_: Any, **__: Any) -> Any:
    """Nothing is written."""
    raise Unavailable("ROUTING_UNAVAILABLE", "routing takes nothing")


# --- the way of a version


async def test_the_first_version_becomes_live_once_its_workers_are_proven() -> None:
    world = World()
    world.broken[1] = Problem("ContainerCreating", "not yet")
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.VERIFYING, None)
    world.broken.clear()
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 1)
    assert world.condition("Promoted") == ("True", "Promoted")
    assert world.condition("Ready") == ("True", "Serving")
    assert [event.reason for event in world.events] == ["Verifying", "Promoting", "Promoted"]
    assert world.wake_after_s == RESYNC_S


async def test_a_better_version_is_compared_and_then_replaces_live_in_one_write() -> None:
    world = await live_v1()
    world.verdicts[2] = FEW
    world.apply(spec_of(2))
    await world.settle()
    route = await world.route()
    assert route is not None
    assert route.candidate is not None
    assert (route.live.version, route.candidate.version, world.status.phase) == (1, 2, Phase.SHADOWING)
    assert world.condition("Promoted")[0] == "False"
    world.verdicts[2] = GOOD
    await world.settle(1)
    route = await world.route()
    assert route is not None
    assert (route.live.version, route.candidate, world.status.phase) == (2, None, Phase.LIVE)
    assert world.routes_seen == [digest_of(1), digest_of(1), digest_of(2)]
    assert world.status.previous is not None
    assert digest_of(1) in world.workers, "the version before stays warm"
    await world.settle(3601)
    assert set(world.workers) == {digest_of(2)}
    assert [(entry.version, entry.outcome) for entry in world.status.history] == [(2, "Promoted"), (1, "Promoted")]


async def test_a_version_whose_gates_fail_never_becomes_live() -> None:
    world = await shadowing()
    world.verdicts[2] = BAD
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == "GateFailed"
    assert "frames changed their label" in world.status.last_failure.message
    assert set(world.workers) == {digest_of(1)}
    assert (await world.route()).candidate is None  # type: ignore[union-attr]
    await world.settle(1000)
    assert world.status.phase is Phase.FAILED, "it is not tried again by itself"


@pytest.mark.parametrize("verdict", [GOOD, BAD])
async def test_an_earlier_comparison_of_the_same_pair_decides_nothing(verdict: ReportNumbers) -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    await world.settle()
    world.ask("rollback")
    await world.settle(1)
    assert world.report is not None
    world.report = replace(world.report, numbers=verdict)
    world.verdicts[2] = FEW
    world.ask("retry")
    write, world.streams.routing.write = world.streams.routing.write, refused  # type: ignore[method-assign]
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.SHADOWING, 1)
    assert world.status.shadow is None
    world.streams.routing.write = write  # type: ignore[method-assign]
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.SHADOWING, 1)
    assert world.status.shadow is not None
    assert world.status.shadow.frames == FEW.frames


async def test_another_threshold_begins_another_comparison_and_what_was_compared_before_decides_nothing() -> None:
    world = await shadowing(**MANUAL)
    world.verdicts[2] = GOOD
    await world.settle(1)
    assert world.status.phase is Phase.AWAITING_APPROVAL
    world.verdicts[2] = FEW
    world.apply(spec_of(2, **MANUAL, threshold=0.9))
    write, world.streams.routing.write = world.streams.routing.write, refused  # type: ignore[method-assign]
    await world.settle(100_000)
    assert (world.status.phase, world.status.shadow) == (Phase.SHADOWING, None)
    world.ask("promote", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.SHADOWING, 1)
    assert "gates have not passed" in world.status.last_request_refused
    world.streams.routing.write = write  # type: ignore[method-assign]
    world.verdicts[2] = GOOD
    await world.settle(1)
    assert world.status.phase is Phase.AWAITING_APPROVAL


async def test_too_little_evidence_holds_after_the_timeout_and_never_passes() -> None:
    world = await shadowing()
    await world.settle(86_401)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    world.verdicts[2] = GOOD
    await world.settle(10)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    world.ask("promote", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_the_route_says_who_decides_from_the_first_write_on_and_where_it_did_not_before() -> None:
    world = await live_v1()
    route = await world.streams.routing.get(MODEL)
    assert route is not None
    assert route.managed_by == "default/solar"
    await world.streams.routing.write(MODEL, live=route.live)
    await world.settle()
    assert await world.streams.routing.get(MODEL) == replace(route, generation=route.generation + 2)


async def test_what_is_kept_of_normal_frames_is_there_before_the_route_and_follows_the_spec() -> None:
    world = World(spec=spec_of(1, retention={"normal": {"keepFraction": 0.05}}))
    kept_at_each_write = []
    write = world.streams.routing.write

    async def noted(model: str, **roles: Any) -> Any:
        kept_at_each_write.append(await world.streams.routing.kept_fraction(model))
        return await write(model, **roles)

    world.streams.routing.write = noted  # type: ignore[method-assign]
    await world.settle()
    assert kept_at_each_write == [0.05]
    world.apply(spec_of(1, retention={"normal": {"keepFraction": 0.2}}))
    await world.settle()
    assert await world.streams.routing.kept_fraction("cells") == 0.2
    world.apply(spec_of(1))
    await world.settle()
    assert await world.streams.routing.kept_fraction("cells") is None
    assert (kept_at_each_write, world.status.phase, len(world.status.history)) == ([0.05], Phase.LIVE, 1)


async def test_each_promotion_is_written_down_with_whose_it_was_and_what_was_live_before() -> None:
    with structlog.testing.capture_logs() as lines:
        world = await shadowing()
        world.verdicts[2] = GOOD
        await world.settle(86_401)
    said = [line for line in lines if line["event"] == "audit"]
    assert {line["by"] for line in said} == {"operator, for default/solar"}
    assert [(line["before_version"], line["before_digest"], line["version"], line["digest"]) for line in said] == [
        (None, None, 1, digest_of(1)),
        (1, digest_of(1), 2, digest_of(2)),
    ]


async def test_too_little_evidence_aborts_after_the_timeout_where_asked() -> None:
    world = await shadowing(rollout={"timeout": "1h", "onTimeout": "Abort"})
    await world.settle(3601)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == "TimedOut"


async def test_manual_approval_waits_for_a_person() -> None:
    world = await shadowing(**MANUAL)
    world.verdicts[2] = GOOD
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.AWAITING_APPROVAL, 1)
    world.ask("promote", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_immediate_strategy_promotes_what_is_verified() -> None:
    world = await live_v1()
    world.verdicts[2] = None
    world.apply(spec_of(2, rollout={"strategy": "Immediate"}))
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


@pytest.mark.parametrize("more", [{}, MANUAL])
async def test_a_rollout_that_is_made_immediate_ends_its_comparison(more: dict[str, Any]) -> None:
    world = await shadowing(**more)
    if more:
        world.verdicts[2] = GOOD
        await world.settle(1)
        assert world.status.phase is Phase.AWAITING_APPROVAL
    world.apply(spec_of(2, rollout={**more.get("rollout", {}), "strategy": "Immediate"}))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_latest_follows_what_is_published_and_a_newer_version_replaces_the_candidate() -> None:
    world = await live_v1()
    world.apply(spec_of("latest"))
    world.verdicts[2] = FEW
    await world.settle()
    assert world.status.candidate is not None
    assert world.status.candidate.version == 2
    world.published.append(3)
    await world.settle(5)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 3)
    assert [(entry.version, entry.outcome) for entry in world.status.history[:2]] == [(3, "Promoted"), (2, "Replaced")]
    assert digest_of(2) not in world.workers


async def test_latest_passes_over_deprecated_versions() -> None:
    world = World(spec=spec_of("latest"), published=[1, 2], deprecated={2})
    await world.settle()
    assert await world.live() == 1


async def test_a_digest_pins_a_version() -> None:
    world = World(published=[1, 2])
    world.apply({"source": {"model": "cells", "digest": digest_of(1)}})
    await world.settle()
    assert await world.live() == 1


# --- what can go wrong


@pytest.mark.parametrize("version", [7, "latest"])
async def test_an_unknown_version_is_waited_for(version: int | str) -> None:
    world = World(spec=spec_of(version), published=[])
    await world.settle()
    assert world.status.phase is Phase.PENDING
    assert world.condition("Synced") == ("False", "UnknownVersion")
    world.published = [7]
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 7)


async def test_asking_for_an_unknown_version_leaves_live_alone() -> None:
    world = await live_v1()
    world.apply(spec_of(9))
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.PENDING, 1)
    assert set(world.workers) == {digest_of(1)}
    assert world.condition("Ready") == ("True", "Serving")


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (Description("w", digest_of(99), 0), "DigestMismatch"),
        (Description("w", digest_of(2), 3), "ParityFailed"),
    ],
)
async def test_a_candidate_that_does_not_prove_itself_fails_and_live_stays(
    description: Description, reason: str
) -> None:
    world = await live_v1()
    world.loaded[2] = description
    world.apply(spec_of(2))
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == reason
    assert world.condition("Promoted") == ("False", reason)


async def test_workers_that_never_become_ready_fail_at_the_deadline_with_what_is_wrong() -> None:
    world = await live_v1()
    world.broken[2] = Problem("ImagePullFailed", "no such image")
    world.apply(spec_of(2))
    await world.settle(599)
    assert world.status.phase is Phase.VERIFYING
    assert world.status.candidate is not None
    assert world.status.candidate.message == "ImagePullFailed: no such image"
    await world.settle(601)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == "ImagePullFailed"


async def test_a_candidate_that_crashes_in_shadow_fails_and_live_stays() -> None:
    world = await shadowing()
    world.broken[2] = Problem("OutOfMemory", "too small", final=True)
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)


async def test_a_failed_version_is_tried_again_when_something_it_may_have_failed_by_changes() -> None:
    world = await live_v1()
    world.broken[2] = Problem("OutOfMemory", "too small", final=True)
    world.apply(spec_of(2))
    await world.settle()
    world.broken.clear()
    world.apply(spec_of(2, threshold=0.7))
    await world.settle()
    assert world.status.phase is Phase.FAILED
    assert (await world.route()).live.threshold == 0.7  # type: ignore[union-attr]
    world.apply(spec_of(2, threshold=0.7, resources={"limits": {"memory": "2Gi"}}))
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_a_failed_version_is_tried_again_on_request() -> None:
    world = await live_v1()
    world.broken[2] = Problem("ParityFailed", "differs", final=True)
    world.apply(spec_of(2))
    await world.settle()
    world.broken.clear()
    world.ask("retry")
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


@pytest.mark.parametrize("between", [1, 9])
async def test_a_failed_version_that_is_asked_for_again_says_so_and_what_to_do(between: int) -> None:
    world = await shadowing()
    world.verdicts[2] = BAD
    await world.settle(1)
    failure = world.status.last_failure
    world.apply(spec_of(between))
    await world.settle(1)
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.FAILED, 1)
    assert world.status.last_failure == failure
    assert world.condition("Promoted") == ("False", "GateFailed")
    said = world.events[-1]
    assert (said.reason, said.warning) == ("GateFailed", True)
    assert "`kubectl vigil resume` tries it again" in said.message
    told = len(world.events)
    await world.settle(1000)
    assert len(world.events) == told, "once"


async def test_a_version_that_a_person_turned_down_is_held_when_it_is_asked_for_again() -> None:
    world = await shadowing()
    world.ask("abort", digest_of(2))
    await world.settle(1)
    world.published = [1, 2, 3]
    world.verdicts[3] = BAD
    world.apply(spec_of(3))
    await world.settle(1)
    assert world.condition("Promoted") == ("False", "GateFailed")
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    assert world.status.last_failure is not None
    assert (world.status.last_failure.version, world.status.last_failure.reason) == (2, "Aborted")
    assert world.condition("Promoted") == ("False", "Aborted")
    assert (world.events[-1].reason, "resume" in world.events[-1].message) == ("Aborted", True)
    promoted = next(one for one in world.status.conditions if one.type == "Promoted")
    assert "resume` tries it again" in promoted.message
    world.ask("promote")
    await world.settle(1)
    assert world.status.last_request_refused == "there is no candidate; `kubectl vigil resume` tries it again"


async def test_a_candidate_goes_where_a_version_is_asked_for_that_was_turned_down() -> None:
    world = await shadowing()
    world.verdicts[2] = BAD
    await world.settle(1)
    world.published = [1, 2, 3]
    world.verdicts[3] = FEW
    world.apply(spec_of(3))
    await world.settle(1)
    assert world.status.phase is Phase.SHADOWING
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, world.status.candidate) == (Phase.FAILED, None)
    assert set(world.workers) == {digest_of(1)}


async def test_without_the_registry_nothing_is_taken_for_the_latest() -> None:
    world = await live_v1()
    world.apply(spec_of("latest"))
    await world.settle()
    world.ask("rollback", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    world.away = {"registry"}
    world.restart()
    await world.settle(1)
    assert world.status.phase is Phase.HELD
    assert world.condition("Promoted") == ("Unknown", "RegistryUnavailable")
    world.away = set()
    await world.settle(1)
    assert (world.status.phase, world.condition("Promoted")) == (Phase.HELD, ("False", "RolledBack"))


async def test_what_is_live_as_the_latest_stays_so_while_the_registry_is_away() -> None:
    world = World(spec=spec_of("latest"))
    await world.settle()
    world.away = {"registry"}
    world.apply(spec_of("latest", threshold=0.7))
    await world.settle(1)
    assert (await world.route()).live.threshold == 0.7  # type: ignore[union-attr]
    assert (world.status.phase, world.condition("Promoted")) == (Phase.LIVE, ("True", "Promoted"))


@pytest.mark.parametrize("part", ["registry", "routing", "shadow", "cluster"])
async def test_while_a_part_is_away_live_stays_and_the_rollout_goes_on_afterwards(part: str) -> None:
    world = await live_v1()
    world.away = {part}
    world.apply(spec_of(2))
    for _ in range(5):
        await world.settle(1000)
        assert await world.live() == 1
    world.away = set()
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_what_is_away_is_named() -> None:
    world = await live_v1()
    world.away = {"registry"}
    await world.settle(1)
    assert world.condition("Synced") == ("False", "RegistryUnavailable")
    assert world.condition("Promoted")[0] == "True"
    world.away = set()
    await world.settle(1)
    assert world.condition("Synced") == ("True", "Synced")


async def test_a_name_that_is_taken_is_said() -> None:
    world = World(name_taken=True)
    await world.settle()
    assert (world.condition("Synced"), world.workers) == (("False", "NameTaken"), {})
    world.name_taken = False
    await world.settle(1)
    assert world.condition("Synced") == ("True", "Synced")


async def test_workers_that_wait_for_a_part_that_is_away_are_not_blamed() -> None:
    world = await live_v1()
    world.broken[2] = Problem("NotReady", "waiting for storage")
    world.apply(spec_of(2))
    await world.settle()
    world.away = {"registry"}
    await world.settle(2000)
    assert world.status.phase is Phase.VERIFYING


async def test_a_lost_route_is_written_again() -> None:
    world = await live_v1()
    await world.streams.routing.remove("cells")
    await world.settle(60)
    assert await world.live() == 1


async def test_a_lost_status_adopts_what_is_live() -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    world.verdicts[2] = FEW
    await world.settle()
    world.status = type(world.status)()
    await world.settle()
    assert (world.status.phase, await world.live()) == (Phase.SHADOWING, 1)
    assert world.events[-3].reason == "Adopted"


async def test_workers_that_are_gone_come_back() -> None:
    world = await live_v1()
    world.workers.clear()
    await world.settle(1)
    assert set(world.workers) == {digest_of(1)}


async def test_the_second_resource_for_a_model_touches_nothing() -> None:
    world = World()
    status, _ = await world.reconciler.reconcile(world.resource(), world.status, "default/first")
    assert (world.workers, await world.live()) == ({}, None)
    synced = next(condition for condition in status.conditions if condition.type == "Synced")
    assert (synced.status, synced.reason) == ("False", "ModelTaken")


# --- what people ask for


async def test_a_rollback_is_instant_while_the_version_before_is_warm() -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    await world.settle()
    world.ask("rollback", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    assert world.status.last_failure is not None
    assert world.status.last_failure.reason == "RolledBack"
    await world.settle(10_000)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1), "it does not come back by itself"
    assert set(world.workers) == {digest_of(1)}
    world.apply(spec_of(2, resources={"limits": {"cpu": "1"}}))
    await world.settle(1)
    assert await world.live() == 1, "nor by another change of the spec"
    world.ask("retry")
    await world.settle(1)
    assert await world.live() == 2


async def test_a_rollback_does_not_try_again_what_is_asked_for_and_has_failed() -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    await world.settle()
    world.published = [1, 2, 3]
    world.broken[3] = Problem("OutOfMemory", "more than its limit", final=True)
    world.apply(spec_of("latest"))
    await world.settle()
    assert world.condition("Promoted") == ("False", "OutOfMemory")
    world.ask("rollback")
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    assert world.condition("Promoted") == ("False", "OutOfMemory")
    assert [entry.outcome for entry in world.status.history] == ["RolledBack", "Failed", "Promoted", "Promoted"]
    # Nor does the version that a person went back from come again, once it is the newest.
    world.deprecated = {3}
    await world.settle(1000)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    assert world.condition("Promoted") == ("False", "RolledBack")
    world.ask("retry")
    await world.settle(1)
    assert await world.live() == 2


async def test_a_rollback_after_the_window_starts_the_version_before_first() -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    await world.settle()
    await world.settle(4000)
    assert set(world.workers) == {digest_of(2)}
    world.broken[1] = Problem("ContainerCreating", "not yet")
    world.ask("rollback")
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.ROLLING_BACK, 2)
    world.broken.clear()
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)


async def test_a_rollback_whose_version_does_not_start_leaves_live_alone() -> None:
    world = await live_v1()
    world.apply(spec_of(2))
    await world.settle()
    await world.settle(4000)
    world.broken[1] = Problem("ImagePullFailed", "gone")
    world.ask("rollback")
    await world.settle(1)
    await world.settle(601)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)
    assert world.events[-2].reason == "RollbackFailed"


async def test_a_rollback_brings_the_threshold_back_too() -> None:
    world = await live_v1(threshold=0.4)
    world.apply(spec_of(2, threshold=0.6))
    await world.settle()
    assert (await world.route()).live.threshold == 0.6  # type: ignore[union-attr]
    world.ask("rollback")
    await world.settle(1)
    route = await world.route()
    assert route is not None
    assert (route.live.version, route.live.threshold) == (1, 0.4)


async def test_an_aborted_candidate_goes_and_stays_away() -> None:
    world = await shadowing()
    world.ask("abort", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.HELD, 1)
    await world.settle(100)
    assert set(world.workers) == {digest_of(1)}
    world.apply(spec_of(1))
    await world.settle(1)
    assert world.status.phase is Phase.LIVE


@pytest.mark.parametrize(
    ("verb", "digest", "says"),
    [
        ("promote", "-", "gates have not passed"),
        ("promote", digest_of(5), "was meant for"),
        ("rollback", "-", "no version to go back to"),
        ("dance", "-", "write promote"),
    ],
)
async def test_a_request_that_can_not_be_done_is_refused_once_with_a_reason(verb: str, digest: str, says: str) -> None:
    world = await shadowing()
    world.ask(verb, digest)
    await world.settle(1)
    assert says in world.status.last_request_refused
    assert world.status.phase is Phase.SHADOWING
    refusals = [event for event in world.events if event.reason == "RequestRefused"]
    await world.settle(1)
    assert len(refusals) == 1
    assert [event for event in world.events if event.reason == "RequestRefused"] == refusals


async def test_forcing_promotes_without_the_gates_and_says_so() -> None:
    world = await shadowing()
    world.ask("force-promote", digest_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)
    assert "though the gates had not passed" in world.status.history[0].message


async def test_suspend_stops_the_rollout_and_resume_goes_on() -> None:
    world = await shadowing()
    world.apply(spec_of(2, suspend=True))
    world.verdicts[2] = GOOD
    await world.settle(100)
    assert (world.status.phase, await world.live()) == (Phase.SUSPENDED, 1)
    world.apply(spec_of(2))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 2)


async def test_a_threshold_applies_to_what_runs_but_not_before_a_version_it_came_with() -> None:
    world = await live_v1(threshold=0.5)
    world.verdicts[2] = FEW
    world.apply(spec_of(2, threshold=0.8))
    await world.settle()
    route = await world.route()
    assert route is not None
    assert route.candidate is not None
    assert (route.live.threshold, route.candidate.threshold) == (0.5, 0.8)
    world.apply(spec_of(2, threshold=0.6))
    await world.settle(1)
    route = await world.route()
    assert route is not None
    assert route.candidate is not None
    assert (route.live.threshold, route.candidate.threshold) == (0.6, 0.6)
    assert world.status.phase is Phase.SHADOWING


async def test_another_precision_that_comes_with_a_version_is_that_versions_until_it_is_promoted() -> None:
    world = await live_v1()
    world.verdicts[2] = FEW
    world.apply(spec_of(2, **BF16))
    await world.settle()
    assert world.status.phase is Phase.SHADOWING
    assert (str(world.numerics[digest_of(1)]), str(world.numerics[digest_of(2)])) == ("auto/f32", "auto/bf16")
    world.verdicts[2] = GOOD
    await world.settle(1)
    assert await world.live() == 2
    assert str(world.numerics[digest_of(2)]) == "auto/bf16"
    world.ask("rollback")
    await world.settle(1)
    assert (await world.live(), str(world.numerics[digest_of(1)])) == (1, "auto/f32")


async def test_another_precision_of_the_candidate_is_proven_and_compared_from_the_start() -> None:
    world = await shadowing()
    before = await world.route()
    assert before is not None
    world.apply(spec_of(2, **BF16))
    world.loaded[2] = Description("of before", digest_of(2), 0, "auto/f32")
    await world.settle(1)
    assert world.status.phase is Phase.VERIFYING, "pods of before prove nothing"
    world.loaded.clear()
    await world.settle(1)
    after_it = await world.route()
    assert after_it is not None
    assert (world.status.phase, after_it.comparison > before.comparison) == (Phase.SHADOWING, True)
    assert (str(world.numerics[digest_of(1)]), str(world.numerics[digest_of(2)])) == ("auto/f32", "auto/bf16")


async def test_a_pair_is_not_compared_again_before_its_last_comparison_has_ended() -> None:
    world = await shadowing()
    before = await world.route()
    assert before is not None
    write, world.streams.routing.write = world.streams.routing.write, refused  # type: ignore[method-assign]
    world.apply(spec_of(2, **BF16))
    await world.settle(1)
    assert world.status.phase is Phase.VERIFYING
    world.streams.routing.write = write  # type: ignore[method-assign]
    await world.settle(1)
    after_it = await world.route()
    assert after_it is not None
    assert (world.status.phase, after_it.comparison > before.comparison) == (Phase.SHADOWING, True)


async def test_another_precision_by_itself_is_for_the_live_version() -> None:
    world = await live_v1()
    world.apply(spec_of(1, **BF16))
    await world.settle(1)
    assert (world.status.phase, str(world.numerics[digest_of(1)])) == (Phase.LIVE, "auto/bf16")
    assert world.events[-1].reason == "RuntimeChanged"


async def test_asking_for_the_live_version_again_withdraws_the_candidate() -> None:
    world = await shadowing()
    world.apply(spec_of(1))
    await world.settle(1)
    assert (world.status.phase, await world.live()) == (Phase.LIVE, 1)
    assert set(world.workers) == {digest_of(1)}


# --- killed anywhere


SCENARIOS: dict[str, Any] = {
    "first": lambda _: None,
    "promotion": lambda world: world.apply(spec_of(2)),
    "with another precision": lambda world: world.apply(spec_of(2, **BF16)),
    "gates failed": lambda world: (world.verdicts.update({2: BAD}), world.apply(spec_of(2))),
    "rollback": lambda world: (world.apply(spec_of(2)), "rollback"),
}


async def _play(world: World, scenario: str) -> None:
    """The scenario with an operator that is killed and comes back after every cut."""

    async def until_settled() -> None:
        while True:
            try:
                await world.settle()
            except Cut:
                world.cut_after = None
                world.restart()
            else:
                return

    await until_settled()
    world.published = [1, 2]
    then = SCENARIOS[scenario](world)
    await until_settled()
    if then and then[-1] == "rollback":
        world.request = "rollback - 1"
        await until_settled()


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_an_operator_killed_after_any_action_ends_in_the_same_state(scenario: str) -> None:
    whole = World()
    await _play(whole, scenario)
    assert whole.actions > 5
    for cut in range(whole.actions):
        world = World(cut_after=cut)
        await _play(world, scenario)
        assert world.cut_after is None, "the cut came"
        assert world.status == whole.status, f"cut after {cut} actions"
        assert (world.workers, world.live_service) == (whole.workers, whole.live_service)
        assert (await world.route()).live == (await whole.route()).live  # type: ignore[union-attr]


# --- the table


def test_only_promoting_and_rolling_back_lead_to_another_live_version() -> None:
    into = {event for (_, event), phase in TRANSITIONS.items() if phase is Phase.PROMOTING}
    assert into == {Event.VERIFIED_ALONE, Event.GATES_PASSED, Event.APPROVED, Event.FORCED}
    assert {event for (_, event), phase in TRANSITIONS.items() if phase is Phase.ROLLING_BACK} == {Event.ROLLBACK_ASKED}


def test_every_phase_can_be_reached_and_left() -> None:
    assert {phase for phase, _ in TRANSITIONS} | {Phase.SUSPENDED} == set(Phase)
    assert set(TRANSITIONS.values()) == set(Phase)


def test_a_way_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(NotAllowed):
        after(Phase.PENDING, Event.GATES_PASSED)


happenings = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from([1, 2, 3, 9, "latest"]), st.sampled_from([{}, MANUAL, BF16])),
    st.tuples(st.just("suspend"), st.booleans(), st.none()),
    st.tuples(st.just("threshold"), st.sampled_from([None, 0.3, 0.7]), st.none()),
    st.tuples(st.just("publish"), st.integers(1, 4), st.none()),
    st.tuples(
        st.just("ask"),
        st.sampled_from(["promote", "abort", "rollback", "retry", "force-promote"]),
        st.none(),
    ),
    st.tuples(st.just("verdict"), st.integers(1, 4), st.sampled_from([GOOD, BAD, FEW, None])),
    st.tuples(
        st.just("break"),
        st.integers(1, 4),
        st.sampled_from([Problem("Slow", ""), Problem("Bad", "", final=True), None]),
    ),
    st.tuples(st.just("away"), st.sampled_from(["registry", "routing", "shadow", "cluster"]), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([1, 30, 700, 4000, 90_000]), st.none()),
    st.tuples(st.just("kill"), st.integers(0, 3), st.none()),
    st.tuples(st.just("forget"), st.none(), st.none()),
)


def _happen(world: World, what: str, first: Any, second: Any) -> None:  # noqa: C901 - one line each
    match what:
        case "apply":
            world.apply({**spec_of(first), **second})
        case "suspend":
            world.apply({**world.spec, "suspend": first})
        case "threshold":
            world.apply({key: value for key, value in {**world.spec, "threshold": first}.items() if value is not None})
        case "publish":
            world.published = sorted({*world.published, first})
        case "ask":
            world.ask(first)
        case "verdict":
            world.verdicts[first] = second
        case "break" if second is None:
            world.broken.pop(first, None)
        case "break":
            world.broken[first] = second
        case "away":
            (world.away.add if second else world.away.discard)(first)
        case "kill":
            world.cut_after = world.actions + first
        case "forget":
            world.status = type(world.status)()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(happenings, min_size=1, max_size=25))
async def test_no_sequence_of_events_loses_live_or_promotes_without_evidence(story: list[Any]) -> None:
    world = World()
    world.verdicts = dict.fromkeys(range(2, 5), FEW)
    was_live: int | None = None
    for what, first, second in story:
        forced, before = False, was_live
        _happen(world, what, first, second)
        forced = "force-promote" in world.request or "rollback" in world.request
        try:
            await world.settle(first if what == "wait" else 1)
        except Cut:
            world.cut_after = None
            world.restart()
            await world.settle()
        live = await world.live()
        assert before is None or live is not None, "once there is a live version there always is one"
        if live is not None:
            assert digest_of(live) in world.workers, "live has workers"
            assert live == before or live not in world.broken, "nothing broken becomes live"
        if before is not None and live != before and not forced:
            assert world.verdicts.get(live or 0, GOOD) is GOOD, f"version {live} became live without passing"
        was_live = live
    # Once everything is well again, the world comes to rest.
    world.away.clear()
    world.cut_after = None
    await world.settle(1)
    live = await world.live()
    assert world.status.live is None or world.status.live.version == live
