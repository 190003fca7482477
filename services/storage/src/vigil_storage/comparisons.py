"""What live and candidate said of a frame, as labels on its image.

Only the model's owner runs this, beside its writer: two that label one record would lose each other's labels. As with
frames, the store's word alone is not durable: a comparison is forgotten once its labels are found again
`confirm_after_s` after they were written, in the same life of the server.

There is no hurry: a round every `ROUND_S` looks for many frames at once and labels them in batches, since a look for
each frame would cost storage as much as storing it. Between those steps it rests, so that live's frames don't wait for
a whole round.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from vigil.shadow.v1 import shadow_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import NotFound, Unavailable, VigilError
from vigil_common.logging import get_logger
from vigil_common.store.find import runs
from vigil_common.store.ports import FrameFilter, Labelling

from vigil_storage import convert, metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from vigil_common.store.ports import FrameStore, StoredRecord
    from vigil_common.streams.ports import ComparisonSource

BATCH = 64
ROUND_S = 2.0
# Looked for or labelled in one step, and how many times as long the rest after it is.
STEP = 16
REST = 4
# Comparisons in hand; past this, no more are taken.
MAX_IN_HAND = 1_024
# A frame is stored within moments of its verdict; where a store that answers has not had it for so long, it was dropped
# by retention, or never will be there.
GIVE_UP_S = 600.0
# A record stands at its time of capture or some microseconds later; looks over larger gaps than this are apart.
SLACK_US = 1_000
GAP_US = 10_000_000
MOST_PER_LOOK = 10_000
# Frames whose place is remembered: a candidate's verdict comes within moments of live's.
REMEMBERED = 4_096

log = get_logger()


@dataclass(slots=True, eq=False)
class _InHand:
    place: str
    comparison: shadow_pb2.Comparison
    missing_since: float | None = None
    due: float = 0.0
    record: tuple[str, int] | None = None


class Places:
    """Where the latest frames of a model were stored, so that not each has to be looked for."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, int]] = {}

    def add(self, frame_id: str, entry: str, timestamp_us: int) -> None:
        """It stands there now."""
        self._places[frame_id] = entry, timestamp_us
        if len(self._places) > REMEMBERED:
            del self._places[next(iter(self._places))]

    def get(self, frame_id: str) -> tuple[str, int] | None:
        """Entry and time, where they are remembered."""
        return self._places.get(frame_id)

    def forget(self, frame_id: str) -> None:
        """It does not stand there any more."""
        self._places.pop(frame_id, None)


def labels_of(comparison: shadow_pb2.Comparison) -> dict[str, str]:
    """The labels that say what the candidate said."""
    anomalous = comparison.label == types_pb2.LABEL_ANOMALOUS
    return {
        "candidate_version": str(comparison.candidate.version),
        "candidate_digest": comparison.candidate.digest,
        "candidate_score": repr(comparison.score),
        "candidate_label": "anomalous" if anomalous else "normal",
        "candidate_threshold": repr(comparison.threshold),
        "agree": "true" if comparison.agree else "false",
    }


class ComparisonLabeller:
    """Labels the frames of one model; a fresh one for each time of being the owner.

    Args:
        model: The model's name.
        source: Its comparisons.
        store: Where its frames are.
        places: Where the writer has put the latest of them.
        confirm_after_s: How long after labelling a frame is looked at again.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        source: ComparisonSource,
        store: FrameStore,
        places: Places,
        *,
        confirm_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._source = source
        self._store = store
        self._places = places
        self._confirm_after_s = confirm_after_s
        self._clock = clock
        self._in_hand: list[_InHand] = []
        self._held: set[str] = set()
        self._replay = True

    async def run(self) -> None:
        """Label until cancelled, first what an earlier owner left."""
        while True:
            try:
                while len(self._in_hand) < MAX_IN_HAND and await self._collect():
                    pass
                await self._label()
                await self._confirm()
            except VigilError as error:  # whatever it is, frames must go on being stored
                for one in self._in_hand:  # they may be on their way back into a store that was away
                    one.missing_since = None
                log.warning("comparisons_wait", model=self._model, reason=error.reason, message=error.message)
            await asyncio.sleep(ROUND_S)

    async def _collect(self) -> bool:
        """Take more; False where there is nothing more now."""
        found = await self._source.read(count=BATCH, block_ms=0, pending=self._replay)
        more = bool(found) or self._replay
        self._replay = self._replay and bool(found)
        for place, blob in found:
            if place in self._held:
                continue
            comparison = shadow_pb2.Comparison()
            try:
                comparison.ParseFromString(blob)
            except DecodeError:
                log.exception("comparison_malformed", model=self._model, place=place)
                await self._source.done([place])
                continue
            self._held.add(place)
            self._in_hand.append(_InHand(place, comparison))
        return more

    async def _label(self) -> None:
        """Label those whose frame is stored; the others are looked for again in the next round."""
        due = [one for one in self._in_hand if one.record is None]
        if not due:
            return
        found = await self._find(due)
        changes = [
            (one, Labelling(*found[one.comparison.frame_id], labels_of(one.comparison)))
            for one in due
            if one.comparison.frame_id in found
        ]
        # Neighbours together: the store writes a block anew for each call that changes it.
        changes.sort(key=lambda pair: (pair[1].entry, pair[1].timestamp_us))
        for start in range(0, len(changes), STEP):
            step = changes[start : start + STEP]
            began = time.monotonic()
            results = await self._store.label([change for _, change in step])
            for (one, change), error in zip(step, results, strict=True):
                if error is None:
                    one.record = change.entry, change.timestamp_us
                    one.due = self._clock() + self._confirm_after_s
                elif isinstance(error, NotFound):
                    self._places.forget(one.comparison.frame_id)
                elif isinstance(error, Unavailable):
                    one.missing_since = None
                else:
                    log.error("comparison_refused", frame_id=one.comparison.frame_id, reason=error.reason)
                    await self._forget([one], "refused")
            await _rest(began)
        now = self._clock()
        missing = [one for one in due if one.record is None and one.place in self._held]
        late = [one for one in missing if one.missing_since is not None and now - one.missing_since > GIVE_UP_S]
        for one in missing:
            one.missing_since = now if one.missing_since is None else one.missing_since
        if late:
            log.warning("comparisons_without_frame", model=self._model, count=len(late))
            await self._forget(late, "no_frame")

    async def _confirm(self) -> None:
        """Forget those whose labels stand; label the others again."""
        now = self._clock()
        due = [one for one in self._in_hand if one.record is not None and one.due <= now]
        if not due:
            return
        uptime_s = await self._store.uptime_s()
        if uptime_s < self._confirm_after_s:
            return
        stands = [one async for one in self._standing(due)]
        if await self._store.uptime_s() < uptime_s:
            return  # a new life of the server: what was found may still be lost
        for one in due:
            one.record = None
        await self._forget(stands, "labelled")

    async def _forget(self, done: Sequence[_InHand], result: str) -> None:
        if not done:
            return
        await self._source.done([one.place for one in done])
        metrics.COMPARISONS.labels(self._model, result).inc(len(done))
        gone = {one.place for one in done}
        self._held -= gone
        self._in_hand = [one for one in self._in_hand if one.place not in gone]

    async def _standing(self, due: Sequence[_InHand]) -> AsyncIterator[_InHand]:
        records = {record.labels.get("frame_id"): record async for record in self._records(due)}
        for one in due:
            record = records.get(one.comparison.frame_id)
            if record is not None and labels_of(one.comparison).items() <= record.labels.items():
                yield one

    async def _find(self, due: Sequence[_InHand]) -> dict[str, tuple[str, int]]:
        """Where the frames stand, by id, of those that are stored."""
        found: dict[str, tuple[str, int]] = {}
        unknown: list[_InHand] = []
        for one in due:
            if (place := self._places.get(one.comparison.frame_id)) is not None:
                found[one.comparison.frame_id] = place
            else:
                unknown.append(one)
        async for record in self._records(unknown):
            found[record.labels["frame_id"]] = record.entry, record.timestamp_us
        return found

    async def _records(self, due: Sequence[_InHand]) -> AsyncIterator[StoredRecord]:
        """Records around their own times, or those of capture, by one look for those that are near each other."""
        times: dict[str, list[int]] = defaultdict(list)
        for one in due:
            at_us = one.record[1] if one.record is not None else convert.to_us(one.comparison.captured_at)
            times[f"{self._model}/{one.comparison.camera}"].append(at_us)
        for entry, found in times.items():
            found.sort()
            for first in range(0, len(found), STEP):
                for start, stop in runs(found[first : first + STEP], GAP_US):
                    began = time.monotonic()
                    where = FrameFilter([entry], start_us=start, stop_us=stop + SLACK_US)
                    async for record in self._store.query(where, limit=MOST_PER_LOOK):
                        yield record
                    await _rest(began)


async def _rest(began: float) -> None:
    """Leave the store to others for a multiple of what a step took."""
    await asyncio.sleep(REST * (time.monotonic() - began))
