"""What is applied to the cluster, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
from vigil_common.config import SecuritySettings
from vigil_common.errors import Conflict, InvalidInput, NotFound
from vigil_operator.cluster import path_of
from vigil_operator.observed import Resource
from vigil_operator.render import WorkerSettings, build_model, build_service, build_workers
from vigil_operator.spec import Spec
from vigil_operator.workers import KubernetesWorkers

DIGEST = f"sha256:{'ab' * 32}"
SETTINGS = WorkerSettings(image="inference:1", redis_url="redis://valkey:6379/0", storage_address="storage:50053")


class Server:
    """Objects as an API server keeps them."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.asked = 0

    def put(self, body: dict[str, Any]) -> None:
        metadata = body["metadata"]
        self.objects[path_of(body["apiVersion"], body["kind"], metadata["namespace"], metadata["name"])] = body

    async def has(self, _: str) -> bool:
        return False

    async def list(self, _: str, kind: str, namespace: str | None, selector: str) -> list[dict[str, Any]]:
        del namespace
        ours = selector.partition("=")[2].partition(",")[0]
        label = "app.kubernetes.io/managed-by"
        found = [body for body in self.objects.values() if body["kind"] == kind]
        return [body for body in found if body["metadata"]["labels"].get(label) == ours]

    async def get(self, api: str, kind: str, namespace: str, name: str) -> dict[str, Any]:
        self.asked += 1
        try:
            return self.objects[path_of(api, kind, namespace, name)]
        except KeyError:
            raise NotFound("NOT_IN_CLUSTER", name) from None

    async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        self.put(body)
        return body


def resource(name: str) -> Resource:
    spec = Spec.model_validate({"source": {"model": "cells", "version": "1"}})
    return Resource(name, "line-1", "1-2-3", 1, spec, None, "")


async def workers_on(server: Server) -> KubernetesWorkers:
    api: Any = server
    workers = KubernetesWorkers(api, SETTINGS, SecuritySettings())
    await workers.load((None,))
    return workers


async def test_what_somebody_else_made_is_never_written_over_nor_anything_beside_it() -> None:
    server = Server()
    theirs = build_service(resource("storage"), DIGEST)
    theirs["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "Helm"}
    server.put(theirs)
    workers = await workers_on(server)
    with pytest.raises(Conflict, match="Service vigil-storage is there already") as refused:
        await workers.ensure_model(resource("storage"), DIGEST)
    assert refused.value.reason == "NAME_TAKEN"
    assert list(server.objects.values()) == [theirs]


async def test_a_name_that_is_taken_is_known_before_anything_is_live() -> None:
    server = Server()
    theirs = build_service(resource("storage"), DIGEST)
    theirs["metadata"]["labels"] = {}
    server.put(theirs)
    workers = await workers_on(server)
    with pytest.raises(Conflict):
        await workers.ensure_model(resource("storage"), None)


async def test_what_is_ours_is_applied_after_a_start_and_asked_for_by_lists_alone() -> None:
    server = Server()
    for body in build_model(resource("cells"), SETTINGS, DIGEST):
        body["metadata"]["labels"]["stale"] = "yes"
        server.put(body)
    workers = await workers_on(server)
    await workers.ensure_model(resource("cells"), DIGEST)
    assert server.asked == 0
    assert not any("stale" in body["metadata"]["labels"] for body in server.objects.values())


async def test_a_new_models_names_are_asked_for_once_and_its_services_again_when_it_is_made() -> None:
    server = Server()
    workers = await workers_on(server)
    for live, asked in ((None, 4), (None, 4), (DIGEST, 5), (DIGEST, 5)):
        await workers.ensure_model(resource("cells"), live)
        assert server.asked == asked
    assert len(server.objects) == 4


class WithKeda(Server):
    """A server whose KEDA has come, and which refuses to scale what has another scaler, as KEDA's webhook does."""

    async def has(self, _: str) -> bool:
        return True

    async def delete(self, api: str, kind: str, namespace: str, name: str) -> None:
        self.objects.pop(path_of(api, kind, namespace, name), None)

    async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["kind"] == "ScaledObject" and any("HorizontalPod" in other["kind"] for other in self.objects.values()):
            raise InvalidInput("CLUSTER_REFUSED", "the workload is already managed by the hpa")
        return await super().apply(body)


async def test_keda_that_came_later_takes_over_from_the_other_scaler() -> None:
    spec = Spec.model_validate({"source": {"model": "cells", "version": "1"}, "autoscaling": {}})
    cells = Resource("cells", "line-1", "1-2-3", 1, spec, None, "")
    server = WithKeda()
    for body in build_workers(cells, SETTINGS, 1, DIGEST, spec.runtime.numerics):
        server.put(body)
    workers = await workers_on(server)
    await workers.ensure(cells, 1, DIGEST, spec.runtime.numerics)
    kinds = {body["kind"] for body in server.objects.values()}
    assert kinds == {"Deployment", "PodDisruptionBudget", "ScaledObject"}
