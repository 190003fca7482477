"""The operator against a real API server: what a user sees with kubectl."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import yaml
from typer.testing import CliRunner
from vigil_cli import rollout
from vigil_operator.cluster import path_of
from vigil_operator.leading import ALIVE_S
from vigil_operator.render import DIGEST_LABEL, short

from tests.e2e.cluster import programs
from tests.e2e.cluster.light import LightCluster
from tests.e2e.tools import ROOT
from tests.support.kube import API, Kube, kube
from tests.support.kube_node import ended, report, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        not programs.can_have("nodebox"), reason="needs Go, or a built API server named by VIGIL_KUBE_BIN"
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everywhere(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kube]:
    """One cluster and one operator for all tests, each in a namespace with a model of its own."""
    with LightCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        async with kube(cluster, tmp_path_factory.mktemp("operator")) as running:
            yield running


@pytest_asyncio.fixture(loop_scope="module")
async def world(everywhere: Kube, request: pytest.FixtureRequest) -> Kube:
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    name = f"{words[:30]}{words[-10:]}".replace("--", "-")
    own = dataclasses.replace(everywhere, namespace=name, model=f"m-{name}")
    await own.kubectl("create", "namespace", name)
    own.services.published[own.model] = [1, 2, 3]
    return own


async def _live_v1(world: Kube) -> None:
    await world.apply("cells", 1)
    await world.phase("cells", "Live")


def _is_live(version: int, status: dict[str, Any]) -> bool:
    return bool(status["live"]["version"] == version)


async def test_a_better_version_is_promoted_by_its_gates_and_kubectl_reads_well(world: Kube) -> None:
    started = time.monotonic()
    await _live_v1(world)
    created_s = asyncio.get_running_loop().time() - world.node.created[world.digest(1)]
    print(f"apply to Live {time.monotonic() - started:.2f} s, of it after the Deployment {created_s:.2f} s")
    assert await world.live() == 1
    await world.kubectl("wait", "--for=condition=Promoted", "anomalymodel/cells", "--timeout=20s")

    world.compare(2, report(frames=20, flips=0))
    await world.apply("cells", 2)
    await world.phase("cells", "Shadowing")
    await world.until("cells", lambda status: status["shadow"]["frames"] == 20, "compared")
    table = await world.kubectl("get", "am")
    print(table)
    assert table.split("\n")[0].split() == ["NAME", "PHASE", "LIVE", "CANDIDATE", "COMPARED", "FLIPS", "READY", "AGE"]
    assert table.split("\n")[1].split()[:7] == ["cells", "Shadowing", "1", "2", "20", "0", "True"]
    assert await world.live() == 1

    world.compare(2, report())
    passed = time.monotonic()
    await world.kubectl("wait", "--for=condition=Promoted", "anomalymodel/cells", "--timeout=20s")
    await world.serves(2)
    assert time.monotonic() - passed < 3
    status = await world.phase("cells", "Live")
    assert [(entry["version"], entry["outcome"]) for entry in status["history"]] == [(2, "Promoted"), (1, "Promoted")]
    events = await world.kubectl("get", "events", "-o", "jsonpath={range .items[*]}{.reason} {end}")
    assert {"Verifying", "Shadowing", "Promoting", "Promoted"} <= set(events.split())
    assert "gates" in await world.kubectl("explain", "anomalymodel.spec.rollout")
    assert "Frames with another label" in await world.kubectl("explain", "anomalymodel.spec.rollout.gates")


@pytest.mark.parametrize(
    ("container", "reason"),
    [
        (ended("OOMKilled", restarts=2), "OutOfMemory"),
        (
            ended(
                "Error",
                json.dumps(
                    {
                        "event": "failed",
                        "reason": "PARITY_FAILED",
                        "status": "INVALID_ARGUMENT",
                        "detail": "3 of 8 parity samples came out otherwise",
                    }
                ),
            ),
            "ParityFailed",
        ),
        (ended("Error", "Traceback: boom", restarts=3), "CrashLoop"),
        (waiting("ImagePullBackOff", "manifest unknown"), "ImagePullFailed"),
    ],
    ids=["oom", "parity", "crash", "image"],
)
async def test_a_broken_version_fails_with_its_reason_and_live_stays(
    world: Kube, container: dict[str, object], reason: str
) -> None:
    await _live_v1(world)
    world.node.broken[world.digest(2)] = container
    await world.apply("cells", 2, rollout={"verifyTimeout": "2s"})
    status = await world.phase("cells", "Failed")
    assert status["lastFailure"]["reason"] == reason
    assert status["live"]["version"] == 1
    assert await world.live() == 1
    told = await world.kubectl("get", "am", "cells", "-o", "jsonpath={.status.conditions[?(@.type=='Promoted')]}")
    assert json.loads(told)["reason"] == reason
    while len(await world.deployments()) != 1:
        await asyncio.sleep(0.05)


async def test_a_candidate_waits_for_room_in_a_quota(world: Kube) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}}
    hard = {"count/deployments.apps": "1"}
    await world.kubectl("apply", "-f", "-", stdin=yaml.safe_dump({**quota, "spec": {"hard": hard}}))

    async def room(count: int) -> None:
        """As the controller would say it, which does not run here."""
        known = {"status": {"hard": {"count/deployments.apps": str(count)}, "used": {"count/deployments.apps": "1"}}}
        patch = ("patch", "resourcequota/few", "--subresource=status", "--type=merge", f"-p={json.dumps(known)}")
        await world.kubectl(*patch)

    await _live_v1(world)
    await room(1)
    await world.apply("cells", 2)
    status = await world.until("cells", lambda found: "quota" in found["candidate"]["message"], "told of the quota")
    assert status["phase"] == "Verifying"
    assert "exceeded quota: few" in status["candidate"]["message"]
    await room(2)
    await world.phase("cells", "Shadowing")


async def test_what_pods_say_of_themselves_counts(world: Kube) -> None:
    await _live_v1(world)
    world.node.says[world.digest(2)] = world.digest(9)
    await world.apply("cells", 2)
    status = await world.phase("cells", "Failed")
    assert status["lastFailure"]["reason"] == "DigestMismatch"
    world.node.parity_failed.add(world.digest(3))
    await world.apply("cells", 3)
    status = await world.until("cells", lambda found: found["lastFailure"]["version"] == 3, "failed by 3")
    assert status["lastFailure"]["reason"] == "ParityFailed"
    assert await world.live() == 1


async def _kubectl_vigil(world: Kube, *arguments: str, code: int = 0) -> str:
    answer = await asyncio.to_thread(CliRunner().invoke, rollout.kubectl, ["-n", world.namespace, *arguments])
    assert answer.exit_code == code, answer.output
    return answer.output


async def test_people_decide_with_kubectl_vigil(world: Kube) -> None:
    await _live_v1(world)
    world.compare(2, report())
    await world.apply("cells", 2, rollout={"approval": "Manual"})
    await world.phase("cells", "AwaitingApproval")
    assert "maxFlipFraction" in await _kubectl_vigil(world, "report", "cells")
    assert "AwaitingApproval" in await _kubectl_vigil(world, "status", "cells")
    await _kubectl_vigil(world, "pause", "cells")
    await world.phase("cells", "Suspended")
    refused = await _kubectl_vigil(world, "promote", "cells", code=1)
    assert "suspended" in refused
    await _kubectl_vigil(world, "resume", "cells")
    await world.phase("cells", "AwaitingApproval")
    assert "version 2 is live" in await _kubectl_vigil(world, "promote", "cells")
    await _kubectl_vigil(world, "threshold", "cells", "0.7")
    await world.until("cells", lambda status: status["live"]["threshold"] == 0.7, "at 0.7")
    await world.serves(2, 0.7)
    assert "a person approved it" in await _kubectl_vigil(world, "history", "cells")
    assert "there is no candidate" in await _kubectl_vigil(world, "abort", "cells", code=1)


async def test_one_command_rolls_back(world: Kube) -> None:
    await _live_v1(world)
    world.compare(2, report())
    await world.apply("cells", 2)
    await world.until("cells", lambda status: status["live"]["version"] == 2, "live with 2")
    await world.phase("cells", "Live")
    said = await _kubectl_vigil(world, "rollback", "cells")
    assert "cells: Held, version 1 is live" in said
    status = await world.phase("cells", "Held")
    assert status["live"]["version"] == 1
    await world.serves(1)


async def test_drift_is_put_right(world: Kube) -> None:
    await _live_v1(world)
    (name,) = await world.deployments()
    await world.kubectl("delete", "deployment", name, "--wait=false")
    deadline = time.monotonic() + 90
    while name not in await world.deployments():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    await world.until("cells", lambda status: status["live"]["readyReplicas"] == 1, "ready again")
    await world.kubectl("set", "image", f"deployment/{name}", "inference=somebody/elses:1")
    while "somebody" in await world.kubectl("get", "deployment", name, "-o", "jsonpath={..image}"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_an_operator_killed_at_any_moment_goes_on(world: Kube) -> None:
    world.compare(2, report())
    await world.apply("cells", 1)
    for version in (1, 2):
        if version == 2:
            await world.apply("cells", 2)
        for _ in range(4):
            await asyncio.sleep(0.3)
            world.operator.end(signal.SIGKILL)
            world.operator.start()
        await world.until("cells", partial(_is_live, version), f"live with {version}")
        await world.phase("cells", "Live")
        await world.serves(version)


async def test_of_two_operators_one_leads_and_the_other_takes_over(world: Kube) -> None:
    await _live_v1(world)
    (name,) = await world.deployments()

    async def look() -> tuple[str, int]:
        found = json.loads(await world.kubectl("get", "deployment", name, "-o", "json"))
        image = found["spec"]["template"]["spec"]["containers"][0]["image"]
        return image, found["metadata"]["generation"]

    before = await look()
    image = "localhost/vigil/inference:other"
    place = {"VIGIL_OPERATOR_NAMESPACE": world.namespace, "VIGIL_WATCH_NAMESPACES": world.namespace}
    second = world.operator.another("second.log", VIGIL_OPERATOR_POD="second", VIGIL_WORKER_IMAGE=image, **place)
    second.start()
    try:
        await _until_true(lambda: asyncio.to_thread(lambda: "standing_by" in second.log()))
        await world.apply("cells", 1, replicas=2)
        await world.until("cells", lambda status: status["live"]["readyReplicas"] == 2, "scaled")
        assert await look() == (before[0], before[1] + 1)
        ended_at = time.monotonic()
        assert world.operator.end(signal.SIGTERM) == 0

        async def taken_over() -> bool:
            return (await look())[0] == image

        await _until_true(taken_over)
        assert time.monotonic() - ended_at < ALIVE_S - 1, "the Lease was let go, not waited for"
        # Who was first comes back as the later one.
        world.operator.start()
        await world.kubectl("annotate", "am", "cells", "seen=again")
        await _until_true(lambda: asyncio.to_thread(lambda: "standing_by" in world.operator.log().splitlines()[-1]))
        after = await look()
        second.end(signal.SIGKILL)
        gone = time.monotonic()

        async def back() -> bool:
            return (await look())[0] == before[0]

        await _until_true(back)
        print(f"after the leader was killed another led within {time.monotonic() - gone:.1f} s")
        assert (await look())[1] == after[1] + 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            second.end(signal.SIGKILL)


@pytest.mark.skipif(not programs.can_have("helm"), reason="helm is built with Go, which is not installed")
@pytest.mark.parametrize("everywhere_else", [False, True], ids=["here", "everywhere"])
async def test_what_the_chart_grants_is_enough(world: Kube, tmp_path: Path, *, everywhere_else: bool) -> None:
    name, place = "vigil-operator", world.namespace
    command = [
        str(programs.ensure("helm")),
        "template",
        "vigil",
        "charts/vigil-operator",
        "--kube-version=1.29.0",
        "-n",
        place,
    ]
    command += ["--set", f"fullnameOverride={name}"]
    command += [] if everywhere_else else ["--set", f"watchNamespaces={{{place}}}"]
    rendered = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True, cwd=ROOT)
    parts = [part for part in yaml.safe_load_all(rendered.stdout) if part]
    rights = [part for part in parts if part["kind"] == "ServiceAccount" or "rbac" in part["apiVersion"]]
    await world.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(rights))
    token = (await world.kubectl("create", "token", name)).strip()
    config = yaml.safe_load(world.cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    (container,) = next(part for part in parts if part["kind"] == "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    given = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    own = {name: given[name] for name in ("VIGIL_OPERATOR_NAME", "VIGIL_WATCH_NAMESPACES")}
    env = {"KUBECONFIG": str(tmp_path / "config"), "VIGIL_OPERATOR_NAMESPACE": place, "VIGIL_OPERATOR_POD": "granted"}
    granted = world.operator.another(f"granted-{everywhere_else}.log", **own, **env)
    world.operator.end(signal.SIGTERM)
    granted.start()
    try:
        world.compare(2, report())
        await _live_v1(world)
        await world.apply("cells", 2)
        await world.until("cells", partial(_is_live, 2), "live with 2")
        await world.kubectl("delete", "am", "cells", "--wait=false")
        await world.gone("cells")
        lease = json.loads(await world.kubectl("get", "lease", name, "-o", "json"))
        assert lease["spec"]["holderIdentity"] == "granted"
    finally:
        code = granted.end(signal.SIGTERM)
        world.operator.start()
    assert code == 0, granted.log()
    assert "lease" not in await world.kubectl("get", "leases", "-o", "name")
    assert "forbidden" not in granted.log()


async def test_deletion_never_hangs_and_takes_the_route_out(world: Kube) -> None:
    await _live_v1(world)
    await world.kubectl("delete", "am", "cells", "--wait=false")
    await world.gone("cells")
    assert await world.live() is None
    await _live_v1(world)
    world.valkey.kill()
    await world.kubectl("delete", "am", "cells", "--wait=false")
    await world.gone("cells")
    world.valkey.start()
    events = await world.kubectl("get", "events", "-o", "jsonpath={range .items[*]}{.reason} {end}")
    assert "RouteLeft" in events


async def test_redis_away_is_named_and_the_rollout_goes_on_afterwards(world: Kube) -> None:
    await _live_v1(world)
    world.valkey.kill()
    world.compare(2, report())
    await world.apply("cells", 2)

    def synced(status: dict[str, object], reason: str) -> bool:
        conditions: list[dict[str, str]] = status["conditions"]  # type: ignore[assignment]
        return any(c["type"] == "Synced" and c["reason"] == reason for c in conditions)

    status = await world.until("cells", lambda found: synced(found, "RoutingUnavailable"), "told of Redis")
    assert status["live"]["version"] == 1
    world.valkey.start()
    await world.until("cells", lambda found: found["live"]["version"] == 2, "live with 2")
    await world.until("cells", lambda found: synced(found, "Synced"), "in sync")


async def test_the_second_resource_for_a_model_waits_for_the_first(world: Kube) -> None:
    await _live_v1(world)
    await asyncio.sleep(1.0)  # creation times have whole seconds
    await world.apply("other", 2)
    status = await world.until("other", lambda found: found["conditions"], "explained")
    synced = next(condition for condition in status["conditions"] if condition["type"] == "Synced")
    assert synced["reason"] == "ModelTaken"
    assert await world.live() == 1
    await world.kubectl("delete", "am", "cells", "--wait=false")
    await world.gone("cells")
    await world.until("other", lambda found: found["live"]["version"] == 2, "live with 2")


NONSENSE: list[tuple[dict[str, object], str]] = [
    ({"source": {"model": "cells"}}, "give either version or digest"),
    ({"source": {"model": "cells", "version": 1.10}}, "must be of type string"),
    ({"source": {"model": "cells", "version": "v1"}}, "should match"),
    ({"source": {"model": "cells", "version": "1"}, "replicas": 0}, "greater than or equal to 1"),
    (
        {"source": {"model": "cells", "version": "1"}, "rollout": {"gates": {"maxFlipFraction": 2}}},
        "less than or equal to 1",
    ),
    ({"source": {"model": "cells", "version": "1"}, "rollout": {"timeout": "soon"}}, "should match"),
    ({"source": {"model": "cells", "version": "1"}, "rollout": {"timeout": "5m"}}, "timeout must be over"),
    (
        {"source": {"model": "cells", "version": "1"}, "autoscaling": {"min": 4, "max": 2}},
        "min must not be over max",
    ),
    ({"source": {"model": "cells", "version": "1"}, "strategy": "YOLO"}, "unknown field"),
]


async def test_what_makes_no_sense_is_refused_at_once_with_a_sentence(world: Kube) -> None:
    for spec, says in NONSENSE:
        body = {"apiVersion": API, "kind": "AnomalyModel", "metadata": {"name": "bad"}, "spec": spec}
        said = await world.kubectl("apply", "-f", "-", stdin=json.dumps(body), check=False)
        assert says in said, said


async def test_the_model_of_a_resource_can_not_be_changed(world: Kube) -> None:
    await _live_v1(world)
    patch = json.dumps({"spec": {"source": {"model": "bottles"}}})
    said = await world.kubectl("patch", "am", "cells", "--type=merge", "-p", patch, check=False)
    assert "can't be changed" in said


async def test_autoscaling_comes_and_goes_without_a_drop_in_workers(world: Kube) -> None:
    await _live_v1(world)
    await world.apply("cells", 1, replicas=3)
    await world.until("cells", lambda status: status["live"]["readyReplicas"] == 3, "ready")

    async def scalers() -> list[dict[str, Any]]:
        return await world.api.list("autoscaling/v2", "HorizontalPodAutoscaler", world.namespace)

    async def replicas() -> int:
        (body,) = await world.api.list("apps/v1", "Deployment", world.namespace)
        return int(body["spec"]["replicas"])

    await world.apply("cells", 1, autoscaling={"min": 2, "max": 5})
    await _until_true(scalers)
    assert await replicas() == 3
    (name,) = await world.deployments()
    await world.kubectl("scale", f"deployment/{name}", "--replicas=5")
    await world.until("cells", lambda status: status["replicas"] == 5, "scaled")
    assert await replicas() == 5
    world.operator.end(signal.SIGKILL)
    world.operator.start()
    await world.apply("cells", 1, replicas=2)
    await world.until("cells", lambda status: status["replicas"] == 2, "scaled back")

    async def gone() -> bool:
        return not await scalers()

    await _until_true(gone)


async def _until_true(holds: Callable[[], Awaitable[Any]]) -> None:
    deadline = time.monotonic() + 90
    while not await holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_scaling_by_kubectl_reaches_the_workers(world: Kube) -> None:
    await _live_v1(world)
    await world.kubectl("scale", "am/cells", "--replicas=3")
    status = await world.until("cells", lambda found: found["live"]["readyReplicas"] == 3, "scaled")
    assert status["replicas"] == 3
    # A HorizontalPodAutoscaler counts live's pods alone, as that number does, though a candidate has some beside them.
    await world.apply("cells", 2)
    await world.until("cells", lambda found: found["candidate"]["readyReplicas"] > 0, "with a candidate")
    scale = json.loads(await world.kubectl("get", "am/cells", "--subresource=scale", "-o", "json"))["status"]
    pods = await world.api.list("v1", "Pod", world.namespace, scale["selector"])
    assert [pod["metadata"]["labels"][DIGEST_LABEL] for pod in pods] == [short(world.digest(1))]
    kinds = ("ServiceAccount", "ConfigMap", "Service")
    found = [await world.api.list("v1", kind, world.namespace) for kind in kinds]
    assert ["vigil-cells" in [body["metadata"]["name"] for body in bodies] for bodies in found] == [True] * 3
    assert path_of("networking.k8s.io/v1", "NetworkPolicy", "a", "b").endswith("/a/networkpolicies/b")
