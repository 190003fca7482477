"""Workers in Kubernetes: what is seen of Deployments and Pods, kept by watching, and what is applied."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vigil_common.errors import Conflict, NotFound

from vigil_operator import metrics
from vigil_operator.diagnose import problems_of
from vigil_operator.observed import NAME_TAKEN, Description, Workload
from vigil_operator.remote import describe
from vigil_operator.render import (
    DIGEST_ANNOTATION,
    DIGEST_LABEL,
    GRPC_PORT,
    MANAGER,
    MODEL_LABEL,
    NUMERICS_ANNOTATION,
    Manifest,
    WorkerSettings,
    build_model,
    build_workers,
    revision,
    server_name,
    service_name,
    short,
    workers_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vigil_common.config import SecuritySettings

    from vigil_operator.cluster import Api
    from vigil_operator.observed import Resource
    from vigil_operator.spec import Numerics

SELECTOR = f"app.kubernetes.io/managed-by={MANAGER},{MODEL_LABEL}"
# Kinds that are not watched are applied again this often, seconds.
REAPPLY_S = 600.0
# Kinds that a model has once.
MODEL_KINDS = (
    ("v1", "ServiceAccount"),
    ("v1", "ConfigMap"),
    ("v1", "Service"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("keda.sh/v1alpha1", "TriggerAuthentication"),
)
# Kinds that a version may have, beside its Deployment.
VERSION_KINDS = (
    ("policy/v1", "PodDisruptionBudget"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("keda.sh/v1alpha1", "ScaledObject"),
)
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Applied:
    """What was written last: its hash, the generation that it made, and when."""

    content: str
    generation: int
    at_s: float


class Cache:
    """Objects of one kind by the resource that they are for, as last seen."""

    def __init__(self) -> None:
        self._objects: dict[Key, dict[str, Manifest]] = {}

    def put(self, body: Manifest) -> Key | None:
        """Take a newer state in; the resource that it is about."""
        key = owner_of(body)
        if key is not None:
            known = self._objects.setdefault(key, {})
            old = known.get(body["metadata"]["name"])
            if old is None or revision(old) <= revision(body):
                known[body["metadata"]["name"]] = body
        return key

    def drop(self, body: Manifest) -> Key | None:
        """It is gone."""
        key = owner_of(body)
        if key is not None:
            self._objects.get(key, {}).pop(body["metadata"]["name"], None)
        return key

    def replace(self, bodies: list[Manifest]) -> None:
        """All there is."""
        self._objects.clear()
        for body in bodies:
            self.put(body)

    def of(self, key: Key) -> list[Manifest]:
        """What a resource has."""
        return list(self._objects.get(key, {}).values())

    def find(self, key: Key, name: str) -> Manifest | None:
        """One of them."""
        return self._objects.get(key, {}).get(name)


def owner_of(body: Manifest) -> Key | None:
    """Namespace and name of the AnomalyModel that an object is for."""
    metadata = body["metadata"]
    name = metadata.get("labels", {}).get(MODEL_LABEL)
    return (metadata["namespace"], name) if name else None


class KubernetesWorkers:
    """Workers of every resource.

    Args:
        api: The API server.
        settings: What workers have in common.
        security: How to call them.
    """

    def __init__(self, api: Api, settings: WorkerSettings, security: SecuritySettings) -> None:
        self.deployments, self.pods = Cache(), Cache()
        self._api = api
        self._settings = settings
        self._security = security
        self._applied: dict[tuple[str, str, str], _Applied] = {}
        self._described: dict[tuple[str, int], Description] = {}
        # For which live version a resource's names were found to be its own, or free.
        self._free: dict[Key, str | None] = {}

    async def load(self, places: tuple[str | None, ...]) -> None:
        """See everything once, so that nothing looks missing that was not seen yet."""
        self._settings = replace(self._settings, keda=await self._api.has("keda.sh/v1alpha1"))
        for api, kind, cache in (("apps/v1", "Deployment", self.deployments), ("v1", "Pod", self.pods)):
            found = [body for place in places for body in await self._api.list(api, kind, place, SELECTOR)]
            cache.replace(found)
        for api, kind in (*MODEL_KINDS, *VERSION_KINDS):
            if api.startswith("keda.sh/") and not self._settings.keda:
                continue
            for body in [body for place in places for body in await self._api.list(api, kind, place, SELECTOR)]:
                metadata = body["metadata"]
                # What it says is not known, so it is applied again, or deleted.
                self._applied[kind, metadata["namespace"], metadata["name"]] = _Applied("", 0, 0.0)

    async def observe(self, resource: Resource, *, describe: str | None) -> Mapping[str, Workload]:
        """From what was seen; only descriptions are asked for."""
        key = (resource.namespace, resource.name)
        pods = self.pods.of(key)
        found: dict[str, Workload] = {}
        for deployment in self.deployments.of(key):
            digest = deployment["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION)
            if digest is None or "deletionTimestamp" in deployment["metadata"]:
                continue
            own = [pod for pod in pods if pod["metadata"]["labels"].get(DIGEST_LABEL) == short(digest)]
            status = deployment.get("status", {})
            found[digest] = Workload(
                digest=digest,
                desired=deployment["spec"].get("replicas", 1),
                ready=status.get("readyReplicas", 0),
                problems=problems_of(deployment, own),
                described=await self._descriptions(resource, own) if digest == describe else (),
            )
        return found

    async def _descriptions(self, resource: Resource, pods: list[Manifest]) -> tuple[Description, ...]:
        """What ready pods say; each is asked once per start."""
        ready = [pod for pod in pods if _is_ready(pod) and pod["status"].get("podIP")]
        said = await asyncio.gather(*(self._description(resource, pod) for pod in ready))
        return tuple(description for description in said if description is not None)

    async def _description(self, resource: Resource, pod: Manifest) -> Description | None:
        starts = sum(status.get("restartCount", 0) for status in pod["status"].get("containerStatuses", ()))
        key = (pod["metadata"]["uid"], starts)
        if key not in self._described:
            address = pod["status"]["podIP"]
            address = f"[{address}]" if ":" in address else address
            name = pod["metadata"]["name"]
            said = await describe(f"{address}:{GRPC_PORT}", name, self._security, server_name(resource))
            if said is None:
                return None
            numerics = pod["metadata"].get("annotations", {}).get(NUMERICS_ANNOTATION)
            self._described[key] = replace(said, numerics=numerics)
        return self._described[key]

    def forget_pod(self, pod: Manifest) -> None:
        """It is gone."""
        uid = pod["metadata"]["uid"]
        for key in [key for key in self._described if key[0] == uid]:
            del self._described[key]

    async def ensure_model(self, resource: Resource, live: str | None) -> None:
        """Apply what a model has once, where it is not there as it should be.

        Raises:
            Conflict: NAME_TAKEN: somebody else has made an object of that name, and nothing is touched.
        """
        await self._check_names(resource, live)
        for manifest in build_model(resource, self._settings, live):
            await self._ensure(resource, manifest)

    async def _check_names(self, resource: Resource, live: str | None) -> None:
        """Applied, it would be taken over, and removed with the resource: a part of Vigil itself may be named so."""
        key, name = (resource.namespace, resource.name), service_name(resource)
        if key in self._free and self._free[key] == live:
            return
        for api, kind in MODEL_KINDS:
            ours = (kind, resource.namespace, name) in self._applied
            if ours or (api.startswith("keda.sh/") and not self._settings.keda):
                continue
            with suppress(NotFound):
                if owner_of(await self._api.get(api, kind, resource.namespace, name)) != key:
                    message = f"{kind} {name} is there already and not of this AnomalyModel: give it another name"
                    raise Conflict(NAME_TAKEN, message)
        self._free[key] = live

    async def ensure(self, resource: Resource, version: int, digest: str, numerics: Numerics) -> None:
        """Apply what a version has, where it is not there as it should be."""
        manifests = build_workers(resource, self._settings, version, digest, numerics)
        kept = {manifest["kind"] for manifest in manifests}
        # First: KEDA refuses to scale what has another scaler.
        await self._delete_others(resource.namespace, workers_name(resource, digest), kept)
        for manifest in manifests:
            await self._ensure(resource, manifest)

    async def _delete_others(self, namespace: str, name: str, kept: set[str]) -> None:
        """What a version has no more."""
        for api, kind in VERSION_KINDS:
            if kind not in kept and (kind, namespace, name) in self._applied:
                await self._api.delete(api, kind, namespace, name)
                del self._applied[kind, namespace, name]

    async def _ensure(self, resource: Resource, manifest: Manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        key = (kind, resource.namespace, name)
        content = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        applied = self._applied.get(key)
        seen = self.deployments.find((resource.namespace, resource.name), name) if kind == "Deployment" else None
        if applied is not None and applied.content == content:
            if kind == "Deployment":
                # Somebody else's change makes another generation.
                same = seen is not None and seen["metadata"].get("generation") == applied.generation
            else:
                same = time.monotonic() - applied.at_s < REAPPLY_S
            if same:
                return
        scaling = resource.spec.autoscaling
        if kind == "Deployment" and scaling is not None:
            # Left out, it would fall to one; as it is, the scaler's own changes stay.
            now = seen["spec"].get("replicas", scaling.min) if seen is not None else scaling.min
            replicas = min(max(now, scaling.min), scaling.max)
            manifest = {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}
        made = await self._api.apply(manifest)
        metrics.APPLIED.labels(kind).inc()
        if kind == "Deployment":
            self.deployments.put(made)
        self._applied[key] = _Applied(content, made["metadata"].get("generation", 0), time.monotonic())

    async def remove(self, resource: Resource, digest: str) -> None:
        """Delete a version's Deployment and what belongs to it."""
        key = (resource.namespace, resource.name)
        for deployment in self.deployments.of(key):
            if deployment["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION) == digest:
                name = deployment["metadata"]["name"]
                await self._delete_others(resource.namespace, name, set())
                await self._api.delete("apps/v1", "Deployment", resource.namespace, name)
                self._applied.pop(("Deployment", resource.namespace, name), None)
                self.deployments.drop(deployment)

    def forget(self, key: Key) -> None:
        """The resource is gone: so is what was applied for it."""
        namespace, name = key
        self._free.pop(key, None)
        for applied in [
            k for k in self._applied if k[1] == namespace and (k[2].startswith(f"{name}-") or k[2] == f"vigil-{name}")
        ]:
            del self._applied[applied]


def _is_ready(pod: Manifest) -> bool:
    conditions: list[dict[str, Any]] = pod.get("status", {}).get("conditions", [])
    return "deletionTimestamp" not in pod["metadata"] and any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions
    )
