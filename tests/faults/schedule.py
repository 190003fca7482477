"""What goes wrong, and when: decided by a seed alone."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Kind(enum.Enum):
    """What goes wrong."""

    KILL = "kill"
    FREEZE = "freeze"
    RESTART = "restart"
    CUT = "cut"
    STALL = "stall"
    DELAY = "delay"
    DISK_FULL = "disk full"
    AWAY = "away"
    FAILOVER = "failover"
    PROMOTE = "promote"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        after_s: Since the one before.
        kind: What happens.
        where: To which part, or on which link.
        for_s: How long it lasts.
        amount: Of a delay, in seconds; of a promotion, the version.
    """

    after_s: float
    kind: Kind
    where: str
    for_s: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.for_s:.1f} s" if self.for_s else ""
        amount = f" ({self.amount:g})" if self.amount else ""
        return f"{self.kind.value} {self.where}{lasts}{amount}"


# How often each kind comes, beside the others.
WEIGHTS = {
    Kind.KILL: 6,
    Kind.FREEZE: 4,
    Kind.RESTART: 2,
    Kind.CUT: 4,
    Kind.STALL: 3,
    Kind.DELAY: 3,
    Kind.DISK_FULL: 2,
    Kind.FAILOVER: 1,
    Kind.PROMOTE: 3,
}
AWAY_S = 60.0


def schedule(
    seed: int, seconds: float, *, parts: Sequence[str], links: Sequence[str], disks: Sequence[str], versions: int
) -> Iterator[Fault]:
    """Faults until the time is over; a long run has the store away for a minute in its middle."""
    chance = random.Random(seed)
    kinds = [kind for kind in WEIGHTS if kind is not Kind.DISK_FULL or disks]
    weights = [WEIGHTS[kind] for kind in kinds]
    now_s, away = 0.0, seconds < 3 * AWAY_S
    while True:
        # One in four comes together with the one before.
        after_s = 0.0 if chance.random() < 0.25 else chance.uniform(1.0, 7.0)
        now_s += after_s
        if now_s > seconds:
            return
        if not away and now_s > seconds / 3:
            away = True
            yield Fault(after_s, Kind.AWAY, "reductstore", AWAY_S)
            continue
        (kind,) = chance.choices(kinds, weights)
        match kind:
            case Kind.KILL | Kind.RESTART:
                yield Fault(after_s, kind, chance.choice(parts), chance.choice((0.0, chance.uniform(0.2, 4.0))))
            case Kind.FREEZE:
                # Past the storage's lease of 6 s, now and then.
                yield Fault(after_s, kind, chance.choice(parts), chance.choice((0.5, 2.0, 9.0)))
            case Kind.CUT | Kind.STALL:
                yield Fault(after_s, kind, chance.choice(links), chance.choice((0.2, 2.0, 8.0)))
            case Kind.DELAY:
                yield Fault(after_s, kind, chance.choice(links), chance.uniform(2, 8), chance.choice((0.02, 0.1, 0.4)))
            case Kind.DISK_FULL:
                yield Fault(after_s, kind, chance.choice(disks), chance.uniform(2, 8))
            case Kind.PROMOTE:
                yield Fault(after_s, kind, "route", amount=chance.randint(1, versions))
            case _:
                yield Fault(after_s, kind, "valkey")
