"""A node's and the controllers' part in a cluster that has neither: pods of Deployments, as a test wants them to be.

Each pod has an address of its own in 127/8, where a real gRPC server describes what the pod has loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.shadow.v1 import shadow_pb2, shadow_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil_common.errors import VigilError
from vigil_operator.render import DIGEST_ANNOTATION, GRPC_PORT, MANAGER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_operator.cluster import Api

AT_ONCE = 16
SELECTOR = f"app.kubernetes.io/managed-by={MANAGER}"
Manifest = dict[str, Any]


def digest_of(model: str, version: int) -> str:
    """The digest of a version in these tests."""
    return f"sha256:{hashlib.sha256(f'{model} {version}'.encode()).hexdigest()}"


def waiting(reason: str, message: str = "") -> Manifest:
    """A container that can't start."""
    return {"state": {"waiting": {"reason": reason, "message": message}}, "restartCount": 0}


def ended(reason: str, message: str = "", *, restarts: int = 0) -> Manifest:
    """A container that ended and is started again."""
    terminated = {"exitCode": 137 if reason == "OOMKilled" else 1, "reason": reason, "message": message}
    return {
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
        "lastState": {"terminated": terminated},
        "restartCount": restarts,
    }


@dataclass
class Node:
    """Makes pods of Deployments until it is closed.

    Attributes:
        api: The API server.
        poll_s: How often it looks.
        broken: Container statuses of a version's pods by digest; ready where none is given.
        says: The digest that a version's pods say they have loaded, by digest.
        parity_failed: Digests whose parity samples come out otherwise.
    """

    api: Api
    poll_s: float = 0.05
    broken: dict[str, Manifest] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    parity_failed: set[str] = field(default_factory=set)
    created: dict[str, float] = field(default_factory=dict)
    _servers: dict[str, grpc.aio.Server] = field(default_factory=dict)
    _written: dict[str, str] = field(default_factory=dict)
    _addresses: dict[str, str] = field(default_factory=dict)

    async def run(self) -> None:
        """Look at the Deployments again and again."""
        while True:
            # Gone between two looks, or a server that is busy: the next look does it.
            with contextlib.suppress(VigilError):
                await self.once()
            await asyncio.sleep(self.poll_s)

    async def once(self) -> None:
        deployments = await self.api.list("apps/v1", "Deployment", None, SELECTOR)
        names = {f"{body['metadata']['namespace']}/{body['metadata']['name']}" for body in deployments}
        for start in range(0, len(deployments), AT_ONCE):
            await asyncio.gather(*(self._run_pod(body) for body in deployments[start : start + AT_ONCE]))
        for gone in set(self._written) - names:
            namespace, name = gone.split("/")
            await self.api.delete("v1", "Pod", namespace, f"{name}-0")
            del self._written[gone]

    async def _run_pod(self, deployment: Manifest) -> None:
        metadata = deployment["metadata"]
        key = f"{metadata['namespace']}/{metadata['name']}"
        digest = metadata["annotations"][DIGEST_ANNOTATION]
        self.created.setdefault(digest, asyncio.get_running_loop().time())
        container = self.broken.get(digest)
        state = json.dumps([metadata["uid"], metadata["generation"], container], sort_keys=True)
        if self._written.get(key) == state:
            return
        address = await self._serve(key, digest)
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{metadata['name']}-0",
                "namespace": metadata["namespace"],
                "labels": deployment["spec"]["template"]["metadata"]["labels"],
                "annotations": deployment["spec"]["template"]["metadata"]["annotations"],
            },
        }
        spec = {"containers": [{"name": "inference", "image": "x"}]}
        await self._apply({**pod, "spec": spec})
        ready = "False" if container else "True"
        shown = container or {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "restartCount": 0}
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": ready}],
            "containerStatuses": [
                {"name": "inference", "image": "x", "imageID": "", "ready": not container, "started": True, **shown}
            ],
        }
        await self._apply({**pod, "status": status}, subresource="status")
        replicas = deployment["spec"].get("replicas", 1)
        ready_replicas = 0 if container else replicas
        numbers = {
            "observedGeneration": metadata["generation"],
            "replicas": replicas,
            "updatedReplicas": replicas,
            "readyReplicas": ready_replicas,
            "availableReplicas": ready_replicas,
        }
        body = {"apiVersion": "apps/v1", "kind": "Deployment", "status": numbers}
        body["metadata"] = {"name": metadata["name"], "namespace": metadata["namespace"]}
        await self._apply(body, subresource="status")
        self._written[key] = state

    async def _apply(self, manifest: Manifest, *, subresource: str = "") -> None:
        api, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        root = "/api/v1" if api == "v1" else f"/apis/{api}"
        path = f"{root}/namespaces/{metadata['namespace']}/{kind.lower()}s/{metadata['name']}"
        await self.api.request(
            "PATCH",
            path + (f"/{subresource}" if subresource else ""),
            content_type="application/apply-patch+yaml",
            body=manifest,
            fieldManager="node",
            force="true",
        )

    async def _serve(self, key: str, digest: str) -> str:
        if key not in self._addresses:
            number = len(self._addresses) + 1
            address = f"127.1.{number // 250}.{number % 250 + 1}"
            # Taken before anything is waited for: many pods come at once.
            self._addresses[key] = address
            self._servers[key] = server = grpc.aio.server()
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Pod(self, digest), server)  # type: ignore[abstract]  # only asked that
            server.add_insecure_port(f"{address}:{GRPC_PORT}")
            await server.start()
        return self._addresses[key]

    async def close(self) -> None:
        await asyncio.gather(*(server.stop(0) for server in self._servers.values()))


class _Pod(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, node: Node, digest: str) -> None:
        self._node = node
        self._digest = digest

    async def Describe(self, _: inference_pb2.DescribeRequest, __: Any) -> inference_pb2.DescribeResponse:  # noqa: N802
        said = inference_pb2.DescribeResponse(ready=True)
        said.model.digest = self._node.says.get(self._digest, self._digest)
        said.parity.add(sample="a.png", passed=self._digest not in self._node.parity_failed)
        return said


@dataclass
class Services(storage_pb2_grpc.ModelServiceServicer, shadow_pb2_grpc.ShadowServiceServicer):
    """Storage's and shadow's answers, over real gRPC, as a test sets them.

    Attributes:
        published: Versions by model.
        reports: What the comparison says, by the candidate's digest; nothing where none is given.
        routing: Says what is compared.
    """

    published: dict[str, list[int]] = field(default_factory=dict)
    reports: dict[str, shadow_pb2.Report] = field(default_factory=dict)
    routing: Any = None

    async def List(self, request: storage_pb2.ListRequest, _: Any) -> storage_pb2.ListResponse:  # noqa: N802
        response = storage_pb2.ListResponse()
        for model, versions in self.published.items():
            for version in versions if request.name in ("", model) else ():
                added = response.models.add()
                added.version.name, added.version.version, added.version.digest = (
                    model,
                    version,
                    digest_of(model, version),
                )
        return response

    async def GetReport(  # noqa: N802
        self, request: shadow_pb2.GetReportRequest, context: Any
    ) -> shadow_pb2.GetReportResponse:
        route = await self.routing.get(request.model)
        found = self.reports.get(route.candidate.digest) if route is not None and route.candidate else None
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "nothing is compared")
            raise AssertionError("abort raises")
        report = shadow_pb2.Report()
        report.CopyFrom(found)
        report.run = str(route.comparison)
        return shadow_pb2.GetReportResponse(report=report)


def report(*, frames: int = 5000, flips: int = 10, minutes: int = 60) -> shadow_pb2.Report:
    """A comparison; by default one that passes."""
    found = shadow_pb2.Report(frames=frames, live_anomalous=frames // 10, new_alarms=flips)
    found.compared_for.FromSeconds(minutes * 60)
    found.latency.ratio, found.latency.ratio_low, found.latency.ratio_high = 1.0, 0.9, 1.1
    return found


@contextlib.asynccontextmanager
async def serving(services: Services) -> AsyncIterator[str]:
    """Its address."""
    server = grpc.aio.server()
    storage_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
    shadow_pb2_grpc.add_ShadowServiceServicer_to_server(services, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
