"""One resource brought to what its plan says: observe, plan, carry out, until nothing is left to do at once.

The same loop runs in Kubernetes and on one machine; only the ports' adapters differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from vigil_common.audit import audit
from vigil_common.errors import InvalidInput, Unavailable, VigilError
from vigil_common.logging import get_logger

from vigil_operator import metrics
from vigil_operator.actions import (
    Action,
    Emit,
    EnsureModel,
    EnsureWorkers,
    KeepFraction,
    RemoveWorkers,
    WriteRoute,
    WriteStatus,
)
from vigil_operator.effects import POLL_S, RESYNC_S
from vigil_operator.observed import NAME_TAKEN, QUOTA_EXCEEDED, REFUSED, Observed, Problem, RouteSeen, Workload
from vigil_operator.phases import Phase
from vigil_operator.plan import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from vigil_common.streams.ports import Route, RoutingTable

    from vigil_operator.observed import Published, Report, Resource
    from vigil_operator.spec import Numerics, Source
    from vigil_operator.status import Status

# Steps at once: a whole rollout has fewer, so more is a plan that never comes to rest.
STEPS_AT_MOST = 20

log = get_logger()


class Workers(Protocol):
    """Where workers run."""

    async def observe(self, resource: Resource, *, describe: str | None) -> Mapping[str, Workload]:
        """The resource's workers by digest; those of `describe` are asked to describe themselves."""
        ...

    async def ensure_model(self, resource: Resource, live: str | None) -> None:
        """Let there be what a model has once."""
        ...

    async def ensure(self, resource: Resource, version: int, digest: str, numerics: Numerics) -> None:
        """Let there be workers of a version; cheap where there are."""
        ...

    async def remove(self, resource: Resource, digest: str) -> None:
        """End the workers of a version; nothing where there are none."""
        ...


class Notes(Protocol):
    """What is kept and said beside the resource."""

    async def write_status(self, resource: Resource, status: Status) -> None:
        """Replace the whole status."""
        ...

    async def emit(self, resource: Resource, event: Emit) -> None:
        """Tell people; may be lost."""
        ...


class Registry(Protocol):
    """What is published."""

    async def versions(self, source: Source) -> tuple[Published, ...]:
        """Versions of the source's model, with what is asked for if it is published."""
        ...


class Reports(Protocol):
    """Comparisons."""

    async def report(self, model: str) -> Report | None:
        """The comparison under way, or the last one."""
        ...


@dataclass(slots=True)
class _Trouble:
    """What actions failed by.

    Attributes:
        away: Parts that could not do it, and why.
        refused: Versions, by digest, whose workers Kubernetes will not have, and why.
    """

    away: dict[str, str] = field(default_factory=dict)
    refused: dict[str, Problem] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.away or self.refused)

    def same(self, other: _Trouble) -> bool:
        """Whether it is the same, whatever the sentences."""
        return (self.away.keys(), self._reasons()) == (other.away.keys(), other._reasons())

    def _reasons(self) -> dict[str, str]:
        return {digest: problem.reason for digest, problem in self.refused.items()}

    def lasting(self) -> bool:
        """Whether the same would be refused again."""
        return not self.away.keys() - {REFUSED} and all(problem.final for problem in self.refused.values())


class Reconciler:
    """Brings resources to what is asked for, one at a time each.

    Args:
        workers: Where workers run.
        notes: Where status and events go.
        registry: What is published.
        routing: The routing table.
        reports: Comparisons.
        namespaces: Whose resources are looked after here; empty for all. What is in others, another operator decides.
        clock: The time.
    """

    def __init__(
        self,
        *,
        workers: Workers,
        notes: Notes,
        registry: Registry,
        routing: RoutingTable,
        reports: Reports,
        namespaces: Collection[str] = (),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._workers = workers
        self._notes = notes
        self._registry = registry
        self._routing = routing
        self._reports = reports
        self._namespaces = frozenset(namespaces)
        self._clock = clock
        # By resource, from one call to the next: it is over once the same has been done.
        self._trouble: dict[str, _Trouble] = {}

    async def reconcile(self, resource: Resource, status: Status, taken_by: str = "") -> tuple[Status, float]:
        """Take all steps that can be taken now.

        Args:
            resource: What is asked for.
            status: What was written last.
            taken_by: The resource that has the model instead, if one has.

        Returns:
            The status as written now, and when to look again at the latest, in seconds.
        """
        before = self._trouble.get(resource.full_name, _Trouble())
        for _ in range(STEPS_AT_MOST):
            with metrics.RECONCILE_SECONDS.time():
                seen = await self._observe(resource, status, taken_by, before)
                made = plan(resource, status, seen, self._clock())
                trouble = _Trouble()
                for action in made.actions:
                    await self._carry_out(resource, action, trouble)
                    if trouble and isinstance(action, WriteStatus):
                        # What is not remembered must not be done.
                        return status, POLL_S
            if made.status is not None:
                if made.status.phase is not status.phase:
                    metrics.TRANSITIONS.labels(made.status.phase.value).inc()
                    live = made.status.live
                    log.info(
                        "phase",
                        resource=resource.name,
                        namespace=resource.namespace,
                        phase=made.status.phase.value,
                        before=status.phase.value,
                        live=live.version if live else None,
                    )
                old = status.live
                if (live := made.status.live) and (old is None or live.digest != old.digest):
                    audit(
                        "promoted",
                        by=f"operator, for {resource.full_name}",
                        model=resource.spec.source.model,
                        version=live.version,
                        digest=live.digest,
                        before_version=old.version if old else None,
                        before_digest=old.digest if old else None,
                    )
                status = made.status
            told = trouble.same(before)
            before = self._keep(resource, trouble)
            if not told:
                continue  # so that the status tells of it
            if trouble:
                # What is refused for good is so until something else changes.
                return status, RESYNC_S if trouble.lasting() else POLL_S
            if not any(isinstance(action, WriteStatus | WriteRoute | KeepFraction) for action in made.actions):
                return status, made.wake_after_s
        log.error("unsettled", resource=resource.name, namespace=resource.namespace, phase=status.phase.value)
        return status, POLL_S

    def _keep(self, resource: Resource, trouble: _Trouble) -> _Trouble:
        if trouble:
            self._trouble[resource.full_name] = trouble
        else:
            self._trouble.pop(resource.full_name, None)
        return trouble

    async def _carry_out(self, resource: Resource, action: Action, trouble: _Trouble) -> None:
        """Do it after what failed before; what it fails by is added to that."""
        if NAME_TAKEN in trouble.away and isinstance(action, EnsureWorkers):
            # They would start with somebody else's settings and account.
            return
        try:
            await self._do(resource, action)
        except VigilError as error:
            log.warning(
                "action_failed",
                resource=resource.name,
                namespace=resource.namespace,
                action=type(action).__name__,
                reason=error.reason,
                detail=error.message,
            )
            refused = isinstance(error, InvalidInput)
            if isinstance(action, EnsureWorkers) and refused:
                full = error.reason == QUOTA_EXCEEDED
                reason = "QuotaExceeded" if full else "Refused"
                trouble.refused[action.digest] = Problem(reason, error.message, final=not full)
            elif isinstance(action, WriteRoute | KeepFraction):
                trouble.away["Routing"] = error.message
            elif not isinstance(action, Emit):
                part = NAME_TAKEN if error.reason == NAME_TAKEN else REFUSED if refused else "Cluster"
                trouble.away[part] = error.message

    async def _do(self, resource: Resource, action: Action) -> None:
        match action:
            case WriteStatus(status):
                await self._notes.write_status(resource, status)
            case EnsureModel(live):
                await self._workers.ensure_model(resource, live)
            case EnsureWorkers(version, digest, numerics):
                await self._workers.ensure(resource, version, digest, numerics)
            case RemoveWorkers(digest):
                await self._workers.remove(resource, digest)
            case WriteRoute(live, candidate):
                model = resource.spec.source.model
                await self._routing.write(model, live=live, candidate=candidate, managed_by=resource.full_name)
            case KeepFraction(fraction):
                await self._routing.keep_fraction(resource.spec.source.model, fraction)
            case Emit():
                await self._notes.emit(resource, action)

    async def _observe(self, resource: Resource, status: Status, taken_by: str, trouble: _Trouble) -> Observed:
        """The world now; what can't be reached is named."""
        source, away = resource.spec.source, dict(trouble.away)
        versions = route = workloads = report = None
        try:
            if not taken_by:
                record = await self._routing.get(source.model)
                kept = await self._routing.kept_fraction(source.model)
                taken_by, route = self._route(resource, record, kept)
        except Unavailable as error:
            away["Routing"] = error.message
        if taken_by:
            return Observed(None, None, None, taken_by=taken_by, away=away)
        try:
            versions = await self._registry.versions(source)
        except Unavailable as error:
            away["Registry"] = error.message
        candidate = status.candidate
        verifying = candidate.digest if candidate is not None and status.phase is Phase.VERIFYING else None
        try:
            workloads = _with_refusals(await self._workers.observe(resource, describe=verifying), trouble.refused)
        except Unavailable as error:
            away["Cluster"] = error.message
        if candidate is not None and candidate.shadowing_since is not None:
            try:
                report = await self._reports.report(source.model)
            except Unavailable as error:
                away["Shadow"] = error.message
        return Observed(versions, route, workloads, report, away=away)

    def _route(self, resource: Resource, record: Route | None, kept: float | None) -> tuple[str, RouteSeen]:
        """Who has the model instead, where another operator's resource does, and the route."""
        if record is None:
            return "", RouteSeen(None, None, kept)
        decides = record.managed_by
        elsewhere = self._namespaces and decides and decides.partition("/")[0] not in self._namespaces
        ours = decides == resource.full_name
        return decides if elsewhere else "", RouteSeen(record.live, record.candidate, kept, ours, record.comparison)


def _with_refusals(found: Mapping[str, Workload], refused: Mapping[str, Problem]) -> Mapping[str, Workload]:
    """What Kubernetes will not have is wrong with those workers, whether there are some from before or none."""
    workloads = dict(found)
    for digest, problem in refused.items():
        known = workloads.get(digest, Workload(digest, 1, 0))
        workloads[digest] = replace(known, problems=(problem, *known.problems))
    return workloads
