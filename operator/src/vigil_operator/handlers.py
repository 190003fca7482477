"""What kopf calls: thin, they wake the loop of the resource that something happened to."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import kopf
from pydantic import ValidationError
from vigil_common.errors import NotFound, Unavailable, VigilError
from vigil_common.logging import get_logger

from vigil_operator import metrics
from vigil_operator.actions import Emit
from vigil_operator.observed import REQUEST_ANNOTATION, Resource
from vigil_operator.render import MANAGER, MODEL_LABEL
from vigil_operator.resource import resource_of, status_of
from vigil_operator.spec import GROUP, PLURAL, VERSION, Spec
from vigil_operator.status import Condition, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from vigil_common.streams.ports import RoutingTable

    from vigil_operator.reconcile import Notes, Reconciler
    from vigil_operator.workers import Key, KubernetesWorkers

RETRY_S = 2.0
# So often a deletion tries to take the route out before it lets the resource go all the same.
DELETE_TRIES = 10
DELETE_DELAY_S = 1.0
WATCHED: dict[str, Any] = {"app.kubernetes.io/managed-by": MANAGER, MODEL_LABEL: kopf.PRESENT}
log = get_logger()


class Loops:
    """One loop per resource, what wakes it, and who has which model.

    Args:
        reconciler: Does the work.
        workers: Are told what happens to Deployments and Pods.
        notes: For what the loop itself has to say.
        routing: For deletions.
        clock: The time.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        workers: KubernetesWorkers,
        notes: Notes,
        routing: RoutingTable,
        clock: Callable[[], datetime],
    ) -> None:
        self._reconciler = reconciler
        self._workers = workers
        self._notes = notes
        self._routing = routing
        self._clock = clock
        self._wakes: dict[Key, asyncio.Event] = {}
        self._locks: dict[Key, asyncio.Lock] = {}
        # By uid: another resource of the same name may follow.
        self._deleted: set[str] = set()
        # What each resource asked for when it was last seen: what its loop writes itself need not wake it.
        self._asked: dict[Key, tuple[Any, ...]] = {}
        # Model -> its resources, the oldest first.
        self._claims: dict[str, list[tuple[str, Key]]] = {}

    # --- who has a model

    def claim(self, body: Mapping[str, Any]) -> None:
        """A resource is there."""
        metadata = body["metadata"]
        claim = (metadata["creationTimestamp"], (metadata["namespace"], metadata["name"]))
        claims = self._claims.setdefault(body["spec"]["source"]["model"], [])
        if claim not in claims:
            claims.append(claim)
            claims.sort()

    def release(self, body: Mapping[str, Any]) -> None:
        """A resource is gone; the next one has its model."""
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        model = body["spec"]["source"]["model"]
        left = [claim for claim in self._claims.get(model, []) if claim[1] != key]
        self._claims[model] = left
        self._deleted.discard(metadata["uid"])
        self._locks.pop(key, None)
        self._asked.pop(key, None)
        for _, other in left:
            self.wake(other)
        self._workers.forget(key)

    def taken_by(self, model: str, key: Key) -> str:
        """The older resource that has the model; empty where this one has it."""
        claims = self._claims.get(model, [])
        first = claims[0][1] if claims else key
        return "" if first == key else f"{first[0]}/{first[1]}"

    # --- waking

    def wake(self, key: Key) -> None:
        """Look at a resource now."""
        event = self._wakes.get(key)
        if event is not None:
            event.set()

    def seen(self, body: Mapping[str, Any]) -> None:
        """A resource is there, or has changed."""
        self.claim(body)
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        annotations = metadata.get("annotations", {})
        asked = (metadata["uid"], metadata.get("generation"), annotations.get(REQUEST_ANNOTATION))
        if self._asked.get(key) != asked:
            self._asked[key] = asked
            self.wake(key)

    def wake_models(self, models: set[str]) -> None:
        """Look at the resources of these models now."""
        for model in models:
            for _, key in self._claims.get(model, []):
                self.wake(key)

    # --- the loop

    async def run(self, body: Mapping[str, Any], stopped: Callable[[], bool]) -> None:
        """Keep a resource as it should be until it is gone."""
        key, uid = (body["metadata"]["namespace"], body["metadata"]["name"]), body["metadata"]["uid"]
        wake = self._wakes.setdefault(key, asyncio.Event())
        self.claim(body)
        metrics.RESOURCES.inc()
        status = status_of(body)
        try:
            while not stopped():
                wake.clear()
                async with self._locks.setdefault(key, asyncio.Lock()):
                    if uid in self._deleted:
                        return
                    status, wait_s = await self._once(body, key, status)
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), wait_s)
        finally:
            metrics.RESOURCES.dec()
            self._wakes.pop(key, None)

    async def _once(self, body: Mapping[str, Any], key: Key, status: Status) -> tuple[Status, float]:
        try:
            try:
                resource = resource_of(body)
            except ValidationError as error:
                return await self._invalid(body, status, error)
            return await self._reconciler.reconcile(resource, status, self.taken_by(resource.spec.source.model, key))
        except VigilError as error:
            log.warning(
                "reconcile_failed", resource=key[1], namespace=key[0], reason=error.reason, detail=error.message
            )
            return status, RETRY_S

    async def _invalid(self, body: Mapping[str, Any], status: Status, error: ValidationError) -> tuple[Status, float]:
        """What passed an older schema and makes no sense now: said in a condition, nothing is touched."""
        first = error.errors()[0]
        message = f"spec.{'.'.join(map(str, first['loc']))}: {first['msg']}"
        metadata = body["metadata"]
        generation = metadata.get("generation", 1)
        said = next((condition for condition in status.conditions if condition.type == "Synced"), None)
        if said is not None and (said.message, said.observed_generation) == (message, generation):
            return status, 60.0
        condition = Condition(
            type="Synced",
            status="False",
            reason="InvalidSpec",
            message=message,
            last_transition_time=said.last_transition_time if said and said.status == "False" else self._clock(),
            observed_generation=generation,
        )
        others = [other for other in status.conditions if other.type != "Synced"]
        status = status.model_copy(update={"conditions": [*others, condition], "observed_generation": generation})
        bare = Resource(
            metadata["name"],
            metadata["namespace"],
            metadata["uid"],
            generation,
            Spec.model_validate({"source": {"model": "unreadable", "version": "latest"}}),
            None,
            "",
        )
        await self._notes.write_status(bare, status)
        return status, 60.0

    async def delete(self, body: Mapping[str, Any]) -> None:
        """Take the route out, once; bounded, for a resource must be deletable whatever is away."""
        uid, key = body["metadata"]["uid"], (body["metadata"]["namespace"], body["metadata"]["name"])
        if uid in self._deleted:
            return
        # From now on its loop does nothing; what it is doing ends first.
        self._deleted.add(uid)
        async with self._locks.setdefault(key, asyncio.Lock()):
            self.wake(key)
            model = body["spec"]["source"]["model"]
            if self.taken_by(model, key) or status_of(body).live is None:
                return
            for attempt in range(DELETE_TRIES):
                try:
                    route = await self._routing.get(model)
                    if route is not None and route.managed_by not in ("", f"{key[0]}/{key[1]}"):
                        return  # another operator's resource has it
                    await self._routing.remove(model)
                except Unavailable as error:
                    away = error.message
                    await asyncio.sleep(DELETE_DELAY_S if attempt + 1 < DELETE_TRIES else 0)
                else:
                    return
        message = f"the queue still takes frames of model {model}, for it could not be reached: {away}"
        log.warning("route_left", resource=key[1], namespace=key[0], detail=message)
        with suppress(VigilError, ValidationError):
            await self._notes.emit(resource_of(body), Emit("RouteLeft", message, warning=True))


def register(loops: Loops, workers: KubernetesWorkers) -> kopf.OperatorRegistry:
    """Everything that kopf calls."""
    registry = kopf.OperatorRegistry()
    resource = (GROUP, VERSION, PLURAL)

    @kopf.on.event(*resource, registry=registry)
    async def model_seen(event: kopf.RawEvent, **_: Any) -> None:
        body = event["object"]
        if event["type"] == "DELETED":
            loops.release(body)
        elif "deletionTimestamp" in body["metadata"]:
            # Before kopf lets it go; a deletion handler would have kopf compare each state with the last.
            await loops.delete(body)
        else:
            loops.seen(body)

    @kopf.daemon(
        *resource, registry=registry, cancellation_backoff=1.0, cancellation_timeout=5.0, cancellation_polling=1.0
    )
    async def look_after(body: kopf.Body, stopped: kopf.DaemonStopped, **_: Any) -> None:
        with suppress(NotFound):
            await loops.run(body, lambda: bool(stopped))

    @kopf.on.event("apps", "v1", "deployments", labels=WATCHED, registry=registry)
    async def deployment_seen(event: kopf.RawEvent, **_: Any) -> None:
        body = _slim(event["object"])
        key = workers.deployments.drop(body) if event["type"] == "DELETED" else workers.deployments.put(body)
        if key is not None:
            loops.wake(key)

    @kopf.on.event("", "v1", "pods", labels=WATCHED, registry=registry)
    async def pod_seen(event: kopf.RawEvent, **_: Any) -> None:
        body = _slim(event["object"])
        if event["type"] == "DELETED":
            workers.forget_pod(body)
        key = workers.pods.drop(body) if event["type"] == "DELETED" else workers.pods.put(body)
        if key is not None:
            loops.wake(key)

    return registry


def _slim(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without what nobody reads, which is the larger part."""
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    return {**body, "metadata": metadata}
