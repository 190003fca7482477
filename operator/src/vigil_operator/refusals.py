"""Versions that are not tried again by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil_operator.status import Failure

if TYPE_CHECKING:
    from vigil_operator.observed import Published, Resource
    from vigil_operator.status import HistoryEntry, Status

TRY_AGAIN = "`kubectl vigil resume` tries it again"
# The attempt of a version that a person turned down: no change of the spec brings it back, only another request.
BY_A_PERSON = "by a person"


def turned_down(resource: Resource, status: Status, target: Published) -> Failure | None:
    """Why this version, as it is asked for now, is not tried again; None where it may be."""
    failure = status.last_failure
    if failure is not None and failure.digest == target.digest:
        return failure if failure.attempt in (BY_A_PERSON, resource.attempt) else None
    refused = refused_by_a_person(status, target)
    if refused is None:
        return None
    return Failure(
        reason=refused.outcome,
        message=refused.message,
        version=target.version,
        digest=target.digest,
        at=refused.at,
        attempt=BY_A_PERSON,
    )


def refused_by_a_person(status: Status, target: Published) -> HistoryEntry | None:
    """That a person turned it down, though another version has failed since; a promotion makes a new start."""
    for entry in status.history:
        if entry.outcome == "Promoted":
            return None
        if entry.digest == target.digest and entry.outcome in ("RolledBack", "Aborted"):
            return entry
    return None
