"""What the status says to people and to `kubectl wait`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil_operator.observed import NAME_TAKEN, REFUSED, why_unknown
from vigil_operator.phases import Phase
from vigil_operator.refusals import TRY_AGAIN, refused_by_a_person, turned_down
from vigil_operator.status import Condition

if TYPE_CHECKING:
    from datetime import datetime

    from vigil_operator.observed import Observed, Published, Resource
    from vigil_operator.status import Status

    # Whether it is so (None: unknown), the reason and a sentence.
    Said = tuple[bool | None, str, str]

_UNDER_WAY = frozenset({Phase.VERIFYING, Phase.SHADOWING, Phase.AWAITING_APPROVAL, Phase.PROMOTING, Phase.ROLLING_BACK})


def conditions(
    resource: Resource, status: Status, seen: Observed, target: Published | None, now: datetime
) -> list[Condition]:
    """The conditions of a status; each keeps its time until it changes.

    Args:
        resource: What is asked for.
        status: The next one, but for its conditions, which are of the last.
        seen: The world.
        target: The version asked for; None where it is unknown.
        now: The time.
    """
    said: dict[str, Said] = {
        "Ready": _ready(status, seen),
        "Progressing": _progressing(status),
        "Promoted": _promoted(resource, status, seen, target),
        "Synced": _synced(resource, seen, target),
    }
    if seen.taken_by:
        taken = (False, "ModelTaken", f"{seen.taken_by} has model {resource.spec.source.model} already")
        said |= dict.fromkeys(("Ready", "Promoted", "Synced"), taken)
    before = {condition.type: condition for condition in status.conditions}
    made = []
    for kind, (truth, reason, message) in said.items():
        old = before.get(kind)
        state = {True: "True", False: "False", None: "Unknown"}[truth]
        since = old.last_transition_time if old is not None and old.status == state else now
        made.append(
            Condition.model_validate(
                {
                    "type": kind,
                    "status": state,
                    "reason": reason,
                    "message": message,
                    "last_transition_time": since,
                    "observed_generation": resource.generation,
                }
            )
        )
    return made


def _ready(status: Status, seen: Observed) -> Said:
    live = status.live
    if live is None:
        return False, "NothingLive", "no version is live yet"
    workers = (seen.workloads or {}).get(live.digest)
    problem = next(iter(workers.problems), None) if workers else None
    trouble = f"{problem.reason}: {problem.message}" if problem else ""
    if live.ready_replicas == 0:
        return False, "NoWorkers", f"version {live.version}: {trouble or 'none of its workers is ready'}"
    if seen.route is not None and (seen.route.live is None or seen.route.live.digest != live.digest):
        return False, "RouteNotWritten", f"version {live.version} is not in the routing table yet"
    if trouble:  # others serve: one of several, or those from before a change of the spec
        return True, "Serving", f"version {live.version} serves, but not by all of its workers: {trouble}"
    return True, "Serving", f"version {live.version} serves"


def _progressing(status: Status) -> Said:
    phase, candidate = status.phase, status.candidate
    if phase is Phase.AWAITING_APPROVAL:
        return True, phase.value, "its gates passed; `kubectl vigil promote` makes it live"
    return phase in _UNDER_WAY, phase.value, candidate.message if candidate else ""


def _promoted(resource: Resource, status: Status, seen: Observed, target: Published | None) -> Said:
    live, phase, failure = status.live, status.phase, status.last_failure
    if live is not None and target is not None and live.digest == target.digest and phase is not Phase.PROMOTING:
        return True, "Promoted", f"version {live.version} is live, as asked for"
    if target is None:
        if seen.versions is None:
            return None, "RegistryUnavailable", seen.away.get("Registry", "")
        return False, "UnknownVersion", why_unknown(resource.spec.source, seen.versions)
    if failure is not None and failure.digest == target.digest and phase in (Phase.FAILED, Phase.HELD):
        return False, failure.reason, f"{failure.message}; {TRY_AGAIN}"
    refused = refused_by_a_person(status, target)
    if refused is not None and turned_down(resource, status, target):
        return False, refused.outcome, f"{refused.message}; {TRY_AGAIN}"
    return False, phase.value, f"version {target.version} is asked for"


def _synced(resource: Resource, seen: Observed, target: Published | None) -> Said:
    for part, reason in ((NAME_TAKEN, "NameTaken"), (REFUSED, "Refused")):
        if part in seen.away:
            return False, reason, seen.away[part]
    if seen.away:
        return False, f"{next(iter(seen.away))}Unavailable", "; ".join(seen.away.values())
    if seen.versions is not None and target is None:
        return False, "UnknownVersion", why_unknown(resource.spec.source, seen.versions)
    return True, "Synced", ""
