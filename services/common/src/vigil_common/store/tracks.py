"""An entry of ReductStore in several, each of which only ever grows at its end.

ReductStore 1.21 keeps an entry in blocks of 1,024 records and finds a record by the block whose first time is the last
one before it. A record that comes late for a full block opens a block inside the other's span. From then on the times
after it are taken a second time, so that of two frames at one microsecond only one is found again, and each query reads
every block of the entry from the first on (measured: 10 ms without, 160 ms with one such block among 25).
So frames of "MODEL/CAMERA" that come late go to "MODEL/CAMERA/2", those late for that one too to "/3" and so on. All
tracks of a camera together have one record at a time at most.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# More than these only if cameras send days in no order at all: then the last one takes what is late as it comes.
MOST = 8
# So many of a camera's latest records are remembered: with fewer, more that is late costs a look at the server.
RECENT = 512
_PARTS = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands at a time: enough to tell whether it is the same."""

    frame_id: str | None
    sha256: str | None
    size_bytes: int


def base_of(entry: str) -> str:
    """MODEL/CAMERA of a track's name."""
    return "/".join(entry.split("/", _PARTS)[:_PARTS])


def name_of(base: str, track: int) -> str:
    """What the track with this index is called."""
    return f"{base}/{track + 1}" if track else base


def index_of(entry: str) -> int:
    """The index of the track with this name."""
    parts = entry.split("/", _PARTS)
    return int(parts[_PARTS]) - 1 if len(parts) > _PARTS else 0


class Tracks:
    """The latest time in each track of some models' cameras, in microseconds since 1970; 0 where it is empty.

    Right only while nobody else writes: what a model's next owner writes is not seen here.
    """

    def __init__(self) -> None:
        self._latest: dict[str, list[int]] = {}
        self._models: set[str] = set()
        self._recent: dict[str, dict[int, Frame]] = defaultdict(dict)
        # From when on all of a camera's records are among these.
        self._since_us: dict[str, int] = {}

    def knows(self, base: str) -> bool:
        """Whether the tracks of this camera's model have been learnt."""
        return base.partition("/")[0] in self._models

    def learn(self, model: str, latest: Mapping[str, int]) -> None:
        """Take over what the server says, by entry of any model."""
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for entry, time_us in latest.items():
            if entry.partition("/")[0] == model:
                found[base_of(entry)][index_of(entry)] = time_us
        for base, times in found.items():
            self._latest[base] = [times.get(track, 0) for track in range(max(times) + 1)]
            self._recent[base].clear()
            self._since_us[base] = max(self._latest[base]) + 1
        self._models.add(model)

    def forget(self, model: str) -> None:
        """Learn a model anew before it is written to again."""
        self._models.discard(model)
        for base in [base for base in self._latest if base.partition("/")[0] == model]:
            for known in (self._latest, self._recent, self._since_us):
                known.pop(base, None)

    def names(self, base: str, *, since_us: int = 0) -> list[str]:
        """The tracks that may hold a record from this time on."""
        times = self._latest.get(base, [])
        return [name_of(base, track) for track, latest in enumerate(times) if latest >= since_us]

    def latest_us(self, base: str) -> int:
        """Nothing of this camera stands later."""
        return max(self._latest.get(base, ()), default=0)

    def remembers(self, base: str, time_us: int) -> bool:
        """Whether `recent` tells all that stands at this time."""
        return time_us >= self._since_us.get(base, 0)

    def recent(self, base: str, time_us: int) -> Frame | None:
        """What stands there, of what is remembered."""
        return self._recent[base].get(time_us)

    def written(self, entry: str, time_us: int, frame: Frame) -> None:
        """Something stands in this track at this time now."""
        base = base_of(entry)
        recent = self._recent[base]
        recent[time_us] = frame
        if len(recent) > RECENT:
            kept = sorted(recent)[RECENT // 2 :]
            self._recent[base] = {at: recent[at] for at in kept}
            self._since_us[base] = max(kept[0], self._since_us.get(base, 0))
        times = self._latest.setdefault(base, [])
        track = index_of(entry)
        times.extend([0] * (track + 1 - len(times)))
        times[track] = max(times[track], time_us)

    def assign(self, base: str, times_us: Iterable[int]) -> list[str]:
        """The track for each of these ascending times: the one that gets least ahead by it; a new one where all are."""
        latest = list(self._latest.get(base, ()))
        names: list[str] = []
        for time_us in times_us:
            behind = [track for track, last in enumerate(latest) if last < time_us]
            if behind:
                track = max(behind, key=latest.__getitem__)
            elif len(latest) < MOST:
                track = len(latest)
                latest.append(0)
            else:
                track = MOST - 1
            latest[track] = max(latest[track], time_us)
            names.append(name_of(base, track))
        return names
