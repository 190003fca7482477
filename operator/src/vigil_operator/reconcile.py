"""One resource brought to what its plan says: observe, plan, carry out, until nothing is left to do at once.

The same loop runs in Kubernetes and on one machine; only the ports' adapters differ.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from vigil_common.audit import audit
from vigil_common.errors import Unavailable, VigilError
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
from vigil_operator.observed import NAME_TAKEN, Observed, RouteSeen
from vigil_operator.phases import Phase
from vigil_operator.plan import POLL_S, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from vigil_common.streams.ports import RoutingTable

    from vigil_operator.observed import Published, Report, Resource, Workload
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


class Reconciler:
    """Brings resources to what is asked for, one at a time each.

    Args:
        workers: Where workers run.
        notes: Where status and events go.
        registry: What is published.
        routing: The routing table.
        reports: Comparisons.
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
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._workers = workers
        self._notes = notes
        self._registry = registry
        self._routing = routing
        self._reports = reports
        self._clock = clock

    async def reconcile(self, resource: Resource, status: Status, taken_by: str = "") -> tuple[Status, float]:
        """Take all steps that can be taken now.

        Args:
            resource: What is asked for.
            status: What was written last.
            taken_by: The resource that has the model instead, if one has.

        Returns:
            The status as written now, and when to look again at the latest, in seconds.
        """
        trouble: dict[str, str] = {}
        for _ in range(STEPS_AT_MOST):
            with metrics.RECONCILE_SECONDS.time():
                seen = await self._observe(resource, status, taken_by, trouble)
                made = plan(resource, status, seen, self._clock())
                trouble = {}
                for action in made.actions:
                    trouble |= await self._carry_out(resource, action, trouble)
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
                before = status.live
                if (live := made.status.live) and (before is None or live.digest != before.digest):
                    audit(
                        "promoted",
                        by=f"operator, for {resource.full_name}",
                        model=resource.spec.source.model,
                        version=live.version,
                        digest=live.digest,
                        before_version=before.version if before else None,
                        before_digest=before.digest if before else None,
                    )
                status = made.status
            moved = any(isinstance(action, WriteStatus | WriteRoute | KeepFraction) for action in made.actions)
            if trouble:
                # Once more, so that the status tells of it; then wait.
                seen = await self._observe(resource, status, taken_by, trouble)
                told = plan(resource, status, seen, self._clock())
                if told.status is not None and not await self._carry_out(resource, WriteStatus(told.status)):
                    status = told.status
                return status, POLL_S
            if not moved:
                return status, made.wake_after_s
        log.error("unsettled", resource=resource.name, namespace=resource.namespace, phase=status.phase.value)
        return status, POLL_S

    async def _carry_out(self, resource: Resource, action: Action, before: Collection[str] = ()) -> dict[str, str]:
        """Do it after what failed before; where it fails, the part that it failed by."""
        if NAME_TAKEN in before and isinstance(action, EnsureWorkers):
            # They would start with somebody else's settings and account.
            return {}
        part = "Routing" if isinstance(action, WriteRoute | KeepFraction) else "Cluster"
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
            part = NAME_TAKEN if error.reason == NAME_TAKEN else part
            return {} if isinstance(action, Emit) else {part: error.message}
        return {}

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

    async def _observe(self, resource: Resource, status: Status, taken_by: str, trouble: Mapping[str, str]) -> Observed:
        """The world now; what can't be reached is named."""
        source, away = resource.spec.source, dict(trouble)
        if taken_by:
            return Observed(None, None, None, taken_by=taken_by, away=away)
        versions = route = workloads = report = None
        try:
            versions = await self._registry.versions(source)
        except Unavailable as error:
            away["Registry"] = error.message
        try:
            record = await self._routing.get(source.model)
            kept = await self._routing.kept_fraction(source.model)
            route = RouteSeen(None, None, kept)
            if record is not None:
                ours = record.managed_by == resource.full_name
                route = RouteSeen(record.live, record.candidate, kept, ours, record.comparison)
        except Unavailable as error:
            away["Routing"] = error.message
        candidate = status.candidate
        verifying = candidate.digest if candidate is not None and status.phase is Phase.VERIFYING else None
        try:
            workloads = await self._workers.observe(resource, describe=verifying)
        except Unavailable as error:
            away["Cluster"] = error.message
        if candidate is not None and candidate.shadowing_since is not None:
            try:
                report = await self._reports.report(source.model)
            except Unavailable as error:
                away["Shadow"] = error.message
        return Observed(versions, route, workloads, report, away=away)
