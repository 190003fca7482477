"""What makes the world as a status says: workers, the route, and what is kept; pure functions, as `plan` is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil_common.streams.ports import Candidate, Live

from vigil_operator.actions import Action, EnsureModel, EnsureWorkers, KeepFraction, RemoveWorkers, WriteRoute
from vigil_operator.observed import RouteSeen, since_s
from vigil_operator.phases import BETWEEN_VERSIONS

if TYPE_CHECKING:
    from datetime import datetime

    from vigil_operator.observed import Observed
    from vigil_operator.spec import Numerics, Spec
    from vigil_operator.status import Status, VersionStatus

# How soon to look again, seconds.
SOON_S, POLL_S, RESYNC_S = 0.2, 1.0, 60.0


def numerics_of(version: VersionStatus, spec: Spec) -> Numerics:
    """What its workers run with."""
    return version.numerics or spec.runtime.numerics


def wanted_route(spec: Spec, status: Status) -> RouteSeen | None:
    """The route as it should be; None where nothing is live."""
    live, candidate = status.live, status.candidate
    if live is None:
        return None
    shadow = None
    if candidate is not None and candidate.shadowing_since is not None:
        shadow = Candidate(candidate.version, candidate.digest, candidate.threshold, spec.rollout.sample_fraction)
    return RouteSeen(Live(live.version, live.digest, live.threshold), shadow, spec.retention.normal.keep_fraction)


def effects(spec: Spec, status: Status, seen: Observed, now: datetime) -> tuple[Action, ...]:
    """What is to be done for the status to be true; what is so already costs nothing to ask for."""
    kept = _with_workers(status, now)
    live = status.live
    actions: list[Action] = [EnsureModel(live.digest if live else None)] if kept else []
    actions += [EnsureWorkers(version.version, version.digest, numerics_of(version, spec)) for version in kept.values()]
    route, found = wanted_route(spec, status), seen.route
    if route is not None and route.live is not None and found is not None:
        # First, so that no frame of a new route is dropped or kept by another rule.
        if route.kept_fraction != found.kept_fraction:
            actions.append(KeepFraction(route.kept_fraction))
        if (route.live, route.candidate, route.ours) != (found.live, found.candidate, found.ours):
            actions.append(WriteRoute(route.live, route.candidate))
    # Nothing goes before the route is known to lead elsewhere.
    if found is not None and (route or RouteSeen(None, None, found.kept_fraction)) == found:
        actions += [RemoveWorkers(digest) for digest in sorted(set(seen.workloads or {}) - set(kept))]
    return tuple(actions)


def _with_workers(status: Status, now: datetime) -> dict[str, VersionStatus]:
    """Versions that have workers, by digest."""
    versions: list[VersionStatus | None] = [status.live, status.candidate]
    if status.previous is not None and (now < status.previous.warm_until or status.phase in BETWEEN_VERSIONS):
        # First, for it may be the candidate as well.
        versions.insert(0, status.previous)
    return {version.digest: version for version in versions if version is not None}


def wake_after_s(status: Status, seen: Observed, now: datetime, actions: tuple[Action, ...]) -> float:
    """When to look again, seconds."""
    if any(isinstance(action, WriteRoute) for action in actions):
        return 0.0
    if status.phase in BETWEEN_VERSIONS:
        return SOON_S
    if status.candidate is not None or seen.away or seen.workloads is None:
        return POLL_S
    previous = status.previous
    if previous is not None and now < previous.warm_until:
        return min(RESYNC_S, since_s(now, previous.warm_until) + SOON_S)
    return RESYNC_S
