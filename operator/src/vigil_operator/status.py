"""What the operator says of an AnomalyModel: its status, written by nobody else.

The status is also the operator's memory: it is written before anything that follows from it is done, so that an
operator that was killed between the two does the rest when it is back.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from vigil_operator.phases import Phase
from vigil_operator.spec import Numerics, Part

HISTORY_AT_MOST = 10


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# Whole seconds, as Kubernetes writes times.
Moment = Annotated[datetime, PlainSerializer(_stamp, when_used="json")]


class VersionStatus(Part):
    """A version with a role."""

    version: Annotated[int, Field(description="Its number.")]
    digest: Annotated[str, Field(description="Its bundle's digest.")]
    threshold: Annotated[float | None, Field(description="Serving-time threshold; absent: the bundle's.")] = None
    numerics: Annotated[Numerics | None, Field(description="How it is run, as spec.runtime said when it came.")] = None
    ready_replicas: Annotated[int, Field(description="Workers that are ready.")] = 0
    since: Annotated[Moment, Field(description="Since when it has this role.")]


class CandidateStatus(VersionStatus):
    """The version that may become live."""

    shadowing_since: Annotated[Moment | None, Field(description="Since when it judges live's frames.")] = None
    message: Annotated[str, Field(description="What it waits for.")] = ""


class PreviousStatus(VersionStatus):
    """The version that was live before."""

    warm_until: Annotated[Moment, Field(description="Until when its workers stay, for an instant rollback.")]


class GateStatus(Part):
    """What one gate says."""

    gate: Annotated[str, Field(description="Its name in spec.rollout.gates.")]
    outcome: Annotated[str, Field(description="pass, fail or inconclusive.")]
    reason: Annotated[str, Field(description="The numbers that decided it.")]


class ShadowStatus(Part):
    """The comparison, as of a moment ago."""

    frames: Annotated[int, Field(description="Frames that both versions judged.")] = 0
    flips: Annotated[int, Field(description="Frames with another label.")] = 0
    new_alarms: Annotated[int, Field(description="Normal for live, anomalous for the candidate.")] = 0
    new_misses: Annotated[int, Field(description="Anomalous for live, normal for the candidate.")] = 0
    candidate_failed: Annotated[int, Field(description="Frames that only the candidate could not judge.")] = 0
    latency_ratio: Annotated[float | None, Field(description="Candidate's inference time over live's.")] = None
    outcome: Annotated[str, Field(description="All gates together: pass, fail or inconclusive.")] = "inconclusive"
    gates: Annotated[list[GateStatus], Field(description="Each gate.")] = Field(default_factory=list)
    at: Annotated[Moment, Field(description="When this was read.")]


class Failure(Part):
    """Why a version was not promoted, or no longer is live."""

    reason: Annotated[str, Field(description="In one word, for programs.")]
    message: Annotated[str, Field(description="For people.")]
    version: Annotated[int, Field(description="Which version.")]
    digest: Annotated[str, Field(description="Its bundle's digest.")]
    at: Annotated[Moment, Field(description="When.")]
    attempt: Annotated[
        str, Field(description="Which attempt it was: the version is tried again once this is another one.")
    ] = ""


class HistoryEntry(Part):
    """What became of a version."""

    version: Annotated[int, Field(description="Its number.")]
    digest: Annotated[str, Field(description="Its bundle's digest.")]
    outcome: Annotated[
        str, Field(description="Promoted, Failed, Aborted, Replaced, Withdrawn, RolledBack or RollbackFailed.")
    ]
    message: Annotated[str, Field(description="Why.")] = ""
    at: Annotated[Moment, Field(description="When.")]


class Condition(Part):
    """One of Kubernetes' usual conditions."""

    type: Annotated[str, Field(description="Ready, Progressing, Promoted or Synced.")]
    status: Annotated[Literal["True", "False", "Unknown"], Field(description="True, False or Unknown.")]
    reason: Annotated[str, Field(description="In one word.")]
    message: Annotated[str, Field(description="For people.")] = ""
    last_transition_time: Annotated[Moment, Field(description="When status last changed.")]
    observed_generation: Annotated[int, Field(description="The generation of the spec that this is about.")] = 0


class Status(Part):
    """All of it."""

    observed_generation: Annotated[int, Field(description="The generation of the spec that this is about.")] = 0
    phase: Annotated[Phase, Field(description="Where the rollout is.")] = Phase.PENDING
    suspended_from: Annotated[Phase | None, Field(description="Where it was when it was suspended.")] = None
    live: Annotated[VersionStatus | None, Field(description="The version whose verdicts count.")] = None
    candidate: Annotated[CandidateStatus | None, Field(description="The version that may become live.")] = None
    previous: Annotated[PreviousStatus | None, Field(description="What a rollback goes back to.")] = None
    shadow: Annotated[ShadowStatus | None, Field(description="The comparison of candidate and live.")] = None
    last_failure: Annotated[Failure | None, Field(description="Why a version was not promoted.")] = None
    spec_threshold: Annotated[float | None, Field(description="The spec's threshold when it was last looked at.")] = (
        None
    )
    last_request: Annotated[str, Field(description="The last request of a person that was dealt with.")] = ""
    last_request_refused: Annotated[str, Field(description="Why it was refused; empty where it was not.")] = ""
    history: Annotated[list[HistoryEntry], Field(max_length=HISTORY_AT_MOST, description="Newest first.")] = Field(
        default_factory=list
    )
    replicas: Annotated[int, Field(description="Workers of the live version.")] = 0
    selector: Annotated[str, Field(description="Selects live's workers, for the scale subresource.")] = ""
    conditions: Annotated[
        list[Condition],
        Field(
            description="Ready: live serves. Progressing: a version is on its way. Promoted: the version asked for is "
            "live. Synced: all parts could be reached, and the spec makes sense.",
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As Kubernetes has it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
