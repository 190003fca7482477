"""Pairs the verdicts of live and candidate by frame id, in a window that counts verdicts and knows no clock.

A step is a function of the verdicts read and of the state they found, and of nothing else: read again after a crash,
the same verdicts give the same step, and the report's script takes it once. The window is counted in verdicts, so a
clock that jumps and a night without frames expire nothing.

A frame is *waiting* after its first verdict. It is *settled* once the second came, or by being given up `WINDOW`
verdicts later, and forgotten after twice that; until then whatever comes of it is counted for what it is.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from vigil_common.streams.ports import ComparedVerdict, Disagreed, ReportPlace, ReportStep

from vigil_shadow import convert
from vigil_shadow.domain import Compared, Failed, Pair
from vigil_shadow.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

WINDOW = 4_096
# A pause longer than this counts as one: neither a stopped camera nor a clock that jumps is evidence.
PAUSE_MS = 60_000

# What a settled frame's further verdicts are counted as.
SETTLED = {b"p": "duplicate", b"x": "late", b"f": "foreign"}


class _Open(NamedTuple):
    kind: bytes
    number: int
    header: bytes = b""
    outcome: bytes = b""

    def encode(self) -> bytes:
        """As the report store keeps it: a settled frame's is one short word."""
        start = b"%c%d:%d:" % (self.kind, self.number, len(self.header))
        return start + self.header + self.outcome

    @classmethod
    def decode(cls, data: bytes) -> _Open:
        """The inverse of `encode`."""
        number, length, rest = data[1:].split(b":", 2)
        end = int(length)
        return cls(data[:1], int(number), rest[:end], rest[end:])


class Pairing:
    """The frames of one run between their first verdict and being forgotten.

    Args:
        compared: Who is compared.
        place: Where the report stands.
        last_ms: When the run's last verdict came, by the stream's clock; 0 before the first.
        window: Verdicts that a frame waits for its pair.
    """

    def __init__(self, compared: Compared, place: ReportPlace, *, last_ms: int = 0, window: int = WINDOW) -> None:
        self._compared = compared
        self._place = place.place
        self._number = place.number
        self._last_ms = last_ms
        self._window = window
        known = sorted(((name, _Open.decode(data)) for name, data in place.open.items()), key=lambda one: one[1].number)
        self._known = dict(known)
        self._waiting = {name: convert.said(found.outcome) for name, found in known if found.kind not in SETTLED}
        # Numbers of first verdicts, in order; what has been settled or forgotten meanwhile is passed over.
        self._to_give_up = deque((found.number, name) for name, found in known if found.kind not in SETTLED)
        self._to_forget = deque((found.number, name) for name, found in known)

    def step(self, verdicts: Sequence[ComparedVerdict]) -> ReportStep:
        """What these verdicts, the next ones after the place, add; moves on as if it had been taken."""
        tally = Tally()
        changed: dict[str, bytes] = {}
        after = self._place
        for verdict in verdicts:
            self._count_time(verdict, tally)
            self._expire(verdict.number, tally, changed)
            self._take(verdict, tally, changed)
        tally.facts["last_ms"] = str(self._last_ms)
        tally.close()
        return ReportStep(
            after=after,
            upto=self._place,
            number=self._number,
            adds={name: value for name, value in tally.adds.items() if value},
            greatest=tally.greatest,
            facts=tally.facts,
            joint=tally.joint,
            open=changed,
            disagreements=[
                Disagreed(pair.frame_id, severity, convert.disagreement(pair, severity).SerializeToString())
                for pair, severity in tally.disagreements
            ],
            comparisons=convert.comparisons(self._compared.model, tally.pairs),
        )

    def _count_time(self, verdict: ComparedVerdict, tally: Tally) -> None:
        if verdict.number > self._number + 1:
            tally.adds["lost"] += verdict.number - self._number - 1
        now_ms = int(verdict.entry_id.partition("-")[0])
        if self._last_ms:
            tally.adds["compared_ms"] += min(PAUSE_MS, max(0, now_ms - self._last_ms))
        self._place, self._number, self._last_ms = verdict.entry_id, verdict.number, now_ms

    def _expire(self, number: int, tally: Tally, changed: dict[str, bytes]) -> None:
        while self._to_give_up and self._to_give_up[0][0] <= number - self._window:
            first, name = self._to_give_up.popleft()
            if name in self._waiting and self._known[name].number == first:
                tally.adds["missing" if self._known[name].kind == b"l" else "unmatched"] += 1
                self._settle(name, b"x", tally, changed)
        while self._to_forget and self._to_forget[0][0] <= number - 2 * self._window:
            _, name = self._to_forget.popleft()
            del self._known[name]
            changed[name] = b""

    def _settle(self, name: str, kind: bytes, tally: Tally, changed: dict[str, bytes]) -> None:
        if name in self._waiting:
            del self._waiting[name]
            tally.adds["waiting"] -= 1
        self._known[name] = _Open(kind, self._known[name].number)
        changed[name] = self._known[name].encode()

    def _take(self, verdict: ComparedVerdict, tally: Tally, changed: dict[str, bytes]) -> None:
        name, kind = verdict.frame_id, b"c" if verdict.candidate else b"l"
        known = self._known.get(name)
        if known is not None and (known.kind in SETTLED or known.kind == kind):
            tally.adds[SETTLED.get(known.kind, "duplicate")] += 1
            return
        said = convert.said(verdict.outcome)
        if said is None:
            tally.adds["malformed"] += 1
            return
        expected = self._compared.candidate_digest if verdict.candidate else self._compared.live_digest
        if not isinstance(said, Failed) and said.digest != expected:
            tally.adds["foreign"] += 1
            if known is None:
                self._known[name] = _Open(kind, verdict.number)
                self._to_forget.append((verdict.number, name))
            self._settle(name, b"f", tally, changed)
            return
        if known is None:
            self._known[name] = _Open(kind, verdict.number, verdict.header, verdict.outcome)
            self._waiting[name] = said
            self._to_give_up.append((verdict.number, name))
            self._to_forget.append((verdict.number, name))
            tally.adds["waiting"] += 1
            changed[name] = self._known[name].encode()
            return
        other = self._waiting[name]
        assert other is not None  # noqa: S101 - what can't be read never waits
        live, candidate = (other, said) if verdict.candidate else (said, other)
        origin = convert.origin(verdict.header if verdict.candidate else known.header)
        self._settle(name, b"p", tally, changed)
        tally.add(Pair(name, live, candidate, origin))
