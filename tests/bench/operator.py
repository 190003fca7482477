"""The operator's speed against a real API server: python -m tests.bench.operator [MODELS]

The node and the controllers are played by this process (see tests/support/kube_node.py), on the same cores.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vigil_common.errors import Unavailable
from vigil_operator.spec import GROUP, VERSION

from tests.e2e.cluster.light import LightCluster
from tests.support.cpu import cpu_s
from tests.support.kube import Kube, kube
from tests.support.kube_node import digest_of, report

TRIALS = 7
STEADY_S = 20.0
COLD_DEADLINE_S = 300.0
PATH = f"/apis/{GROUP}/{VERSION}/namespaces/default/anomalymodels"


async def _create(world: Kube, name: str, version: int) -> None:
    world.services.published[name] = [1, 2]
    gates = {"minDuration": "1s"}
    spec = {"source": {"model": name, "version": str(version)}, "rollout": {"gates": gates, "rollbackWindow": "0s"}}
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "AnomalyModel", "metadata": {"name": name}, "spec": spec}
    await world.api.request("POST", PATH, content_type="application/json", body=body)


async def _status(world: Kube, name: str) -> dict[str, Any]:
    found = await world.api.request("GET", f"{PATH}/{name}")
    status: dict[str, Any] = found.get("status", {})
    return status


async def _until(holds: Any, deadline_s: float = 60.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not await holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(0.01)


async def _apply_to_deployment(world: Kube, trial: int) -> float:
    name = f"applied-{trial}"
    path = "/apis/apps/v1/namespaces/default/deployments"

    async def created() -> bool:
        found = await world.api.request("GET", path, labelSelector=f"vigil.dev/anomalymodel={name}")
        return bool(found["items"])

    started = time.monotonic()
    await _create(world, name, 1)
    await _until(created)
    return time.monotonic() - started


async def _gates_to_live(world: Kube, trial: int) -> float:
    name = f"applied-{trial}"
    patch = {"spec": {"source": {"version": "2"}}}

    async def in_phase(phase: str) -> bool:
        return (await _status(world, name)).get("phase") == phase

    async def switched() -> bool:
        route = await world.streams.routing.get(name)
        return bool(route is not None and route.live.version == 2)

    await _until(lambda: in_phase("Live"))
    await world.api.request("PATCH", f"{PATH}/{name}", content_type="application/merge-patch+json", body=patch)
    await _until(lambda: in_phase("Shadowing"))
    await asyncio.sleep(0.37 * trial)  # at any place between two looks
    started = time.monotonic()
    world.services.reports[digest_of(name, 2)] = report()
    await _until(switched)
    return time.monotonic() - started


def _rss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def _cold(world: Kube, models: int) -> float:
    """From the operator's start until every resource is Live; all were there before."""
    world.operator.end(signal.SIGTERM)
    for number in range(models):
        await _create(world, f"cold-{number:03d}", 1)

    async def all_live() -> bool:
        await asyncio.sleep(0.5)
        try:
            found = await world.api.list(f"{GROUP}/{VERSION}", "AnomalyModel", "default")
        except Unavailable:  # so many at once keep this process busy, too
            return False
        return all(body.get("status", {}).get("phase") == "Live" for body in found)

    started = time.monotonic()
    world.operator.start()
    await _until(all_live, COLD_DEADLINE_S)
    return time.monotonic() - started


async def _main(models: int) -> None:
    with tempfile.TemporaryDirectory() as folder, LightCluster(Path(folder) / "cluster") as cluster:
        async with kube(cluster, Path(folder)) as world:
            applied = [await _apply_to_deployment(world, trial) for trial in range(TRIALS)]
            print(f"apply to Deployment, s: {' '.join(f'{s:.3f}' for s in applied)}", flush=True)
            switched = [await _gates_to_live(world, trial) for trial in range(TRIALS)]
            print(f"gates to live, s: {' '.join(f'{s:.3f}' for s in switched)}", flush=True)
            world.node.poll_s = 0.5
            cold_s = await _cold(world, models - TRIALS)
            spent_s = cpu_s(world.operator.pid)
            print(f"{models} models Live {cold_s:.1f} s after a cold start, {spent_s:.1f} s of a core", flush=True)
            world.node.poll_s = 5.0
            await asyncio.sleep(5.0)
            pid = world.operator.pid
            before = cpu_s(pid)
            await asyncio.sleep(STEADY_S)
            cores = (cpu_s(pid) - before) / STEADY_S
            print(
                f"operator: apply_to_deployment_s={statistics.median(applied):.1f} "
                f"gates_to_live_s={statistics.median(switched):.1f} models={models} cold_s={cold_s:.0f} "
                f"core_fraction={cores:.3f} rss_mb={_rss_mb(pid):.0f}"
            )


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
