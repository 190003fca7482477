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
    CLOCK = "clock off"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        after_s: Since the one before.
        kind: What happens.
        where: To which part, or on which link.
        for_s: How long it lasts.
        amount: Of a delay or a clock, in seconds; of a promotion, the version.
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
    Kind.CLOCK: 3,
}
AWAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Places:
    """What can fail.

    Attributes:
        parts: Processes.
        links: Ways between them.
        disks: Parts whose disk can be filled; may be none.
        clocks: Parts whose clock can be put off; may be none.
        versions: How many versions are promoted, from 1 on.
    """

    parts: Sequence[str]
    links: Sequence[str]
    disks: Sequence[str]
    clocks: Sequence[str]
    versions: int


def schedule(seed: int, seconds: float, places: Places) -> Iterator[Fault]:
    """Faults until the time is over; a long run has the store away for a minute in its middle."""
    chance = random.Random(seed)
    missing = {kind for kind, found in ((Kind.DISK_FULL, places.disks), (Kind.CLOCK, places.clocks)) if not found}
    kinds = [kind for kind in WEIGHTS if kind not in missing]
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
        yield _fault(kind, after_s, chance, places)


def _fault(kind: Kind, after_s: float, chance: random.Random, places: Places) -> Fault:  # noqa: PLR0911 - one a kind
    match kind:
        case Kind.KILL | Kind.RESTART:
            return Fault(after_s, kind, chance.choice(places.parts), chance.choice((0.0, chance.uniform(0.2, 4.0))))
        case Kind.FREEZE:
            # Past the storage's lease of 6 s, now and then.
            return Fault(after_s, kind, chance.choice(places.parts), chance.choice((0.5, 2.0, 9.0)))
        case Kind.CUT | Kind.STALL:
            return Fault(after_s, kind, chance.choice(places.links), chance.choice((0.2, 2.0, 8.0)))
        case Kind.DELAY:
            slower_s = chance.choice((0.02, 0.1, 0.4))
            return Fault(after_s, kind, chance.choice(places.links), chance.uniform(2, 8), slower_s)
        case Kind.DISK_FULL:
            return Fault(after_s, kind, chance.choice(places.disks), chance.uniform(2, 8))
        case Kind.CLOCK:
            # Past every lease, forth and back; within what ingest takes for a camera's clock.
            off_s = chance.choice((-120.0, -10.0, -1.0, 1.0, 10.0, 120.0))
            return Fault(after_s, kind, chance.choice(places.clocks), chance.uniform(2, 8), off_s)
        case Kind.PROMOTE:
            return Fault(after_s, kind, "route", amount=chance.randint(1, places.versions))
        case _:
            return Fault(after_s, kind, "valkey")
