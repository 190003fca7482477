"""Normal frames pass under a quota; what is anomalous, disagreed about or reviewed stays, on both stores."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from vigil_common.errors import NotFound
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.ports import FrameFilter, Labelling, PassingStore, Record, Written
from vigil_common.store.reduct import ReductFrameStore
from vigil_common.store.retained import RetainedFrameStore
from vigil_common.streams.memory import MemoryStreams
from vigil_storage.annotations import AnnotationKeeper
from vigil_storage.domain import stays
from vigil_storage.reviews import Remark, Reviews

from tests.support.reduct import ReductServer, find_binary, reduct_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from vigil_common.store.ports import FrameStore

T0 = 1_750_000_000_000_000
QUOTA = 400_000
IMAGE_BYTES = 10_000
ALL = FrameFilter(["cells/*"])


@dataclass
class Both:
    kept: FrameStore
    passing: PassingStore
    store: RetainedFrameStore


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReductServer]:
    with reduct_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("reduct", marks=pytest.mark.skipif(find_binary() is None, reason="no reductstore")),
    ]
)
async def both(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Both]:
    kept: Any
    passing: Any
    if request.param == "embedded":
        kept = await EmbeddedFrameStore.open(tmp_path / "kept", stride_us=2)
        passing = await EmbeddedFrameStore.open(tmp_path / "passing", stride_us=2, quota_bytes=QUOTA)
    else:
        url, suffix = request.getfixturevalue("server").url, uuid.uuid4().hex[:8]
        kept = await ReductFrameStore.open(url, bucket=f"kept-{suffix}", stride_us=2)
        passing = await ReductFrameStore.open(url, bucket=f"passing-{suffix}", stride_us=2, quota_bytes=QUOTA)
    store = RetainedFrameStore(kept, passing, quota_bytes=QUOTA, stays=stays)
    yield Both(kept, passing, store)
    await store.close()


def frame(number: int, label: str = "normal", *, at: int | None = None, size: int = IMAGE_BYTES) -> Record:
    image = number.to_bytes(4, "big") * (size // 4)
    labels = {
        "frame_id": f"f{number}",
        "sha256": hashlib.sha256(image).hexdigest(),
        "outcome": "judged",
        "label": label,
        "score": "0.75" if label == "anomalous" else "0.25",
    }
    return Record("cells/cam1", T0 + number * 1_000 if at is None else at, labels, image, "image/png")


async def write(store: FrameStore, *records: Record) -> list[int]:
    results = await store.write(list(records))
    assert all(isinstance(result, Written) for result in results), results
    return [result.timestamp_us for result in results if isinstance(result, Written)]


async def found(store: FrameStore, where: FrameFilter = ALL, limit: int = 10_000) -> list[str]:
    return [record.labels["frame_id"] async for record in store.query(where, limit=limit)]


async def test_a_flood_of_normal_frames_pushes_out_only_normal_ones_and_is_counted(both: Both) -> None:
    await write(both.store, frame(0, "anomalous"), frame(1), frame(2))
    (disagreeing, reviewed) = [record.timestamp_us async for record in both.store.query(ALL, limit=9)][1:]
    changes = [
        Labelling("cells/cam1", disagreeing, {"agree": "false"}),
        Labelling("cells/cam1", reviewed, {"human": "normal"}),
    ]
    assert await both.store.label(changes) == [None, None]
    for start in range(3, 203, 20):
        await write(both.store, *(frame(number) for number in range(start, start + 20)))
    async with asyncio.timeout(20):
        while sum((await both.passing.counts()).values()) * IMAGE_BYTES > QUOTA:
            await asyncio.sleep(0.1)
    names = await found(both.store)
    assert names[:3] == ["f0", "f1", "f2"]
    assert names[-1] == "f202"
    passing = sum((await both.passing.counts()).values())
    assert 10 <= passing <= QUOTA // IMAGE_BYTES
    assert sum((await both.store.dropped()).values()) == 202 - passing
    for name in ("f1", "f2"):
        record = await both.store.find("cells", name)
        assert (await both.store.read(record.entry, record.timestamp_us))[1] == frame(int(name[1:])).body


async def test_a_frame_that_comes_to_matter_is_found_once_with_all_its_labels(both: Both) -> None:
    (at,) = await write(both.store, frame(1))
    assert await both.store.label([Labelling("cells/cam1", at, {"agree": "true"})]) == [None]
    assert await found(both.kept) == []
    assert await both.store.label([Labelling("cells/cam1", at, {"human": "anomalous"})]) == [None]
    assert await both.store.label([Labelling("cells/cam1", at, {"human": "unsure"})]) == [None]
    (record,) = [record async for record in both.store.query(ALL, limit=9)]
    assert (record.timestamp_us, record.labels["agree"], record.labels["human"]) == (at, "true", "unsure")
    assert await found(both.passing) == await found(both.kept) == ["f1"]
    assert await found(both.store, FrameFilter(["cells/*"], absent=["human"])) == []
    assert await found(both.store, FrameFilter(["cells/*"], present=["human"])) == ["f1"]


async def lose(store: Any, at: int) -> None:
    """As a killed server does with what it had not flushed."""
    if isinstance(store, ReductFrameStore):
        await store._bucket.remove_record("cells/cam1", at)
    else:
        await store._db.execute("DELETE FROM frames WHERE timestamp_us = ?", (at,))


async def test_a_frame_that_comes_to_matter_late_is_found_once_too(both: Both) -> None:
    """Its copy is older than what stays already, which some stores keep in another track than the frame."""
    ids = await write(both.store, frame(1), frame(2), frame(3, "anomalous"), frame(4))
    # One that came late itself, so that it is the frame that stands elsewhere.
    ids += await write(both.store, frame(9, at=T0 + 501))
    for at in (ids[1], ids[4]):
        stored = [one async for one in both.store.query(ALL, limit=9) if one.timestamp_us == at]
        assert await both.store.label([Labelling(stored[0].entry, at, {"human": "normal"})]) == [None]
        assert await both.store.label([Labelling(stored[0].entry, at, {"agree": "false"})]) == [None]
    assert await found(both.store) == ["f9", "f1", "f2", "f3", "f4"]
    assert await found(both.store, FrameFilter(["cells/*"], absent=["human"])) == ["f1", "f3", "f4"]
    assert await found(both.store, FrameFilter(["cells/*"], present=["human"])) == ["f9", "f2"]
    for frame_id in ("f2", "f9"):
        assert (await both.store.find("cells", frame_id)).labels["agree"] == "false"


async def test_where_the_copy_is_lost_the_frame_shows_without_the_label_so_that_it_is_given_again(both: Both) -> None:
    (at,) = await write(both.store, frame(1))
    change = Labelling("cells/cam1", at, {"human": "normal"})
    assert await both.store.label([change]) == [None]
    await lose(both.kept, at)
    assert await found(both.store, FrameFilter(["cells/*"], absent=["human"])) == ["f1"]
    assert await both.store.label([change]) == [None]
    assert await found(both.store, FrameFilter(["cells/*"], present=["human"])) == ["f1"]
    assert await found(both.kept) == ["f1"]


async def test_frames_of_one_time_on_both_sides_keep_apart(both: Both) -> None:
    places = await write(both.store, frame(1, at=T0), frame(2, "anomalous", at=T0), frame(3, at=T0), frame(4, at=T0))
    assert len(set(places)) == 4
    assert [at % 2 for at in places] == [1, 0, 1, 1]
    assert await both.store.label([Labelling("cells/cam1", places[2], {"human": "normal"})]) == [None]
    expected = {at: frame(number).labels["sha256"] for number, at in enumerate(places, 1)}
    assert await both.store.confirm("cells/cam1", expected) == set(places)
    assert sorted(await found(both.store)) == ["f1", "f2", "f3", "f4"]
    for number, at in enumerate(places, 1):
        assert (await both.store.read("cells/cam1", at))[0].labels["frame_id"] == f"f{number}"
    again = await both.store.write([frame(3, at=T0), frame(2, "anomalous", at=T0)])
    assert again == [Written(places[2], existed=True), Written(places[1], existed=True)]


async def test_what_was_stored_before_there_was_a_quota_is_labelled_where_it_is(both: Both) -> None:
    places = await write(both.kept, *(frame(number, at=T0 + number) for number in range(4)))
    assert [at % 2 for at in places] == [0, 1, 0, 1]
    said = [Labelling("cells/cam1", at, {"human": "anomalous"}) for at in places[:2]]
    compared = [Labelling("cells/cam1", at, {"agree": "true"}) for at in places]
    assert await both.store.label(compared) == [None] * 4
    assert await both.store.label([*said, Labelling("cells/cam1", places[1], {"human": "unsure"})]) == [None] * 3
    assert await found(both.store, FrameFilter(["cells/*"], equals={"agree": "true"})) == ["f0", "f1", "f2", "f3"]
    assert await found(both.store, FrameFilter(["cells/*"], equals={"human": "unsure"})) == ["f1"]
    assert await found(both.passing) == []


async def test_pages_go_on_where_they_ended_over_both(both: Both) -> None:
    await write(both.store, *(frame(number, "anomalous" if number % 3 == 0 else "normal") for number in range(12)))
    assert await found(both.store, limit=5) == [f"f{number}" for number in range(5)]
    assert await found(both.store, FrameFilter(["cells/*"], start_us=T0 + 5_000)) == [f"f{n}" for n in range(5, 12)]
    assert await found(both.store, FrameFilter(["cells/*"], min_score=0.5)) == ["f0", "f3", "f6", "f9"]


async def test_a_frame_older_than_all_there_is_room_for_is_settled_though_it_goes_at_once(both: Both) -> None:
    missing = {T0 - 10**9 + 1: "0" * 64}
    await write(both.store, frame(0))
    assert await both.store.confirm("cells/cam1", missing) == set()  # there is room: it was lost, and is to be written
    for start in range(1, 101, 20):
        await write(both.store, *(frame(number) for number in range(start, start + 20)))
    for number in range(200, 220):
        (at,) = await write(both.store, frame(number, at=T0 - 10**9 + number * 1_000))
        expected = {at: frame(number).labels["sha256"]}
        assert await both.store.confirm("cells/cam1", expected) == {at}
    assert "f200" not in await found(both.store)
    newest = max([record.timestamp_us async for record in both.store.query(ALL, limit=1_000)])
    assert await both.store.confirm("cells/cam1", {newest + 2: "0" * 64}) == set()


async def test_an_image_large_beside_the_quota_stays_rather_than_empty_it(both: Both) -> None:
    await write(both.store, frame(1), frame(2, size=QUOTA // 4))
    assert (await found(both.kept), await found(both.passing)) == (["f2"], ["f1"])


async def test_a_label_for_a_frame_that_is_gone_says_so(both: Both) -> None:
    for at in (T0, T0 + 1):
        (error,) = await both.store.label([Labelling("cells/cam1", at, {"human": "normal"})])
        assert isinstance(error, NotFound)
    with pytest.raises(NotFound):
        await both.store.read("cells/cam1", T0 + 1)


async def test_what_a_person_says_of_a_passing_frame_keeps_it(both: Both, tmp_path: Path) -> None:
    for number in range(3):
        await write(both.store, frame(number))
    annotations = await EmbeddedFrameStore.open(tmp_path / "annotations")
    log = MemoryStreams().reviews
    reviews = Reviews(both.store, annotations, log, now_us=lambda: T0 + 1_000_000)
    keeper = AnnotationKeeper("cells", log, annotations, both.store, confirm_after_s=0.0)
    keeping = asyncio.create_task(keeper.run())
    try:
        queue = await reviews.queue(ALL, "Ann", size=3, since_us=None, again=False)
        assert {record.labels["frame_id"] for record, _ in queue} == {"f0", "f1", "f2"}
        remark = Remark("cells", "f1", "", "normal", mask=b"", note="dust", author="Ann", annotation_id="")
        _, applied = await reviews.annotate(remark)
        assert applied
        async with asyncio.timeout(10):
            while await log.read("cells", "0", count=1, block_ms=0):
                await asyncio.sleep(0.02)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await annotations.close()
    assert await found(both.kept) == ["f1"]
    assert await found(both.store, FrameFilter(["cells/*"], present=["human"])) == ["f1"]
    assert await found(both.store) == ["f0", "f1", "f2"]
