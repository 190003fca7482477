"""The operator on one machine: the same plan as in Kubernetes, with workers as processes and resources as files."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vigil_common.config import SecuritySettings
from vigil_common.errors import NotFound, VigilError
from vigil_common.logging import get_logger
from vigil_common.streams.redis import RedisStreams
from vigil_operator.diagnose import RESTARTS_FINAL, last_words
from vigil_operator.observed import Problem, Workload
from vigil_operator.reconcile import Reconciler
from vigil_operator.remote import GrpcRegistry, GrpcReports, describe
from vigil_operator.render import numerics_environment, runtime_environment, short
from vigil_operator.resource import resource_of, status_of

from vigil_cli.local.resources import NAMESPACE, ResourceFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vigil_common.streams.ports import RoutingTable
    from vigil_operator.actions import Emit
    from vigil_operator.observed import Description, Resource
    from vigil_operator.spec import Numerics
    from vigil_operator.status import Status

    from vigil_cli.local.stack import LocalStack

POLL_S = 0.2
# A worker that ended is started again after so long, times its restarts.
BACKOFF_S = 1.0
# One that had run for so long begins to count anew.
STEADY_S = 600.0

# As the routing table names who decides; see `Resource.full_name`.
_OURS = f"{NAMESPACE}/"

log = get_logger()


@dataclass
class _Started:
    """A worker's process."""

    settings: dict[str, str]
    numerics: str
    since: float
    restarts: int = 0
    again_at: float = 0.0
    said: Description | None = None


@dataclass
class LocalWorkers:
    """Workers as processes of a stack."""

    stack: LocalStack
    clock: Callable[[], float] = time.monotonic
    _started: dict[str, dict[str, _Started]] = field(default_factory=dict)

    def _key(self, resource: Resource, digest: str) -> str:
        return f"{resource.name}/{digest}"

    async def observe(self, resource: Resource, *, describe: str | None) -> Mapping[str, Workload]:
        """What runs, and how it ended where it does not."""
        found = {}
        for key, processes in self._started.items():
            name, _, digest = key.partition("/")
            if name != resource.name:
                continue
            ready = [process for process in processes if await self.stack.ready(process)]
            said = [await self._describe(processes, process) for process in ready] if digest == describe else []
            problems = [problem for process in processes for problem in self._problems(processes[process], process)]
            described = tuple(description for description in said if description is not None)
            found[digest] = Workload(digest, len(processes), len(ready), tuple(problems), described)
        return found

    async def _describe(self, processes: dict[str, _Started], process: str) -> Description | None:
        started = processes[process]
        if started.said is None:
            said = await describe(self.stack.worker_addresses[process], process, SecuritySettings())
            started.said = said and replace(said, numerics=started.numerics)
        return started.said

    def _problems(self, started: _Started, process: str) -> list[Problem]:
        if self.stack.pid(process) is not None:
            return []
        tail = self.stack.tail(process)
        said = last_words(tail)
        often = self._failures(started) >= RESTARTS_FINAL
        if said is not None:
            reason, message, final = said
            return [Problem(reason, f"{process}: {message}", final=final or often)]
        return [Problem("CrashLoop", f"{process} ended: {tail.splitlines()[-1]}", final=often)]

    async def ensure_model(self, resource: Resource, live: str | None) -> None:
        """Frames come by the queue; who looks at pictures is led to the first of the live version's workers."""
        processes = self._started.get(self._key(resource, live), {}) if live is not None else {}
        self.stack.note_live(resource.spec.source.model, next(iter(processes), None))

    async def ensure(self, resource: Resource, version: int, digest: str, numerics: Numerics) -> None:
        """As many processes as there should be, with the settings that they should have."""
        processes = self._started.setdefault(self._key(resource, digest), {})
        spec = resource.spec
        count = spec.autoscaling.min if spec.autoscaling is not None else spec.replicas
        environment = {**runtime_environment(spec.runtime), **numerics_environment(numerics)}
        settings = {key.removeprefix("VIGIL_"): value for key, value in environment.items()}
        settings["MODEL_DIGEST"] = digest
        wanted = [f"worker-{resource.name}-{version}-{short(digest)}-{number}" for number in range(count)]
        for name in wanted:
            started = processes.get(name)
            if started is not None and started.settings != settings:
                await self._end(processes, name)
                started = None
            if started is None:
                processes[name] = _Started(settings, str(numerics), self.clock())
                self.stack.launch_worker(name, spec.source.model, version, **settings)
            elif self.stack.pid(name) is None:
                self._again(started, name, spec.source.model, version)
        for name in set(processes) - set(wanted):
            await self._end(processes, name)

    def _failures(self, started: _Started) -> int:
        """How often it has failed in a row."""
        return 0 if self.clock() - started.since >= STEADY_S else started.restarts

    def _again(self, started: _Started, name: str, model: str, version: int) -> None:
        now = self.clock()
        if not started.again_at:
            started.restarts = self._failures(started)
            started.again_at = now + BACKOFF_S * (1 + started.restarts)
            self.stack.say_that_it_ended(name)
        elif now >= started.again_at:
            started.restarts, started.again_at, started.said, started.since = started.restarts + 1, 0.0, None, now
            self.stack.launch_worker(name, model, version, **started.settings)

    async def remove(self, resource: Resource, digest: str) -> None:
        """End a version's processes in order."""
        processes = self._started.pop(self._key(resource, digest), {})
        for name in list(processes):
            await self._end(processes, name)

    async def remove_all(self, name: str) -> None:
        """End all processes of a resource."""
        for key in [key for key in self._started if key.startswith(f"{name}/")]:
            processes = self._started.pop(key)
            for process in list(processes):
                await self._end(processes, process)

    async def _end(self, processes: dict[str, _Started], name: str) -> None:
        del processes[name]
        await self.stack.remove_worker(name)


class LocalNotes:
    """Status as a file, events as lines."""

    def __init__(self, files: ResourceFiles, stack: LocalStack) -> None:
        self._files = files
        self._stack = stack

    async def write_status(self, resource: Resource, status: Status) -> None:
        """Replace the whole status."""
        self._files.write_status(resource.name, status.to_json())

    async def emit(self, resource: Resource, event: Emit) -> None:
        """Tell people."""
        self._stack.log(f"{resource.name}: {event.reason}: {event.message}")


async def look_after(stack: LocalStack, stop: asyncio.Event) -> None:
    """Bring the resources in the stack's folder to what they ask for, until stopped."""
    files = ResourceFiles(stack.folder)
    workers = LocalWorkers(stack)
    streams = await RedisStreams.connect(stack.redis_url, security=SecuritySettings())
    from vigil_common.grpc.security import connect  # noqa: PLC0415 - gRPC forks badly, so it comes last

    async with (
        connect(stack.storage_address, SecuritySettings()) as storage,
        connect(stack.shadow_address, SecuritySettings()) as shadow,
    ):
        registry = GrpcRegistry(storage)
        reconciler = Reconciler(
            workers=workers,
            notes=LocalNotes(files, stack),
            registry=registry,
            routing=streams.routing,
            reports=GrpcReports(shadow),
        )
        following = asyncio.create_task(registry.follow(stop))
        try:
            await _loop(files, workers, reconciler, streams, stop)
        finally:
            stop.set()
            await following
            await streams.close()


async def _routed(routing: RoutingTable) -> dict[str, str]:
    """Resources that have a route, and their models: some may have been deleted while no platform ran."""
    routes = [await routing.get(model) for model in await routing.models()]
    return {
        route.managed_by.removeprefix(_OURS): route.model
        for route in routes
        if route is not None and route.managed_by.startswith(_OURS)
    }


async def _loop(
    files: ResourceFiles, workers: LocalWorkers, reconciler: Reconciler, streams: RedisStreams, stop: asyncio.Event
) -> None:
    known: dict[str, str] = {}
    with suppress(VigilError):
        known = await _routed(streams.routing)
    while not stop.is_set():
        bodies = {}
        for name in files.names():
            with suppress(NotFound):
                bodies[name] = files.get(name)
        owners: dict[str, str] = {}
        for name in sorted(bodies, key=lambda name: bodies[name]["metadata"]["creationTimestamp"]):
            owners.setdefault(bodies[name]["spec"]["source"]["model"], name)
        for name in set(known) - set(bodies):
            await workers.remove_all(name)
            files.drop_status(name)
            model = known.pop(name)
            if model not in owners:
                workers.stack.note_live(model, None)
                with suppress(VigilError):
                    await streams.routing.remove(model)
        for name, body in bodies.items():
            model = known[name] = body["spec"]["source"]["model"]
            taken_by = "" if owners[model] == name else owners[model]
            try:
                await reconciler.reconcile(resource_of(body), status_of(body), taken_by)
            except VigilError as error:
                log.warning("reconcile_failed", resource=name, reason=error.reason, detail=error.message)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_S)
