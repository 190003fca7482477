"""The world as the plan sees it. None always means "could not be found out", never "there is none"."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vigil_operator.spec import LATEST

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from vigil_common.evidence import ReportNumbers
    from vigil_common.streams.ports import Candidate, Live

    from vigil_operator.spec import Source, Spec

# Why nothing can be made for a resource.
NAME_TAKEN = "NAME_TAKEN"
# What Kubernetes refuses for the model as a whole; of one version's workers it is that version's problem.
REFUSED = "REFUSED"
# What it refuses for as long as a ResourceQuota has no room.
QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
# "VERB DIGEST ID", set by `kubectl vigil`; each is dealt with once.
REQUEST_ANNOTATION = "vigil.dev/request"
_REQUEST = re.compile(r"^(promote|force-promote|abort|rollback|retry) (sha256:[0-9a-f]{64}|-) (\S{1,64})$")


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asks for beside the spec.

    Attributes:
        text: All of it, which tells it from other requests.
        verb: promote, force-promote, abort, rollback or retry; empty where the text makes no sense.
        digest: Which version it is about; "-" for the one it concerns by itself.
    """

    text: str
    verb: str
    digest: str

    @staticmethod
    def parse(annotations: Mapping[str, str]) -> Request | None:
        """The request of a resource, if it has one."""
        text = annotations.get(REQUEST_ANNOTATION, "")
        if not text:
            return None
        found = _REQUEST.match(text)
        return Request(text, found[1], found[2]) if found else Request(text, "", "")


@dataclass(frozen=True, slots=True)
class Resource:
    """An AnomalyModel without its status.

    Attributes:
        name: Its name.
        namespace: Its namespace.
        uid: Tells it from another of the same name.
        generation: Grows with each change of the spec.
        spec: What it asks for.
        request: What a person asks for beside that.
        attempt: Changes with what a version may fail by; a failed version is tried again when it changes.
    """

    name: str
    namespace: str
    uid: str
    generation: int
    spec: Spec
    request: Request | None
    attempt: str

    @property
    def full_name(self) -> str:
        """As people and the routing table name it: "NAMESPACE/NAME"."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Published:
    """A version in the registry."""

    version: int
    digest: str
    deprecated: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a version's workers.

    Attributes:
        reason: In one word.
        message: For people.
        final: Waiting won't help.
    """

    reason: str
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker says of itself.

    Attributes:
        worker: Which one.
        digest: Of the bundle it has loaded.
        parity_failed: Parity samples that came out otherwise.
        numerics: How it was started to run the bundle; None where that can't be told.
    """

    worker: str
    digest: str
    parity_failed: int
    numerics: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """A version's workers.

    Attributes:
        digest: Of the version.
        desired: How many there should be.
        ready: How many are ready.
        problems: What is wrong with them.
        described: What the ready ones say of themselves, where that was asked.
    """

    digest: str
    desired: int
    ready: int
    problems: tuple[Problem, ...] = ()
    described: tuple[Description, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteSeen:
    """The routing table's record; both None where there is none.

    Attributes:
        live: The live version.
        candidate: What is compared with it.
        kept_fraction: Which part of the normal frames is stored, where the model has its own say.
        ours: Whether it says that this resource decides, so that nobody else writes it.
        comparison: Which comparison is under way, which no wish names.
    """

    live: Live | None
    candidate: Candidate | None = None
    kept_fraction: float | None = None
    ours: bool = True
    comparison: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Report:
    """The comparison of two versions.

    Attributes:
        run: The comparison's number.
        numbers: What was counted.
        compared_s: For how long.
    """

    run: str
    numbers: ReportNumbers
    compared_s: float


@dataclass(frozen=True, slots=True)
class Observed:
    """The world around one resource.

    Attributes:
        versions: What is published of its model; None where the registry could not be asked yet.
        route: The routing table's record.
        workloads: Workers by digest; None where they could not be listed.
        report: The comparison under way, or the last one, where there is one and it could be asked.
        taken_by: An older resource for the same model, or one of another operator, which has it.
        away: Which part could not be reached, and why.
    """

    versions: tuple[Published, ...] | None
    route: RouteSeen | None
    workloads: Mapping[str, Workload] | None
    report: Report | None = None
    taken_by: str = ""
    away: Mapping[str, str] = field(default_factory=dict)


def resolve(source: Source, versions: tuple[Published, ...]) -> Published | None:
    """The version that a source asks for; None where it is not published."""
    if source.digest is not None:
        return next((found for found in versions if found.digest == source.digest), None)
    if source.version == LATEST:
        return max((found for found in versions if not found.deprecated), key=lambda found: found.version, default=None)
    return next((found for found in versions if str(found.version) == source.version), None)


def why_unknown(source: Source, versions: tuple[Published, ...]) -> str:
    """Why `resolve` finds none of these."""
    asked = source.digest or f"version {source.version}"
    if not versions:
        return f"nothing is published of model {source.model}"
    if source.version == LATEST:
        return f"every version of model {source.model} is deprecated"
    return f"{asked} of model {source.model} is not published; the newest is {max(one.version for one in versions)}"


def may_be(source: Source, version: int, digest: str) -> bool:
    """Whether a source may ask for this version, as far as can be told without the registry."""
    if source.digest is not None:
        return source.digest == digest
    return source.version in (LATEST, str(version))


def since_s(moment: datetime, now: datetime) -> float:
    """Seconds from then to now."""
    return (now - moment).total_seconds()
