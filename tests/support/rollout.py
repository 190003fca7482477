"""A small world for the operator's plan: a registry, workers, comparisons and a clock that a test moves."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from vigil_common.errors import Conflict, InvalidInput, Unavailable
from vigil_common.evidence import ReportNumbers
from vigil_common.streams.memory import MemoryStreams
from vigil_operator.observed import Description, Problem, Published, Report, Request, Resource, Workload
from vigil_operator.reconcile import Reconciler
from vigil_operator.spec import Spec
from vigil_operator.status import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vigil_common.streams.ports import Route
    from vigil_operator.actions import Emit
    from vigil_operator.spec import Numerics, Source

MODEL = "cells"
START = datetime(2026, 1, 1, tzinfo=UTC)
GOOD = ReportNumbers(
    frames=5000,
    live_anomalous=500,
    new_alarms=5,
    new_misses=5,
    latency_ratio=1.0,
    latency_ratio_low=0.9,
    latency_ratio_high=1.1,
)
BAD = replace(GOOD, new_alarms=1000)
FEW = replace(GOOD, frames=20, live_anomalous=1, new_alarms=0, new_misses=0)


class Cut(Exception):
    """The operator was killed right here."""


def digest_of(version: int) -> str:
    """The digest of a version in this world."""
    return f"sha256:{version:064x}"


def spec_of(version: int | str = 1, **more: Any) -> dict[str, Any]:
    """A resource's spec."""
    return {"source": {"model": MODEL, "version": str(version)}, **more}


@dataclass
class World:
    """Everything around one resource.

    Attributes:
        published: Versions in the registry.
        verdicts: What the comparison says of a candidate, by version; good where none is given.
        broken: Problems of a version's workers, by version.
        away: Parts that do not answer: "registry", "routing", "shadow", "cluster".
        cut_after: The operator is killed after so many actions.
        report: The comparison under way, or the last one, as it was last asked for.
        name_taken: Somebody else has made what the model's objects are named.
        refused: Why Kubernetes will not have a version's workers, by version.
        full: The quota that has no room for a version's workers, by version.
        namespaces: Whose resources the operator looks after; empty for all.
        writes: How often the status was written.
    """

    published: list[int] = field(default_factory=lambda: [1])
    deprecated: set[int] = field(default_factory=set)
    verdicts: dict[int, ReportNumbers | None] = field(default_factory=dict)
    broken: dict[int, Problem] = field(default_factory=dict)
    loaded: dict[int, Description] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    now: datetime = START
    spec: dict[str, Any] = field(default_factory=spec_of)
    generation: int = 1
    request: str = ""
    status: Status = field(default_factory=Status)
    workers: dict[str, int] = field(default_factory=dict)
    numerics: dict[str, Numerics] = field(default_factory=dict)
    live_service: str | None = None
    events: list[Emit] = field(default_factory=list)
    actions: int = 0
    cut_after: int | None = None
    routes_seen: list[str] = field(default_factory=list)
    report: Report | None = None
    name_taken: bool = False
    refused: dict[int, str] = field(default_factory=dict)
    full: dict[int, str] = field(default_factory=dict)
    namespaces: tuple[str, ...] = ()
    writes: int = 0

    def __post_init__(self) -> None:
        self.streams = MemoryStreams()
        self.wake_after_s = 0.0
        self.restart()

    def restart(self) -> None:
        """A new operator, which knows what is written and nothing else."""
        self.reconciler = Reconciler(
            workers=_Workers(self),
            notes=_Notes(self),
            registry=_Registry(self),
            routing=_Routing(self),  # type: ignore[arg-type]  # the rest of the port is not the operator's
            reports=_Reports(self),
            namespaces=self.namespaces,
            clock=lambda: self.now,
        )

    def apply(self, spec: dict[str, Any]) -> None:
        """As `kubectl apply` does."""
        if spec != self.spec:
            self.spec = copy.deepcopy(spec)
            self.generation += 1

    def ask(self, verb: str, digest: str = "-") -> None:
        """As `kubectl vigil` does."""
        self.request = f"{verb} {digest} {self.generation}.{len(self.events)}.{self.now.timestamp()}"

    def resource(self) -> Resource:
        """The resource as the operator reads it."""
        harmless = {"threshold", "replicas", "retention", "suspend"}
        tried = {key: value for key, value in self.spec.items() if key not in harmless}
        return Resource(
            name="solar",
            namespace="default",
            uid="1-2-3",
            generation=self.generation,
            spec=Spec.model_validate(self.spec),
            request=Request.parse({"vigil.dev/request": self.request}),
            attempt=hashlib.sha256(json.dumps(tried, sort_keys=True).encode()).hexdigest()[:16],
        )

    async def settle(self, seconds: float = 0.0) -> None:
        """Let time pass, and the operator do what it can."""
        self.now += timedelta(seconds=seconds)
        before = None
        # Workers that come or go wake it, too.
        while before != (now := (self.status, dict(self.workers))):
            before = now
            _, self.wake_after_s = await self.reconciler.reconcile(self.resource(), self.status)

    async def route(self) -> Route | None:
        """The routing table's record."""
        return await self.streams.routing.get(MODEL)

    async def live(self) -> int | None:
        """The version that serves."""
        route = await self.route()
        return route.live.version if route else None

    def condition(self, kind: str) -> tuple[str, str]:
        """Status and reason of a condition."""
        found = next(condition for condition in self.status.conditions if condition.type == kind)
        return found.status, found.reason

    def act(self) -> None:
        """Count an action, before it is done; the cut comes after the last one allowed."""
        if self.cut_after is not None and self.actions >= self.cut_after:
            raise Cut
        self.actions += 1

    def check(self, part: str) -> None:
        if part in self.away:
            raise Unavailable(f"{part.upper()}_UNAVAILABLE", f"{part} does not answer")


class _Workers:
    def __init__(self, world: World) -> None:
        self.world = world

    async def observe(self, _: Resource, *, describe: str | None) -> Mapping[str, Workload]:
        self.world.check("cluster")
        return {digest: self._workload(digest, version, describe) for digest, version in self.world.workers.items()}

    def _workload(self, digest: str, version: int, describe: str | None) -> Workload:
        problem = self.world.broken.get(version)
        if problem is not None:
            return Workload(digest, 1, 0, problems=(problem,))
        said = self.world.loaded.get(version, Description("worker", digest, 0, str(self.world.numerics[digest])))
        return Workload(digest, 1, 1, described=(said,) if describe == digest else ())

    async def ensure_model(self, _: Resource, live: str | None) -> None:
        if self.world.name_taken:
            raise Conflict("NAME_TAKEN", "Service vigil-solar is there already")
        if self.world.live_service != live:
            self.world.check("cluster")
            self.world.act()
            self.world.live_service = live

    async def ensure(self, _: Resource, version: int, digest: str, numerics: Numerics) -> None:
        if why := self.world.refused.get(version):
            raise InvalidInput("CLUSTER_REFUSED", why)
        if quota := self.world.full.get(version):
            raise InvalidInput("QUOTA_EXCEEDED", f"exceeded quota: {quota}")
        if digest not in self.world.workers or self.world.numerics[digest] != numerics:
            self.world.check("cluster")
            self.world.act()
            self.world.workers[digest] = version
            self.world.numerics[digest] = numerics

    async def remove(self, _: Resource, digest: str) -> None:
        self.world.check("cluster")
        self.world.act()
        self.world.workers.pop(digest, None)


class _Notes:
    def __init__(self, world: World) -> None:
        self.world = world

    async def write_status(self, _: Resource, status: Status) -> None:
        self.world.check("cluster")
        self.world.act()
        self.world.writes += 1
        # Through JSON, as Kubernetes keeps it.
        self.world.status = Status.model_validate(json.loads(json.dumps(status.to_json())))

    async def emit(self, _: Resource, event: Emit) -> None:
        self.world.act()
        self.world.events.append(event)


class _Registry:
    def __init__(self, world: World) -> None:
        self.world = world

    async def versions(self, _: Source) -> tuple[Published, ...]:
        self.world.check("registry")
        deprecated = self.world.deprecated
        return tuple(Published(v, digest_of(v), deprecated=v in deprecated) for v in self.world.published)


class _Routing:
    def __init__(self, world: World) -> None:
        self.world = world

    async def get(self, model: str) -> Route | None:
        self.world.check("routing")
        return await self.world.streams.routing.get(model)

    async def kept_fraction(self, model: str) -> float | None:
        self.world.check("routing")
        return await self.world.streams.routing.kept_fraction(model)

    async def keep_fraction(self, model: str, fraction: float | None) -> None:
        self.world.check("routing")
        self.world.act()
        await self.world.streams.routing.keep_fraction(model, fraction)

    async def write(self, model: str, **roles: Any) -> Route:
        self.world.check("routing")
        self.world.act()
        self.world.routes_seen.append(roles["live"].digest)
        return await self.world.streams.routing.write(model, **roles)


class _Reports:
    def __init__(self, world: World) -> None:
        self.world = world

    async def report(self, _: str) -> Report | None:
        self.world.check("shadow")
        route = await self.world.streams.routing.get(MODEL)
        if route is not None and route.candidate is not None:
            numbers = self.world.verdicts.get(route.candidate.version, GOOD)
            self.world.report = Report(str(route.comparison), numbers, 3600.0) if numbers else None
        return self.world.report
