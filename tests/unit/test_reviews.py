"""What people say of frames: kept, in order, found again; what they get to look at."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import os
import random
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from PIL import Image
from prometheus_client import REGISTRY
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_client import StorageClient
from vigil_common.access import Principal, Role, enter, principal
from vigil_common.errors import Conflict, InvalidInput, NotFound, QueueFull, Unavailable
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.ports import FrameFilter, Labelling, Record, Written
from vigil_common.store.reduct import ReductFrameStore
from vigil_common.streams.memory import MemoryStreams
from vigil_storage import masks
from vigil_storage.annotations import GIVE_UP_S, Annotation, AnnotationKeeper, Heard, labels_of, order_of, records_of
from vigil_storage.app import Storage
from vigil_storage.reviews import Reviews, pick
from vigil_storage.servicer import IMAGE_PART_BYTES, FrameServicer

from tests.support.reduct import ReductServer, find_binary, reduct_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from vigil_common.errors import VigilError
    from vigil_common.store.ports import FrameStore, StoredRecord

M = "cells"
T0 = 1_750_000_000_000_000
WIDTH, HEIGHT = 8, 6
NORMAL, ANOMALOUS, UNSURE = types_pb2.LABEL_NORMAL, types_pb2.LABEL_ANOMALOUS, types_pb2.LABEL_UNSURE


def frame(number: int, *, score: float = 0.1, camera: str = "cam1", **labels: str) -> Record:
    image = f"image {number}".encode()
    known = {
        "frame_id": f"f{number}",
        "sha256": hashlib.sha256(image).hexdigest(),
        "model": M,
        "camera": camera,
        "captured_at_us": str(T0 + number),
        "width": str(WIDTH),
        "height": str(HEIGHT),
        "outcome": "judged",
        "score": repr(score),
        "threshold": "0.5",
        "label": "anomalous" if score >= 0.5 else "normal",
        "version": "1",
    }
    return Record(f"{M}/{camera}", T0 + number * 100_000, {**known, **labels}, image, "image/png")


def drawn(*, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "L", kind: str = "PNG", empty: bool = False) -> bytes:
    image = Image.new(mode, size)
    if not empty:
        image.paste("white", (1, 1, 4, 3))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


class Bench:
    """The service over two stores, with the owner's part running."""

    def __init__(self, frames: FrameStore, annotations: FrameStore, streams: MemoryStreams) -> None:
        self.frames = frames
        self.annotations = annotations
        self.log = streams.reviews
        self.heard = Heard()
        chance = random.Random(1)
        reviews = Reviews(
            frames, annotations, streams.reviews, heard=self.heard, now_us=lambda: T0 + 10**9, chance=chance
        )
        self.api = FrameServicer(Storage(frames, None), reviews)  # type: ignore[arg-type]

    async def annotate(self, frame_id: str, label: Any = ANOMALOUS, **more: Any) -> storage_pb2.AnnotateResponse:
        fields = {"model": M, "frame_id": frame_id, "label": label, "author": "Ann", **more}
        return await self.api.Annotate(storage_pb2.AnnotateRequest(**fields), None)

    async def get(self, frame_id: str) -> storage_pb2.GetResponse:
        return await self.api.Get(storage_pb2.GetRequest(model=M, frame_id=frame_id), None)

    async def queue(self, reviewer: str = "Ann", **more: Any) -> list[tuple[str, str]]:
        request = storage_pb2.ReviewQueueRequest(model=M, reviewer=reviewer, **more)
        found = await self.api.ReviewQueue(request, None)
        names = storage_pb2.ReviewReason.Name
        return [(one.frame.header.frame_id, names(one.reason).rpartition("_")[2]) for one in found.items]

    async def query(self, **more: Any) -> list[str]:
        found = await self.api.Query(storage_pb2.QueryRequest(model=M, **more), None)
        return [one.header.frame_id for one in found.frames]

    @asynccontextmanager
    async def owning(self, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[None]:
        keeper = AnnotationKeeper(
            M, self.log, self.annotations, self.frames, confirm_after_s=0.05, heard=self.heard, clock=clock
        )
        task = asyncio.create_task(keeper.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def all_kept(self, deadline_s: float = 10) -> None:
        async with asyncio.timeout(deadline_s):
            while await self.log.read(M, "0", count=1, block_ms=0):
                await asyncio.sleep(0.02)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    frames = await EmbeddedFrameStore.open(tmp_path)
    annotations = await EmbeddedFrameStore.open(tmp_path / "annotations")
    yield Bench(frames, annotations, MemoryStreams())
    await frames.close()
    await annotations.close()


async def test_what_a_person_says_stands_on_the_frame_and_its_history_is_kept(bench: Bench) -> None:
    await bench.frames.write([frame(1), frame(2)])
    async with bench.owning():
        first = await bench.annotate("f1", mask=drawn(), note="a crack,\nupper left", author="Zoë")
        second = await bench.annotate("f1", UNSURE, author="Bob")
        await bench.all_kept()
    assert first.applied
    assert second.applied
    found = await bench.get("f1")
    assert [(a.label, a.author, a.note, a.masked) for a in found.annotations] == [
        (ANOMALOUS, "Zoë", "a crack,\nupper left", True),
        (UNSURE, "Bob", "", False),
    ]
    assert (found.frame.annotation.label, found.frame.annotation.author) == (UNSURE, "Bob")
    assert found.mask == b""
    assert not found.frame.header.labels
    assert not (await bench.get("f2")).frame.HasField("annotation")


async def test_the_mask_that_stands_comes_back_as_grey_zeros_and_255s(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    async with bench.owning():
        await bench.annotate("f1", mask=drawn(mode="1"))
    mask = Image.open(io.BytesIO((await bench.get("f1")).mask))
    assert (mask.mode, mask.size, mask.getbbox(), set(mask.tobytes())) == (
        "L",
        (WIDTH, HEIGHT),
        (1, 1, 4, 3),
        {0, 255},
    )


async def test_two_people_at_once_are_both_kept_and_the_later_stands(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    async with bench.owning():
        await asyncio.gather(
            *(bench.annotate("f1", NORMAL if n % 2 else UNSURE, author=f"person {n}") for n in range(40))
        )
        await bench.all_kept()
    found = await bench.get("f1")
    assert {a.author for a in found.annotations} == {f"person {n}" for n in range(40)}
    assert found.frame.annotation.author == found.annotations[-1].author
    assert found.frame.annotation.label == found.annotations[-1].label


async def test_the_same_annotation_again_is_one_and_its_id_is_no_other_s(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    async with bench.owning():
        await bench.annotate("f1", annotation_id="a1", note="x")
        await bench.annotate("f1", annotation_id="a1", note="x")
        await bench.all_kept()
        again = await bench.annotate("f1", annotation_id="a1", note="x")
        with pytest.raises(Conflict, match="another annotation"):
            await bench.annotate("f1", annotation_id="a1", note="y")
    assert again.applied
    assert len((await bench.get("f1")).annotations) == 1


async def test_an_id_that_still_waits_is_no_other_s_either(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vigil_storage.reviews.APPLIED_S", 0.0)
    monkeypatch.setattr("vigil_storage.reviews.POLL_S", 0.01)
    await bench.frames.write([frame(1), frame(2)])
    first = await bench.annotate("f1", annotation_id="a1", note="x")
    for frame_id, note in (("f1", "y"), ("f2", "x")):
        with pytest.raises(Conflict, match="another annotation") as refused:
            await bench.annotate(frame_id, annotation_id="a1", note=note)
        assert refused.value.reason == "ANNOTATION_ID_REUSED"
    assert await bench.annotate("f1", annotation_id="a1", note="x") == first
    async with bench.owning():
        await bench.all_kept()
    assert [a.note for a in (await bench.get("f1")).annotations] == ["x"]
    assert not (await bench.get("f2")).annotations


async def test_an_id_may_be_another_s_with_mask_behind_it(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    async with bench.owning():
        await bench.annotate("f1", mask=drawn(), annotation_id="p1")
        await bench.annotate("f1", annotation_id="p1.mask")
        await bench.annotate("f1", mask=drawn(), annotation_id="p1.mask.mask")
        await bench.all_kept()
    found = await bench.get("f1")
    assert [(a.annotation_id, a.masked) for a in found.annotations] == [
        ("p1", True),
        ("p1.mask", False),
        ("p1.mask.mask", True),
    ]
    assert found.frame.annotation.annotation_id == "p1.mask.mask"
    assert found.mask


async def test_a_mask_is_found_by_what_it_is_whatever_its_record_is_called(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    mask = drawn()
    digest = hashlib.sha256(mask).hexdigest()
    said = Annotation("p1", "f1", "cells/cam1", T0 + 100_000, "anomalous", "Ann", "", T0, digest)
    drawn_record, said_record = records_of(said, "1-0", mask)
    called = {**drawn_record.labels, "frame_id": "p1.mask"}
    await bench.annotations.write([replace(drawn_record, labels=called), said_record])
    await bench.frames.label([Labelling("cells/cam1", T0 + 100_000, labels_of(said, "1-0"))])
    assert (await bench.get("f1")).mask == mask


class Away:
    """A store that can be away."""

    def __init__(self, store: FrameStore) -> None:
        self.store = store
        self.away = False

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        return [self._trouble()] * len(records) if self.away else await self.store.write(records)

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        return [self._trouble()] * len(changes) if self.away else await self.store.label(changes)

    def _trouble(self) -> Unavailable:
        return Unavailable("STORE_UNAVAILABLE", "away")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.mark.parametrize("part", ["annotations", "frames"])
async def test_a_frame_is_waited_for_after_a_long_outage_as_after_a_short_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("vigil_storage.annotations.UNAVAILABLE_S", 0.01)
    away = Away(getattr(bench, part))
    setattr(bench, part, away)
    skipped_s = 0.0
    said = Annotation("a1", "f1", "cells/cam1", T0 + 100_000, "normal", "Ann", "", T0)
    await bench.log.put(M, "a1", said.encode(), b"")
    async with bench.owning(clock=lambda: time.monotonic() + skipped_s):
        if part == "frames":
            await asyncio.sleep(0.1)  # its frame is missed already
        away.away = True
        await asyncio.sleep(0.4)
        skipped_s = 2 * GIVE_UP_S
        await asyncio.sleep(0.4)
        away.away = False
        await asyncio.sleep(0.4)
        assert await bench.log.read(M, "0", count=1, block_ms=0)
        await bench.frames.write([frame(1)])
        await bench.all_kept()
    assert (await bench.get("f1")).frame.annotation.label == NORMAL


async def test_a_frame_that_does_not_come_back_is_given_up(bench: Bench) -> None:
    skipped_s = 0.0
    said = Annotation("a1", "f1", "cells/cam1", T0 + 100_000, "normal", "Ann", "", T0)
    await bench.log.put(M, "a1", said.encode(), b"")
    async with bench.owning(clock=lambda: time.monotonic() + skipped_s):
        await asyncio.sleep(0.6)
        assert await bench.log.read(M, "0", count=1, block_ms=0)
        async with asyncio.timeout(10):
            while await bench.log.read(M, "0", count=1, block_ms=0):
                skipped_s += GIVE_UP_S
                await asyncio.sleep(0.05)


async def test_an_annotation_that_the_store_refuses_is_dropped_and_holds_up_no_other(bench: Bench) -> None:
    def refused() -> float:
        return REGISTRY.get_sample_value("vigil_storage_refused_annotations_total", {"model": M}) or 0.0

    await bench.frames.write([frame(1), frame(2)])
    before = refused()
    async with bench.owning():
        await bench.annotate("f1", annotation_id="a1", note="stands")
        await bench.all_kept()
        another = Annotation("a1", "f1", "cells/cam1", T0 + 100_000, "normal", "Bob", "", T0)
        with bench.heard.expect("a1") as heard:
            await bench.log.put(M, "a1", another.encode(), b"")
            await bench.annotate("f2", annotation_id="a2")
            await bench.all_kept()
            assert not heard.is_set()
    assert refused() == before + 1
    found = await bench.get("f1")
    assert [a.note for a in found.annotations] == ["stands"]
    assert found.frame.annotation.author == "Ann"
    assert (await bench.get("f2")).frame.annotation.annotation_id == "a2"


async def test_labels_that_were_lost_are_made_again_from_the_records(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    keeper = AnnotationKeeper(M, bench.log, bench.annotations, bench.frames, confirm_after_s=0.05, heard=bench.heard)
    task = asyncio.create_task(keeper.run())
    await bench.annotate("f1", mask=drawn())
    await bench.frames._db.execute("DELETE FROM frames")  # type: ignore[attr-defined]
    await bench.frames.write([frame(1)])
    await bench.all_kept()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await bench.get("f1")).frame.annotation.label == ANOMALOUS


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mask": drawn(size=(6, 8))}, "MASK_SIZE_MISMATCH"),
        ({"mask": drawn(mode="RGB")}, "MASK_MODE_INVALID"),
        ({"mask": drawn(mode="RGBA")}, "MASK_MODE_INVALID"),
        ({"mask": drawn(kind="BMP")}, "MASK_FORMAT_INVALID"),
        ({"mask": drawn(empty=True)}, "MASK_EMPTY"),
        ({"mask": b"GIF89a"}, "MASK_UNREADABLE"),
        ({"mask": drawn()[:60]}, "MASK_UNREADABLE"),
        ({"mask": b"x" * (masks.MAX_BYTES + 1)}, "MASK_TOO_LARGE"),
        ({"mask": drawn(), "label": NORMAL}, "MASK_ON_NORMAL"),
        ({"label": 0}, "LABEL_MISSING"),
        ({"label": 9}, "LABEL_MISSING"),
        ({"author": ""}, "PERSON_INVALID"),
        ({"author": "two\nlines"}, "PERSON_INVALID"),
        ({"author": "漢" * 40}, "PERSON_INVALID"),
        ({"note": "x" * 2001}, "NOTE_TOO_LONG"),
        ({"annotation_id": "../x"}, "ANNOTATION_ID_INVALID"),
        ({"frame_id": ""}, "FRAME_ID_MISSING"),
    ],
)
async def test_what_can_t_be_kept_is_refused_with_a_reason(bench: Bench, fields: dict[str, Any], reason: str) -> None:
    await bench.frames.write([frame(1)])
    with pytest.raises(InvalidInput) as refused:
        await bench.annotate(**{"frame_id": "f1", **fields})
    assert refused.value.reason == reason
    assert not (await bench.get("f1")).annotations


async def test_whoever_has_a_token_speaks_under_its_name(bench: Bench) -> None:
    await bench.frames.write([frame(1)])
    before = principal()
    enter(Principal("line-lead", frozenset({Role.REVIEW}), None))
    try:
        async with bench.owning():
            await bench.annotate("f1", author="somebody else")
    finally:
        enter(before)
    assert (await bench.get("f1")).frame.annotation.author == "line-lead"


async def test_a_frame_that_is_not_stored_takes_no_annotation(bench: Bench) -> None:
    with pytest.raises(NotFound, match="retention has dropped it") as refused:
        await bench.annotate("f1")
    assert refused.value.reason == "UNKNOWN_FRAME"


async def test_more_than_the_log_holds_is_refused_with_a_delay(bench: Bench) -> None:
    for number in range(bench.log.LIMIT):
        await bench.log.put(M, f"x{number}", b"{}", b"")
    await bench.frames.write([frame(1)])
    with pytest.raises(QueueFull) as refused:
        await bench.annotate("f1")
    assert refused.value.retry_after_s


async def test_queries_ask_what_people_say_and_where_the_versions_disagree(bench: Bench) -> None:
    await bench.frames.write([frame(n) for n in range(4)])
    agree = [Labelling("cells/cam1", T0 + n * 100_000, {"agree": "true" if n else "false"}) for n in range(3)]
    await bench.frames.label(agree)
    async with bench.owning():
        await bench.annotate("f1", NORMAL)
        await bench.annotate("f2", UNSURE)
    assert await bench.query(human_label=NORMAL) == ["f1"]
    assert await bench.query(human_label=UNSURE) == ["f2"]
    assert await bench.query(reviewed=True) == ["f1", "f2"]
    assert await bench.query(reviewed=False) == ["f0", "f3"]
    assert await bench.query(disagreement=True) == ["f0"]
    assert await bench.query(disagreement=False) == ["f1", "f2"]


async def test_queries_ask_for_labels_that_clients_gave(bench: Bench) -> None:
    given: list[dict[str, str]] = [{"lot": "7"}, {"lot": "07"}, {"lot": "7", "source": "a/b%20c.png"}]
    frames = [frame(number) for number in range(3)]
    await bench.frames.write(
        [replace(one, labels={**one.labels, **more}) for one, more in zip(frames, given, strict=True)]
    )
    assert await bench.query(labels={"lot": "7"}) == ["f0", "f2"]
    assert await bench.query(labels={"lot": "07"}) == ["f1"]
    assert await bench.query(labels={"lot": "7", "source": "a/b%20c.png"}) == ["f2"]
    assert await bench.query(labels={"line": "7"}) == []


async def test_scores_that_are_no_range_are_refused(bench: Bench) -> None:
    for scores in ({"min_score": math.nan}, {"max_score": math.inf}, {"min_score": 0.9, "max_score": 0.1}):
        with pytest.raises(InvalidInput) as refused:
            await bench.query(**scores)
        assert refused.value.reason == "RANGE_INVALID"


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"human": "normal"}, "label human is Vigil's own; a client's label of that name is stored as client_human"),
        ({"a&b": "1"}, "label names are 1 to 64 of a-z, 0-9 and _"),
        ({f"n{number}": "1" for number in range(33)}, "at most 32 labels, this asks for 33"),
    ],
)
async def test_labels_that_no_client_can_give_are_refused(bench: Bench, labels: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        await bench.query(labels=labels)
    assert refused.value.reason == "LABEL_INVALID"


async def test_the_queue_gives_disagreements_then_what_is_near_the_threshold_then_chance(bench: Bench) -> None:
    await bench.frames.write([frame(n, score=n / 100) for n in range(100)])
    away = [Labelling("cells/cam1", T0 + n * 100_000, {"agree": "false"}) for n in (3, 90)]
    await bench.frames.label(away)
    async with bench.owning():
        await bench.annotate("f50")
        seen = await bench.queue(size=12, peek=True)
        first = await bench.queue(size=12)
        assert first[:2] == seen[:2]
        assert first[:2] == [("f3", "DISAGREEMENT"), ("f90", "DISAGREEMENT")]
        assert [reason for _, reason in first[2:]] == ["UNCERTAIN"] * 8 + ["RANDOM"] * 2
        assert {name for name, reason in first if reason == "UNCERTAIN"} == {
            *("f46", "f47", "f48", "f49", "f51", "f52", "f53", "f54")
        }
        second = await bench.queue(size=20)
        assert not {name for name, _ in first} & {name for name, _ in second}
        assert first[:2] == (await bench.queue("Bob", size=5))[:2]
        everything = {name for name, _ in [*first, *second, *await bench.queue(size=200)]}
        assert everything == {f"f{n}" for n in range(100)} - {"f50"}
        assert await bench.queue(size=200) == []


async def test_a_frame_counts_as_given_once_somebody_has_looked_at_it(bench: Bench) -> None:
    await bench.frames.write([frame(n, score=n / 10) for n in range(4)])
    peeked = await bench.queue(size=4, peek=True)
    await bench.api.Get(storage_pb2.GetRequest(model=M, frame_id="f3", reviewer="Ann"), None)
    assert {name for name, _ in peeked} == {"f0", "f1", "f2", "f3"}
    assert {name for name, _ in await bench.queue(size=4)} == {"f0", "f1", "f2"}


async def test_the_queue_again_goes_round_what_nobody_has_labelled(bench: Bench) -> None:
    await bench.frames.write([frame(n, score=n / 10) for n in range(6)])
    async with bench.owning():
        await bench.annotate("f5")
    await bench.queue(size=2)  # f4 and f3, nearest to the threshold
    await bench.queue(size=3)
    await bench.frames.write([frame(9)])
    rounds = [await bench.queue(size=2, again=True) for _ in range(4)]
    assert [reason for one in rounds for _, reason in one[1:]] == ["UNSPECIFIED"] * 4
    names = [name for one in rounds for name, _ in one]
    assert names == ["f9", "f4", "f3", "f2", "f1", "f0", "f9", "f4"]


class Slow:
    """A store of very many old records: what is asked of before a time takes for ever."""

    def __init__(self, store: FrameStore, before_us: int) -> None:
        self.store = store
        self.before_us = before_us
        self.asked: list[FrameFilter] = []

    async def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        self.asked.append(where)
        async for record in self.store.query(where, limit=limit):
            yield record
        if (where.start_us or 0) < self.before_us:
            await asyncio.Event().wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


async def test_the_queue_looks_back_from_now_to_the_first_frame_there_is(bench: Bench) -> None:
    old = [replace(frame(number), timestamp_us=number * 10**9) for number in (1, 2)]
    await bench.frames.write([*old, frame(3), frame(4)])
    split = [Labelling("cells/cam1", at, {"agree": "false"}) for at in (old[1].timestamp_us, T0 + 400_000)]
    assert await bench.frames.label(split) == [None, None]
    assert await bench.queue(size=1, peek=True) == [("f4", "DISAGREEMENT")]
    given = await bench.queue(size=10)
    assert given[:2] == [("f4", "DISAGREEMENT"), ("f2", "DISAGREEMENT")]
    assert {name for name, _ in given[2:]} == {"f1", "f3"}


async def test_a_queue_of_a_store_too_large_to_look_through_holds_what_was_found_in_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vigil_storage.reviews.LOOK_S", 0.3)
    await bench.frames.write([replace(frame(1), timestamp_us=10**9), frame(2), frame(3)])
    assert await bench.frames.label([Labelling("cells/cam1", T0 + 300_000, {"agree": "false"})]) == [None]
    slow = Slow(bench.frames, before_us=T0 - 86_400_000_000)
    async with asyncio.timeout(5):
        given = await Bench(slow, bench.annotations, MemoryStreams()).queue(size=10)
    assert given[0] == ("f3", "DISAGREEMENT")
    assert ("f2", "UNCERTAIN") in given
    assert max(where.start_us or 0 for where in slow.asked) > T0 - 86_400_000_000


def test_a_queue_of_nothing_is_empty() -> None:
    assert pick([], 10, random.Random(0)) == []


async def test_an_export_gives_what_people_said_with_images_and_masks(bench: Bench) -> None:
    await bench.frames.write([frame(n, camera=f"cam{n % 2}") for n in range(8)])
    async with bench.owning():
        await bench.annotate("f1", mask=drawn())
        await bench.annotate("f2", NORMAL)
        await bench.annotate("f3", UNSURE)
    request = storage_pb2.ExportRequest(model=M)
    found = [one async for one in bench.api.Export(request, None)]
    assert [one.frame.header.frame_id for one in found] == ["f1", "f2", "f3"]
    assert [one.image for one in found] == [b"image 1", b"image 2", b"image 3"]
    assert [bool(one.mask) for one in found] == [True, False, False]
    request = storage_pb2.ExportRequest(model=M, camera="cam1", decided=True)
    assert [one.frame.header.frame_id async for one in bench.api.Export(request, None)] == ["f1"]


async def test_an_export_goes_by_what_people_say_when_a_frame_s_turn_comes(bench: Bench) -> None:
    await bench.frames.write([frame(n) for n in range(4)])
    async with bench.owning():
        for number, label in enumerate((NORMAL, NORMAL, UNSURE, ANOMALOUS)):
            await bench.annotate(f"f{number}", label)
        exported = bench.api.Export(storage_pb2.ExportRequest(model=M, decided=True), None)
        found = [await anext(exported)]
        await bench.annotate("f1", UNSURE)
        await bench.annotate("f2", NORMAL)
        found += [one async for one in exported]
    said = [(one.frame.header.frame_id, one.frame.annotation.label) for one in found]
    assert said == [("f0", NORMAL), ("f2", NORMAL), ("f3", ANOMALOUS)]


async def test_an_export_holds_images_larger_than_any_message(bench: Bench) -> None:
    images = [os.urandom(size) for size in (70 << 20, 1000, IMAGE_PART_BYTES, IMAGE_PART_BYTES + 1)]
    for number, image in enumerate(images):
        plain = frame(number)
        labels = {**plain.labels, "sha256": hashlib.sha256(image).hexdigest()}
        await bench.frames.write([replace(plain, labels=labels, body=image)])
    async with bench.owning():
        for number in range(len(images)):
            await bench.annotate(f"f{number}", mask=drawn())
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    storage_pb2_grpc.add_FrameServiceServicer_to_server(bench.api, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with StorageClient(f"127.0.0.1:{port}") as client:
            found = [one async for one in client.frames_export(M)]
    finally:
        await server.stop(None)
    assert [one.image == image for one, image in zip(found, images, strict=True)] == [True] * len(images)
    assert all(one.mask and one.annotations for one in found)


def test_later_places_are_greater() -> None:
    assert order_of("10-2") < order_of("10-10") < order_of("11-0")
    assert order_of("0") == (0, 0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReductServer]:
    with reduct_server(tmp_path) as running:
        yield running


@pytest.mark.skipif(find_binary() is None, reason="no reductstore binary")
async def test_what_a_person_said_outlives_a_killed_reductstore(server: ReductServer) -> None:
    frames = await ReductFrameStore.open(server.url)
    annotations = await ReductFrameStore.open(server.url, bucket="vigil-annotations")
    bench = Bench(frames, annotations, MemoryStreams())
    batch = [frame(n) for n in range(40)]
    await frames.write(batch)

    async def killing() -> None:
        for _ in range(3):
            await asyncio.sleep(0.15)
            server.kill()
            server.start()

    async def say(number: int) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    await bench.annotate(f"f{number}", mask=drawn(), annotation_id=f"a{number}", author="Ann")
                except Exception as error:
                    if getattr(error, "status", "") not in ("UNAVAILABLE", "NOT_FOUND"):
                        raise
                    # The writer of frames puts back what the server lost.
                    await frames.write([batch[number]])
                    await asyncio.sleep(0.05)
                else:
                    return

    async with bench.owning():
        killer = asyncio.create_task(killing())
        for start in range(0, 40, 4):
            await asyncio.gather(*(say(number) for number in range(start, start + 4)))
        await killer
        await frames.write(batch)
        await bench.all_kept(30)
    for number in range(40):
        found = await bench.get(f"f{number}")
        assert found.frame.annotation.label == ANOMALOUS, number
        assert [a.annotation_id for a in found.annotations] == [f"a{number}"]
        assert found.mask
    await frames.close()
    await annotations.close()


@pytest.mark.skipif(find_binary() is None, reason="no reductstore binary")
async def test_an_owner_that_comes_back_knows_what_was_said_in_between(server: ReductServer) -> None:
    frames = await ReductFrameStore.open(server.url)
    annotations = await ReductFrameStore.open(server.url, bucket="vigil-annotations")
    other = await ReductFrameStore.open(server.url, bucket="vigil-annotations")
    bench = Bench(frames, annotations, MemoryStreams())
    await frames.write([frame(1), frame(2)])
    async with bench.owning():
        await bench.annotate("f1")
    times = range(T0 + 110_001, T0 + 290_001, 4_000)
    said = [Annotation(f"b{at}", "f9", "cells/cam1", at, "normal", "Bob", "", at) for at in times]
    await other.write([record for one in said for record in records_of(one, "1-0", b"")])
    async with bench.owning():
        await bench.annotate("f2")
        await bench.all_kept()
    (late,) = [one async for one in annotations.query(FrameFilter(["cells/*"], equals={"annotates": "f2"}), limit=9)]
    assert late.entry == "cells/cam1/2"
    assert not annotations.tracks.knows("cells/cam1")
    for store in (frames, annotations, other):
        await store.close()
