"""Where a rollout is, and the only ways from one phase to the next.

Each phase says what is true in the cluster. What is live is no part of it: in every phase the live version serves, once
there is one, and only `Promoting` and `RollingBack` change which one that is.
"""

from __future__ import annotations

import enum


class Phase(enum.StrEnum):
    """Where the rollout of the version asked for is."""

    # The version asked for is not known (yet), or this resource may not act.
    PENDING = "Pending"
    # Workers of the candidate load the bundle and prove its parity samples; they judge no frame.
    VERIFYING = "Verifying"
    # The candidate judges live's frames; its verdicts are compared and not given out.
    SHADOWING = "Shadowing"
    # As Shadowing, with all gates passed; a person decides.
    AWAITING_APPROVAL = "AwaitingApproval"
    # The status names the new version as live; the route is being written.
    PROMOTING = "Promoting"
    # The version asked for is live; nothing is under way.
    LIVE = "Live"
    # The version asked for is kept from live by a person, or until a person decides.
    HELD = "Held"
    # The version before is being put back.
    ROLLING_BACK = "RollingBack"
    # The version asked for can't be live, as lastFailure says; its workers are gone.
    FAILED = "Failed"
    # A person stopped the rollout where it was.
    SUSPENDED = "Suspended"


# One version gives way to another; nothing comes between.
BETWEEN_VERSIONS = frozenset({Phase.PROMOTING, Phase.ROLLING_BACK})


class Event(enum.Enum):
    """What leads on."""

    # The version asked for became unknown, or none is asked for that is known.
    TARGET_LOST = "target lost"
    # Another version is asked for than the live one.
    CANDIDATE_CHOSEN = "candidate chosen"
    # The version asked for is the live one.
    TARGET_IS_LIVE = "target is live"
    # Another version is asked for than the live one, and it failed, or a person turned it down, already.
    FAILED_BEFORE = "failed before"
    REFUSED_BEFORE = "refused before"
    # The candidate is proven, and there is a live version to compare it with.
    VERIFIED = "verified"
    # The candidate is proven, and nothing is to be compared: no live version, or strategy Immediate.
    VERIFIED_ALONE = "verified alone"
    CANDIDATE_FAILED = "candidate failed"
    GATES_PASSED = "gates passed"
    GATES_PASSED_FOR_APPROVAL = "gates passed, approval needed"
    TIMED_OUT = "timed out"
    # Something changed that makes what was compared so far worth nothing.
    COMPARED_ANEW = "compared anew"
    # A person promotes a candidate whose gates passed.
    APPROVED = "approved"
    # A person promotes a candidate though its gates have not passed.
    FORCED = "forced"
    ABORTED = "aborted"
    RETRIED = "retried"
    ROUTE_WRITTEN = "route written"
    ROLLBACK_ASKED = "rollback asked"
    ROLLBACK_IMPOSSIBLE = "rollback impossible"
    SUSPENDED = "suspended"


P, E = Phase, Event
_AT_REST = (P.PENDING, P.VERIFYING, P.SHADOWING, P.AWAITING_APPROVAL, P.LIVE, P.HELD, P.FAILED)
_WITH_CANDIDATE = (P.VERIFYING, P.SHADOWING, P.AWAITING_APPROVAL, P.HELD)
_COMPARING = (P.SHADOWING, P.AWAITING_APPROVAL, P.HELD)

TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    **{(phase, E.TARGET_LOST): P.PENDING for phase in _AT_REST},
    **{(phase, E.CANDIDATE_CHOSEN): P.VERIFYING for phase in _AT_REST},
    **{(phase, E.TARGET_IS_LIVE): P.LIVE for phase in _AT_REST},
    **{(phase, E.FAILED_BEFORE): P.FAILED for phase in _AT_REST},
    **{(phase, E.REFUSED_BEFORE): P.HELD for phase in _AT_REST},
    (P.VERIFYING, E.VERIFIED): P.SHADOWING,
    **{(phase, E.VERIFIED_ALONE): P.PROMOTING for phase in (P.VERIFYING, P.SHADOWING, P.AWAITING_APPROVAL)},
    **{(phase, E.CANDIDATE_FAILED): P.FAILED for phase in _WITH_CANDIDATE},
    **{(phase, E.GATES_PASSED): P.PROMOTING for phase in (P.SHADOWING, P.AWAITING_APPROVAL)},
    (P.SHADOWING, E.GATES_PASSED_FOR_APPROVAL): P.AWAITING_APPROVAL,
    (P.SHADOWING, E.TIMED_OUT): P.HELD,
    **{(phase, E.COMPARED_ANEW): P.SHADOWING for phase in (P.SHADOWING, P.AWAITING_APPROVAL)},
    (P.AWAITING_APPROVAL, E.APPROVED): P.PROMOTING,
    (P.HELD, E.APPROVED): P.PROMOTING,
    **{(phase, E.FORCED): P.PROMOTING for phase in _COMPARING},
    **{(phase, E.ABORTED): P.HELD for phase in _WITH_CANDIDATE},
    **{(phase, E.RETRIED): P.SHADOWING for phase in _COMPARING},
    (P.PROMOTING, E.ROUTE_WRITTEN): P.LIVE,
    **{(phase, E.ROLLBACK_ASKED): P.ROLLING_BACK for phase in (*_AT_REST, P.SUSPENDED)},
    (P.ROLLING_BACK, E.ROUTE_WRITTEN): P.HELD,
    (P.ROLLING_BACK, E.ROLLBACK_IMPOSSIBLE): P.HELD,
    **{(phase, E.SUSPENDED): P.SUSPENDED for phase in _AT_REST},
}


class NotAllowed(RuntimeError):
    """The table has no such way: a mistake in the plan, never a user's."""


def after(phase: Phase, event: Event) -> Phase:
    """The phase that follows.

    Raises:
        NotAllowed: The table has no such way.
    """
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        raise NotAllowed(f"{event.value} in phase {phase.value}") from None
