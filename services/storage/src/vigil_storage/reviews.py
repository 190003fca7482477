"""What people say of frames, what they should look at next, and what can be learned from it; free of transport."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import random
import re
import time
import uuid
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vigil_common.access import ANYBODY, Role, principal
from vigil_common.errors import Conflict, InvalidInput, NotFound, QueueFull
from vigil_common.store import labels as gate

from vigil_storage import domain, masks
from vigil_storage.annotations import Annotation, Heard, order_of, record_at, records_about

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from vigil_common.store.ports import FrameFilter, FrameStore, StoredRecord
    from vigil_common.streams.ports import ReviewLog

ANNOTATION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,57}")
PERSON = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,62}[^\s\x00-\x1f\x7f])?")
MAX_PERSON_BYTES = 200
MAX_NOTE = 2_000
APPLIED_S = 15.0
POLL_S = 0.5
RETRY_S = 2.0
DEFAULT_SIZE, MAX_SIZE = 20, 200
# Newest records looked at for the review queue; the first look reaches back so far, each further one four times as far.
# A store may have more records than can be looked at while somebody waits.
SCAN = 10_000
FIRST_LOOK_US = 3_600_000_000
LOOK_S = 5.0
EXPORT_PAGE = 500
# Of what is not a disagreement, this share is picked by chance.
RANDOM_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Remark:
    """What a person wants to say: as it came.

    Attributes:
        model: The model's name.
        frame_id: Of the frame.
        camera: Its camera; empty: searched for.
        label: "normal", "anomalous" or "unsure".
        mask: PNG; empty for none.
        note: Free text.
        author: Who says so.
        annotation_id: Makes saying it again harmless; empty: a new one.
    """

    model: str
    frame_id: str
    camera: str
    label: str
    mask: bytes
    note: str
    author: str
    annotation_id: str


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A frame with all that was said of it, oldest first, and the mask that stands."""

    frame: StoredRecord
    image: bytes
    history: tuple[Annotation, ...]
    mask: bytes


def person(name: str) -> str:
    """Who speaks: the token's holder where there are tokens, else as said; `InvalidInput` for no name."""
    who = principal()
    if who != ANYBODY and Role.ADMIN not in who.roles:
        return who.name
    if not PERSON.fullmatch(name) or len(gate.encode(name)) > MAX_PERSON_BYTES:
        raise InvalidInput("PERSON_INVALID", "say who you are: 1 to 64 characters, no line breaks")
    return name


def _check(remark: Remark) -> None:
    if not remark.model or not remark.frame_id:
        raise InvalidInput("FRAME_ID_MISSING", "model and frame_id are needed")
    if len(remark.note) > MAX_NOTE:
        raise InvalidInput(
            "NOTE_TOO_LONG", f"a note has at most {MAX_NOTE:,} characters, this one {len(remark.note):,}"
        )
    if remark.annotation_id and not ANNOTATION_ID.fullmatch(remark.annotation_id):
        raise InvalidInput("ANNOTATION_ID_INVALID", "annotation_id has 1 to 58 letters, digits and . _ : -")
    if remark.mask and remark.label == "normal":
        raise InvalidInput("MASK_ON_NORMAL", "a normal frame has no anomalous region; leave the mask out")


def _first(before: Annotation, said: Annotation) -> Annotation:
    """The first of two of one id; `Conflict` where they are not the same but for their times."""
    if replace(said, annotated_at_us=before.annotated_at_us) != before:
        raise Conflict("ANNOTATION_ID_REUSED", f"{said.annotation_id} stands for another annotation")
    return before


class Reviews:
    """What the service offers to people.

    Args:
        frames: Where frames are.
        annotations: Where what people said is.
        log: Where it waits for the store, and who has been given what.
        heard: Tells what shows, where the owner is in this process.
        now_us: Microseconds since 1970.
        chance: Picks the random part of the queue.
    """

    def __init__(
        self,
        frames: FrameStore,
        annotations: FrameStore,
        log: ReviewLog,
        *,
        heard: Heard | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
        chance: random.Random | None = None,
    ) -> None:
        self._frames = frames
        self._annotations = annotations
        self._log = log
        self._heard = heard or Heard()
        self._now_us = now_us
        self._chance = chance or random.Random()  # noqa: S311 - a sample, no secret

    async def annotate(self, remark: Remark) -> tuple[Annotation, bool]:
        """Keep what a person says.

        Returns:
            It, and whether the frame shows it yet; either way it can't be lost.

        Raises:
            InvalidInput: FRAME_ID_MISSING, PERSON_INVALID, NOTE_TOO_LONG, ANNOTATION_ID_INVALID, MASK_ON_NORMAL, or as
                `masks.canonical`.
            NotFound: UNKNOWN_FRAME.
            Conflict: ANNOTATION_ID_REUSED.
            QueueFull: ANNOTATIONS_FULL.
        """
        author = person(remark.author)
        _check(remark)
        frame = await self._find(remark.model, remark.frame_id, remark.camera)
        mask = b""
        if remark.mask:
            size = {"width": int(frame.labels["width"]), "height": int(frame.labels["height"])}
            mask = await asyncio.to_thread(masks.canonical, remark.mask, **size)
        said = Annotation(
            annotation_id=remark.annotation_id or f"a{uuid.uuid4().hex}",
            frame_id=remark.frame_id,
            entry=frame.entry,
            frame_at_us=frame.timestamp_us,
            label=remark.label,
            author=author,
            note=remark.note,
            annotated_at_us=self._now_us(),
            mask_sha256=hashlib.sha256(mask).hexdigest() if mask else "",
        )
        if remark.annotation_id:
            for before in await self._history(frame):
                if before.annotation_id == said.annotation_id:
                    return _first(before, said), True
        with self._heard.expect(said.annotation_id) as shows:
            waits = await self._log.put(remark.model, said.annotation_id, said.encode(), mask)
            if waits is None:
                raise QueueFull(
                    "ANNOTATIONS_FULL", "too many annotations wait for the store; try again", retry_after_s=RETRY_S
                )
            place, body = waits
            return _first(Annotation.decode(body), said), await self._applied(frame, place, shows)

    async def _find(self, model: str, frame_id: str, camera: str) -> StoredRecord:
        try:
            return await self._frames.find(model, frame_id, camera or None)
        except NotFound as error:
            raise NotFound(
                "UNKNOWN_FRAME",
                f"no frame {frame_id} of model {model} is stored: it never was, or retention has dropped it",
            ) from error

    async def _applied(self, frame: StoredRecord, place: str, shows: asyncio.Event) -> bool:
        """Wait until the frame shows it; the owner may be another process, which does not tell."""
        deadline = time.monotonic() + APPLIED_S
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(shows.wait(), POLL_S)
                return True
            now = await record_at(self._frames, frame.entry, frame.timestamp_us)
            if now is not None and order_of(now.labels.get("human_order", "0")) >= order_of(place):
                return True
            if time.monotonic() > deadline:
                return False

    async def _history(self, frame: StoredRecord) -> list[Annotation]:
        return [said for said, _ in await self._said(frame)]

    async def _said(self, frame: StoredRecord) -> list[tuple[Annotation, StoredRecord | None]]:
        """Everything said of a frame in order, each with its mask's record."""
        records = await records_about(self._annotations, frame)
        drawn = {record.labels["sha256"]: record for record in records if record.labels.get("kind") == "mask"}
        words = [record for record in records if record.labels.get("kind") == "annotation"]
        words.sort(key=lambda record: order_of(record.labels["human_order"]))
        said = []
        for record in words:
            _, body = await self._annotations.read(record.entry, record.timestamp_us)
            annotation = Annotation.decode(body)
            said.append((annotation, drawn.get(annotation.mask_sha256)))
        return said

    async def reviewed(self, frame: StoredRecord, image: bytes, *, with_mask: bool = True) -> Reviewed:
        """All that was said of a frame."""
        said = await self._said(frame) if "human" in frame.labels else []
        mask = b""
        if with_mask and said and said[-1][1] is not None:
            place = said[-1][1]
            _, mask = await self._annotations.read(place.entry, place.timestamp_us)
        return Reviewed(frame, image, tuple(words for words, _ in said), mask)

    async def queue(
        self, where: FrameFilter, reviewer: str, *, size: int, since_us: int | None, again: bool, peek: bool = False
    ) -> list[tuple[StoredRecord, str]]:
        """Frames to look at, each with why: disagreement, uncertain or random; with `peek` none counts as given.

        With `again` those follow that were given before, without a reason, the longest ago first.
        """
        reviewer = person(reviewer)
        if size > MAX_SIZE:
            raise InvalidInput("QUEUE_TOO_LARGE", f"a review queue has at most {MAX_SIZE} frames")
        size = size or DEFAULT_SIZE
        model = where.entries[0].partition("/")[0]
        before = await self._log.given(model, reviewer)
        seen = set(before)
        where = replace(where, start_us=since_us, equals={"outcome": "judged"}, absent=("human",))
        split = replace(where, equals={**where.equals, "agree": "false"})
        disagreeing = await self._newest(split, seen, limit=size)
        seen = seen | {record.labels["frame_id"] for record in disagreeing}
        others = await self._newest(where, seen, limit=SCAN)
        given = [
            *((record, "disagreement") for record in disagreeing),
            *pick(others, size - len(disagreeing), self._chance),
        ]
        if again and len(given) < size:
            turns = {frame_id: turn for turn, frame_id in enumerate(before)}
            had = await self._newest(where, {record.labels["frame_id"] for record, _ in given}, limit=SCAN)
            had.sort(key=lambda record: turns.get(record.labels["frame_id"], -1))
            given += [(record, "") for record in had[: size - len(given)]]
        if not peek:
            await self._log.give(model, reviewer, [record.labels["frame_id"] for record, _ in given])
        return given

    async def shown(self, frame: StoredRecord, reviewer: str) -> None:
        """A person looks at a frame: it is not given to them a second time."""
        await self._log.give(frame.entry.partition("/")[0], person(reviewer), [frame.labels["frame_id"]])

    async def _newest(self, where: FrameFilter, seen: set[str], *, limit: int) -> list[StoredRecord]:
        """Matching records but those seen, by looks that reach back ever further: the store gives the oldest first.

        What is found within `LOOK_S` is all: few may match, of more than can be looked at.
        """
        newest: list[StoredRecord] = []
        stop, span = self._now_us() + FIRST_LOOK_US, 2 * FIRST_LOOK_US
        oldest = max(where.start_us or 0, 0)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                while stop > oldest and len(newest) < limit:
                    start = max(stop - span, oldest)
                    window = replace(where, start_us=start, stop_us=stop)
                    query = self._frames.query(window, limit=limit - len(newest) + len(seen))
                    async with aclosing(query) as found:  # type: ignore[type-var]
                        async for record in found:
                            if record.labels["frame_id"] not in seen:
                                newest.append(record)
                            if len(newest) == limit:
                                break
                    stop, span = start, 4 * span
        return newest

    async def export(self, where: FrameFilter, *, decided: bool) -> AsyncIterator[Reviewed]:
        """Frames that people labelled, oldest first, with image and mask."""
        where = replace(where, present=("human",))
        after: domain.PageToken | None = None
        while True:
            start_us = max(after.timestamp_us, where.start_us or 0) if after else where.start_us
            limit = EXPORT_PAGE + 1 + (len(after.entries) if after else 0)
            found = [record async for record in self._frames.query(replace(where, start_us=start_us), limit=limit)]
            given, after = domain.page(found, EXPORT_PAGE, after)
            for frame in given:
                stored, image = await self._frames.read(frame.entry, frame.timestamp_us)
                # People may say more while this goes on.
                if decided and stored.labels.get("human", "unsure") == "unsure":
                    continue
                yield await self.reviewed(stored, image)
            if after is None:
                return


def pick(records: Sequence[StoredRecord], size: int, chance: random.Random) -> list[tuple[StoredRecord, str]]:
    """Those nearest their threshold, then some by chance."""
    by_chance = round(size * RANDOM_SHARE)
    near = heapq.nsmallest(size - by_chance, records, key=_distance)
    taken = {record.labels["frame_id"] for record in near}
    rest = [record for record in records if record.labels["frame_id"] not in taken]
    sample = chance.sample(rest, min(by_chance, len(rest)))
    return [*((record, "uncertain") for record in near), *((record, "random") for record in sample)]


def _distance(record: StoredRecord) -> float:
    return abs(float(record.labels["score"]) - float(record.labels.get("threshold", "0.5")))
