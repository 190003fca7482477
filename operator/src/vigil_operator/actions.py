"""What the operator may do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vigil_common.streams.ports import Candidate, Live

    from vigil_operator.spec import Numerics
    from vigil_operator.status import Status


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Remember this."""

    status: Status


@dataclass(frozen=True, slots=True)
class EnsureWorkers:
    """Let there be workers of this version, as the spec says, but with numerics of its own."""

    version: int
    digest: str
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class EnsureModel:
    """Let there be what a model has once; its Service leads to the live version's workers, if there is one."""

    live: str | None


@dataclass(frozen=True, slots=True)
class RemoveWorkers:
    """End the workers of this version."""

    digest: str


@dataclass(frozen=True, slots=True)
class WriteRoute:
    """Write the routing table's record, in one step."""

    live: Live
    candidate: Candidate | None


@dataclass(frozen=True, slots=True)
class KeepFraction:
    """Say which part of the model's normal frames is stored; None leaves it to storage's settings."""

    fraction: float | None


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell people by a Kubernetes Event."""

    reason: str
    message: str
    warning: bool = False


Action = WriteStatus | EnsureWorkers | EnsureModel | RemoveWorkers | WriteRoute | KeepFraction | Emit


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order, and when to look again if nothing happens."""

    actions: tuple[Action, ...]
    wake_after_s: float

    @property
    def status(self) -> Status | None:
        """The status that is written, if one is."""
        return next((action.status for action in self.actions if isinstance(action, WriteStatus)), None)
