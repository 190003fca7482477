"""The operator as a process against a real API server and a real Valkey, with a node that a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kopf
import yaml
from vigil_common.errors import NotFound
from vigil_common.streams.redis import RedisStreams
from vigil_operator.cluster import Api
from vigil_operator.crd import FILE as CRD
from vigil_operator.spec import GROUP, KIND, VERSION

from tests.support.kube_node import Node, Services, digest_of, serving
from tests.support.valkey import ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from vigil.shadow.v1 import shadow_pb2

    from tests.e2e.cluster.light import LightCluster

# Generous: only a machine that is busy otherwise comes near it.
DEADLINE_S = 90.0
ROUTED_WITHIN_S = 3.0
API = f"{GROUP}/{VERSION}"


class OperatorProcess:
    """`python -m vigil_operator`, which can be killed."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def another(self, log: str, **env: str) -> OperatorProcess:
        """A second operator, with settings of its own."""
        return OperatorProcess({**self._env, **env}, self._log.with_name(log))

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "vigil_operator"]
            self._process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)

    def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(20)

    def log(self) -> str:
        return self._log.read_text()[-6000:]


@dataclass
class Kube:
    """What a test asks of the world."""

    cluster: LightCluster
    api: Api
    node: Node
    services: Services
    streams: RedisStreams
    valkey: ValkeyProcess
    operator: OperatorProcess
    namespace: str = "default"
    model: str = "cells"

    def digest(self, version: int) -> str:
        """Of the test's model."""
        return digest_of(self.model, version)

    def compare(self, version: int, said: shadow_pb2.Report) -> None:
        """What the comparison says of a candidate from now on."""
        self.services.reports[self.digest(version)] = said

    async def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """As a user would; the node and the services go on meanwhile."""
        return await asyncio.to_thread(self.cluster.kubectl, "-n", self.namespace, *arguments, stdin=stdin, check=check)

    async def apply(self, name: str, version: int | str, **spec: Any) -> None:
        """As `kubectl apply` does."""
        source = {"model": self.model, "version": str(version)}
        body = {"apiVersion": API, "kind": KIND, "metadata": {"name": name}, "spec": {"source": source, **spec}}
        await self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(body))

    async def get(self, name: str) -> dict[str, Any]:
        path = f"/apis/{API}/namespaces/{self.namespace}/anomalymodels/{name}"
        found: dict[str, Any] = await self.api.request("GET", path)
        return found

    async def until(self, name: str, holds: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Wait until the resource's status is so."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            body = await self.get(name)
            with contextlib.suppress(KeyError):
                if holds(body["status"]) and body["status"]["observedGeneration"] == body["metadata"]["generation"]:
                    return dict(body["status"])
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: not {what}: {json.dumps(body.get('status'))}\n{self.operator.log()}")
            await asyncio.sleep(0.05)

    async def phase(self, name: str, phase: str) -> dict[str, Any]:
        """Wait for a phase."""
        return await self.until(name, lambda status: status["phase"] == phase, f"in phase {phase}")

    async def gone(self, name: str) -> None:
        """Wait until the resource is deleted."""
        deadline = time.monotonic() + DEADLINE_S
        with contextlib.suppress(NotFound):
            while True:
                body = await self.get(name)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} is still there: {body['metadata']}\n{self.operator.log()}")
                await asyncio.sleep(0.05)

    async def live(self) -> int | None:
        """The version of the test's model that serves."""
        route = await self.streams.routing.get(self.model)
        return route.live.version if route else None

    async def serves(self, version: int, threshold: float | None = None) -> None:
        """Wait until the routing table says so: the status, which is written before it, does not tell."""
        deadline = time.monotonic() + ROUTED_WITHIN_S
        while True:
            route = await self.streams.routing.get(self.model)
            if route is not None and (route.live.version, route.live.threshold) == (version, threshold):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"not version {version} at {threshold}: {route}\n{self.operator.log()}")
            await asyncio.sleep(0.01)

    async def deployments(self) -> list[str]:
        return [body["metadata"]["name"] for body in await self.api.list("apps/v1", "Deployment", self.namespace)]


@contextlib.asynccontextmanager
async def kube(cluster: LightCluster, folder: Path) -> AsyncIterator[Kube]:
    """An operator for every namespace."""
    # What kubectl and its plugin go by; other tests may have a cluster of their own.
    before = os.environ.get("KUBECONFIG")
    os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
    await asyncio.to_thread(cluster.kubectl, "apply", "--server-side", "-f", str(CRD))
    await asyncio.to_thread(
        cluster.kubectl, "wait", "--for=condition=Established", "crd/anomalymodels.vigil.dev", "--timeout=20s"
    )
    valkey = ValkeyProcess(folder / "valkey").start()
    services = Services()  # type: ignore[abstract]  # nothing else is asked for
    async with Api.connect(kopf.OperatorSettings()) as api, serving(services) as address:
        streams = await RedisStreams.connect(valkey.url)
        services.routing = streams.routing
        env = {
            **os.environ,
            "VIGIL_REDIS_URL": valkey.url,
            "VIGIL_STORAGE_ADDRESS": address,
            "VIGIL_SHADOW_ADDRESS": address,
            "VIGIL_WORKER_IMAGE": "localhost/vigil/inference:test",
            "VIGIL_OPERATOR_POD": "first",
            "VIGIL_HTTP_BIND_PORT": "0",
            "VIGIL_METRICS_PORT": "0",
        }
        operator = OperatorProcess(env, folder / "operator.log")
        operator.start()
        node = Node(api)
        running = asyncio.create_task(node.run())
        try:
            yield Kube(cluster, api, node, services, streams, valkey, operator)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            operator.end(signal.SIGKILL)
            await node.close()
            await streams.close()
            valkey.kill()
            del os.environ["KUBECONFIG"]
            if before is not None:
                os.environ["KUBECONFIG"] = before
