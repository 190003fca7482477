"""What people say of frames: as append-only records that are the truth, and as labels of the image's record.

Both stand in the store of annotations: the mask and what was said (JSON), at the image's own time or the next free
microseconds. The labels of the image's record only repeat what stands now, so that queries find it. Only the model's
owner writes them, in the order of the log; a record is forgotten by the log once it and its labels are found again
`confirm_after_s` later, in the same life of the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from vigil_common.errors import NotFound, Unavailable
from vigil_common.logging import get_logger
from vigil_common.store.ports import FrameFilter, Labelling, Record, Written

from vigil_storage import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vigil_common.store.ports import FrameStore, StoredRecord
    from vigil_common.streams.ports import QueuedAnnotation, ReviewLog

BATCH = 32
READ_BLOCK_MS = 250
MAX_IN_HAND = 256
UNAVAILABLE_S = 1.0
# A frame may be on its way back into a store that lost it; after this long, retention has dropped it.
GIVE_UP_S = 60.0
# How far behind the image's time its annotations may stand.
WINDOW_US = 10_000

log = get_logger()


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one person said of one frame.

    Attributes:
        annotation_id: Its own id.
        frame_id: Of the frame.
        entry: "MODEL/CAMERA" of the frame.
        frame_at_us: Where the frame's record stands.
        label: "normal", "anomalous" or "unsure".
        author: Who said so.
        note: Free text.
        annotated_at_us: When.
        mask_sha256: Of the mask; empty where there is none.
    """

    annotation_id: str
    frame_id: str
    entry: str
    frame_at_us: int
    label: str
    author: str
    note: str
    annotated_at_us: int
    mask_sha256: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, body: bytes) -> Annotation:
        """Of what `encode` made."""
        return cls(**json.loads(body))


def order_of(place: str) -> tuple[int, int]:
    """A place in the log, so that a later one is greater."""
    milliseconds, _, number = place.partition("-")
    return int(milliseconds), int(number or 0)


def labels_of(annotation: Annotation, place: str) -> dict[str, str]:
    """Labels of the image's record while the annotation stands."""
    return {
        "annotation": annotation.annotation_id,
        "human": annotation.label,
        "human_by": annotation.author,
        "human_at_us": str(annotation.annotated_at_us),
        "human_mask": "true" if annotation.mask_sha256 else "false",
        "human_order": place,
    }


def records_of(annotation: Annotation, place: str, mask: bytes) -> list[Record]:
    """What is kept for good: the mask first, so that nothing said points at a mask that is not there."""
    body = annotation.encode()
    common = {"annotates": annotation.frame_id, "human": annotation.label, "human_by": annotation.author}
    said = {
        **common,
        "frame_id": annotation.annotation_id,
        "sha256": hashlib.sha256(body).hexdigest(),
        "kind": "annotation",
        "human_order": place,
    }
    records = [Record(annotation.entry, annotation.frame_at_us, said, body, "application/json")]
    if mask:
        drawn = {
            **common,
            # No annotation can have this id.
            "frame_id": f"{annotation.annotation_id}/mask",
            "sha256": annotation.mask_sha256,
            "kind": "mask",
        }
        records.insert(0, Record(annotation.entry, annotation.frame_at_us, drawn, mask, "image/png"))
    return records


async def record_at(store: FrameStore, entry: str, timestamp_us: int) -> StoredRecord | None:
    """The record that stands exactly there."""
    where = FrameFilter([entry], start_us=timestamp_us, stop_us=timestamp_us + 1)
    async for record in store.query(where, limit=1):
        return record
    return None


async def records_about(store: FrameStore, frame: StoredRecord) -> list[StoredRecord]:
    """Annotations and masks of a frame, by the time they were said."""
    at = frame.timestamp_us
    where = FrameFilter(
        [frame.entry], start_us=at, stop_us=at + WINDOW_US, equals={"annotates": frame.labels["frame_id"]}
    )
    return [record async for record in store.query(where, limit=WINDOW_US)]


class Heard:
    """Tells those who said something, in this process, that the frame shows it."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}

    @contextmanager
    def expect(self, annotation_id: str) -> Iterator[asyncio.Event]:
        """What is set once it shows."""
        event = self._waiting.setdefault(annotation_id, asyncio.Event())
        try:
            yield event
        finally:
            self._waiting.pop(annotation_id, None)

    def tell(self, annotation_id: str) -> None:
        """It shows."""
        if event := self._waiting.get(annotation_id):
            event.set()


@dataclass(slots=True, eq=False)
class _InHand:
    queued: QueuedAnnotation
    annotation: Annotation
    written: dict[int, str] = field(default_factory=dict)
    labelled: bool = False
    # Since when its frame is missed, and whether it is expected no more.
    missing_since: float | None = None
    given_up: bool = False
    due: float = 0.0


class AnnotationKeeper:
    """Keeps what people say of one model's frames; a fresh one for each time of being the owner.

    Args:
        model: The model's name.
        source: Where people's words wait.
        annotations: Where they are kept.
        frames: Whose labels repeat them.
        confirm_after_s: How long after a write it is looked for.
        heard: Told what shows, where somebody in this process waits for it.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        source: ReviewLog,
        annotations: FrameStore,
        frames: FrameStore,
        *,
        confirm_after_s: float,
        heard: Heard | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._source = source
        self._annotations = annotations
        self._frames = frames
        self._heard = heard or Heard()
        self._confirm_after_s = confirm_after_s
        self._clock = clock
        self._after = "0"
        self._in_hand: list[_InHand] = []

    async def run(self) -> None:
        """Keep until cancelled, first what an earlier owner left."""
        # Other owners write before and after.
        self._annotations.forget(self._model)
        try:
            await self._keep()
        finally:
            self._annotations.forget(self._model)

    async def _keep(self) -> None:
        while True:
            try:
                await self._collect()
                await self._apply([one for one in self._in_hand if not one.labelled])
                await self._confirm()
            except Unavailable as error:
                for one in self._in_hand:  # frames may be on their way back into a store that was away
                    one.missing_since = None
                log.warning("annotations_wait", model=self._model, reason=error.reason, message=error.message)
                await asyncio.sleep(UNAVAILABLE_S)

    async def _collect(self) -> None:
        if len(self._in_hand) >= MAX_IN_HAND:
            await asyncio.sleep(READ_BLOCK_MS / 1000)
            return
        for queued in await self._source.read(self._model, self._after, count=BATCH, block_ms=READ_BLOCK_MS):
            self._after = queued.place
            self._in_hand.append(_InHand(queued, Annotation.decode(queued.body)))

    async def _apply(self, todo: Sequence[_InHand]) -> None:
        """Write, then label, in the order of the log; what the store refuses is dropped."""
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            await self._write([one for one in batch if not one.written])
            batch = [one for one in batch if one.written]
            await self._label(batch)
            for one in batch:
                if one.labelled:
                    self._heard.tell(one.annotation.annotation_id)
        gone = [one for one in todo if not one.labelled and self._missing_s(one) > GIVE_UP_S]
        if gone:
            log.warning("annotations_without_frame", model=self._model, count=len(gone))
            for one in gone:
                one.labelled = one.given_up = True

    def _missing_s(self, one: _InHand) -> float:
        """For how long its frame has not been there, as often as a store that answered was asked."""
        return 0.0 if one.missing_since is None else self._clock() - one.missing_since

    async def _write(self, batch: Sequence[_InHand]) -> None:
        records = [
            (one, record) for one in batch for record in records_of(one.annotation, one.queued.place, one.queued.mask)
        ]
        if not records:
            return
        results = await self._annotations.write([record for _, record in records])
        refused: dict[_InHand, Exception] = {}
        for (one, record), result in zip(records, results, strict=True):
            if isinstance(result, Written):
                one.written[result.timestamp_us] = record.labels["sha256"]
            elif not isinstance(result, Unavailable):
                refused[one] = result
        away = [result for result in results if isinstance(result, Unavailable)]
        if away:
            for one in batch:  # whatever stands already is found there
                one.written = {}
            raise away[0]
        for one in batch:
            one.due = self._clock() + self._confirm_after_s
        await self._drop(refused)

    async def _drop(self, refused: Mapping[_InHand, Exception]) -> None:
        """They can't be kept, now or later."""
        if not refused:
            return
        for one, error in refused.items():
            one.written = {}
            said = one.annotation
            log.error(
                "annotation_refused",
                model=self._model,
                annotation_id=said.annotation_id,
                frame_id=said.frame_id,
                message=str(error),
            )
        await self._source.done(self._model, [one.queued for one in refused])
        metrics.REFUSED_ANNOTATIONS.labels(self._model).inc(len(refused))
        self._in_hand = [one for one in self._in_hand if one not in refused]

    async def _label(self, batch: Sequence[_InHand]) -> None:
        """Let the frames' labels say it, unless they say something later."""
        stand = await self._standing(batch)
        todo = [one for one in batch if one not in stand]
        last = {(one.annotation.entry, one.annotation.frame_at_us): one for one in todo}
        changes = [Labelling(*place, labels_of(one.annotation, one.queued.place)) for place, one in last.items()]
        results = dict(zip(last, await self._frames.label(changes), strict=True)) if changes else {}
        for one in stand:
            one.labelled = True
        for one in todo:
            error = results[one.annotation.entry, one.annotation.frame_at_us]
            one.labelled = error is None
            if error is None or isinstance(error, Unavailable):
                one.missing_since = None
            elif one.missing_since is None:
                one.missing_since = self._clock()
            if error is not None and not isinstance(error, NotFound | Unavailable):
                log.error("annotation_label_refused", annotation_id=one.annotation.annotation_id, reason=error.reason)

    async def _standing(self, some: Sequence[_InHand]) -> list[_InHand]:
        """Those that their frames' labels say, or that were followed by something that they say."""

        async def stands(one: _InHand) -> bool:
            frame = await record_at(self._frames, one.annotation.entry, one.annotation.frame_at_us)
            if frame is None or frame.labels["frame_id"] != one.annotation.frame_id:
                return False
            return order_of(frame.labels.get("human_order", "0")) >= order_of(one.queued.place)

        found = await asyncio.gather(*map(stands, some))
        return [one for one, there in zip(some, found, strict=True) if there]

    async def _confirm(self) -> None:
        """Forget what stands; what vanished is written again."""
        now = self._clock()
        due = [one for one in self._in_hand if one.labelled and one.due <= now][:BATCH]
        if not due:
            return
        uptime_s = await self._annotations.uptime_s()
        if uptime_s < self._confirm_after_s:
            return
        found = await asyncio.gather(*(self._annotations.confirm(one.annotation.entry, one.written) for one in due))
        stand = await self._standing(due)
        if await self._annotations.uptime_s() < uptime_s:
            return  # a new life of the server: what was found may still be lost
        kept = [
            one
            for one, times in zip(due, found, strict=True)
            if times == one.written.keys() and (one in stand or one.given_up)
        ]
        for one in due:
            if one not in kept:
                one.written, one.labelled, one.missing_since, one.given_up = {}, False, None, False
        if len(kept) < len(due):
            log.warning("annotations_vanished", model=self._model, count=len(due) - len(kept))
        await self._source.done(self._model, [one.queued for one in kept])
        metrics.ANNOTATIONS.labels(self._model).inc(len(kept))
        self._in_hand = [one for one in self._in_hand if one not in kept]
