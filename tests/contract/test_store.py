"""What both stores promise, and ReductStore's traps, one test for each."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from reduct import BucketSettings, Client, QuotaType
from vigil_common.errors import Conflict, DataLost, InvalidInput, NotFound, Unavailable
from vigil_common.store import labels as gate
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_common.store.open import open_stores
from vigil_common.store.ports import (
    CROWD,
    FrameFilter,
    FrameStore,
    Labelling,
    ModelInfo,
    ModelStore,
    Record,
    Written,
)
from vigil_common.store.reduct import BLOCK_RECORDS, ReductFrameStore
from vigil_common.store.reduct_models import ReductModelStore
from vigil_common.store.reduct_query import condition

from tests.support.reduct import ReductServer, find_binary, reduct_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from pathlib import Path

T0 = 1_750_000_000_000_000
needs_reduct = pytest.mark.skipif(find_binary() is None, reason="no reductstore binary")


@dataclass
class Stores:
    frames: FrameStore
    models: ModelStore


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReductServer]:
    with reduct_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ReductServer]:
    with reduct_server(tmp_path) as running:
        yield running


@pytest.fixture(params=["embedded", pytest.param("reduct", marks=needs_reduct)])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    if request.param == "embedded":
        opened = Stores(await EmbeddedFrameStore.open(tmp_path), await EmbeddedModelStore.open(tmp_path))
    else:
        url = request.getfixturevalue("server").url
        suffix = uuid.uuid4().hex[:8]
        opened = Stores(
            await ReductFrameStore.open(url, bucket=f"frames-{suffix}"),
            await ReductModelStore.open(url, bucket=f"models-{suffix}", settle_s=0),
        )
    yield opened
    await opened.frames.close()
    await opened.models.close()


@pytest.fixture
async def reduct(server: ReductServer) -> AsyncIterator[ReductFrameStore]:
    store = await ReductFrameStore.open(server.url, bucket=f"frames-{uuid.uuid4().hex[:8]}")
    yield store
    await store.close()


def record(
    frame_id: str,
    at: int = T0,
    body: bytes | None = None,
    entry: str = "cells/cam1",
    labels: dict[str, str] | None = None,
    **more: str,
) -> Record:
    image = frame_id.encode() if body is None else body
    digest = hashlib.sha256(image).hexdigest()
    return Record(entry, at, {"frame_id": frame_id, "sha256": digest, **(labels or {}), **more}, image, "image/png")


async def found(store: FrameStore, limit: int = 1000, **where: Any) -> list[str]:
    wanted = FrameFilter(**{"entries": ["cells/*"], **where})
    return [stored.labels["frame_id"] async for stored in store.query(wanted, limit=limit)]


async def test_what_is_written_comes_back_exactly(stores: Stores) -> None:
    labels = {
        "comma": "a,b",
        "quote": 'say "x"',
        "percent": "100%",
        "blank": " edge ",
        "empty": "",
        "word": "Größe 漢字",
        "line": "a\nb",
        "dollar": "$and",
        "number": "007",
    }
    one = record("f1", body=b"\x00\xff" * 40_000, labels=labels)
    assert await stores.frames.write([one]) == [Written(T0)]
    stored, body = await stores.frames.read("cells/cam1", T0)
    assert (stored.labels, body) == (one.labels, one.body)
    assert (stored.entry, stored.timestamp_us, stored.content_type) == ("cells/cam1", T0, "image/png")
    queried = [hit async for hit in stores.frames.query(FrameFilter(["cells/cam1"]), limit=5)]
    assert queried == [stored]
    for name, value in labels.items():
        assert await found(stores.frames, equals={name: value}) == ["f1"], name


async def test_another_image_at_the_same_microsecond_keeps_both(stores: Stores) -> None:
    assert await stores.frames.write([record("f1")]) == [Written(T0)]
    assert await stores.frames.write([record("f2"), record("f3")]) == [Written(T0 + 1), Written(T0 + 2)]
    assert await found(stores.frames) == ["f1", "f2", "f3"]


async def test_behind_a_clock_that_stands_still_frames_stand_where_they_were_received(stores: Stores) -> None:
    records = [replace(record(f"f{number}"), otherwise_us=T0 + 10**9 + number * 1_000) for number in range(CROWD + 40)]
    for start in range(0, len(records), 37):
        stores.frames.forget("cells")  # as another owner
        results = await stores.frames.write(records[start : start + 37])
        assert [result.timestamp_us for result in results if isinstance(result, Written)] == [
            T0 + number if number < CROWD else one.otherwise_us
            for number, one in enumerate(records[start : start + 37], start)
        ]
    again = await stores.frames.write([records[7], records[CROWD + 7], record("late")])
    assert again == [
        Written(T0 + 7, existed=True),
        Written(records[CROWD + 7].otherwise_us or 0, existed=True),
        Written(T0 + CROWD),
    ]
    assert len(await found(stores.frames)) == CROWD + 41


async def test_the_same_microsecond_twice_in_one_batch_keeps_both(stores: Stores) -> None:
    batch = [record("f1"), record("f2"), record("f2"), record("f1", body=b"other")]
    first, second, third, fourth = await stores.frames.write(batch)
    assert (first, second) == (Written(T0), Written(T0 + 1))
    assert third == Written(T0 + 1, existed=True)
    assert isinstance(fourth, Conflict)
    assert fourth.reason == "FRAME_ID_REUSED"
    assert await found(stores.frames) == ["f1", "f2"]


async def test_a_batch_repeated_writes_nothing_twice(stores: Stores) -> None:
    batch = [record("f1"), record("f2"), record("f3", T0 + 1)]
    first = await stores.frames.write(batch)
    again = await stores.frames.write(batch)
    times = [result.timestamp_us for result in first if isinstance(result, Written)]
    assert again == [Written(at, existed=True) for at in times]
    assert sorted(await found(stores.frames)) == ["f1", "f2", "f3"]


async def test_a_frame_repeated_beside_a_new_one_at_its_time_is_not_written_twice(stores: Stores) -> None:
    await stores.frames.write([record("f1")])
    assert await stores.frames.write([record("f2"), record("f1")]) == [Written(T0 + 1), Written(T0, existed=True)]
    assert await found(stores.frames) == ["f1", "f2"]


async def test_a_frame_id_with_another_image_is_a_conflict(stores: Stores) -> None:
    await stores.frames.write([record("f1")])
    (result,) = await stores.frames.write([record("f1", body=b"another")])
    assert isinstance(result, Conflict)
    assert result.reason == "FRAME_ID_REUSED"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("f", labels={"bad name": "x"}), "LABEL_NAME_INVALID"),
        (record("f", labels={"Größe": "x"}), "LABEL_NAME_INVALID"),
        (record("f", labels={"a:b": "x"}), "LABEL_NAME_INVALID"),
        (record("f", long="x" * 1025), "LABEL_VALUE_TOO_LONG"),
        (record("f", labels={f"l{i}": "x" for i in range(80)}), "TOO_MANY_LABELS"),
        (record("f", labels={f"l{i}": "x" * 1000 for i in range(7)}), "LABELS_TOO_LONG"),
        (record("f", at=0), "TIME_INVALID"),
        (record("f", at=2**64 - 1), "TIME_INVALID"),
        (record("f", entry="../x"), "ENTRY_INVALID"),
        (Record("cells/cam1", T0, {"frame_id": "f", "sha256": "0"}, b"", "image/png,x"), "CONTENT_TYPE_INVALID"),
    ],
)
async def test_what_would_harm_the_store_is_refused_alone(stores: Stores, bad: Record, reason: str) -> None:
    before, refused, after = await stores.frames.write([record("f1"), bad, record("f2", T0 + 5)])
    assert isinstance(refused, InvalidInput)
    assert refused.reason == reason
    assert (before, after) == (Written(T0), Written(T0 + 5))
    assert await found(stores.frames) == ["f1", "f2"]


async def test_a_batch_over_every_limit_is_split(stores: Stores) -> None:
    bulky = {f"l{i}": "v" * 200 for i in range(30)}
    batch = [record(f"f{i}", T0 + i, entry=f"cells/cam{i % 3}", labels=bulky) for i in range(150)]
    assert await stores.frames.write(batch) == [Written(T0 + i) for i in range(150)]
    assert await found(stores.frames) == [f"f{i}" for i in range(150)]


async def test_queries_go_by_time_over_entries_and_stop_at_the_limit(stores: Stores) -> None:
    batch = [record(f"f{i}", T0 + i, entry=f"cells/cam{i % 7}", score=repr(i / 100)) for i in range(60)]
    await stores.frames.write([*batch[30:], *batch[:30], record("other", entry="cells-2/cam1")])
    assert await found(stores.frames, limit=10) == [f"f{i}" for i in range(10)]
    assert await found(stores.frames, start_us=T0 + 5, stop_us=T0 + 8) == ["f5", "f6", "f7"]
    assert await found(stores.frames, min_score=0.1, max_score=0.12) == ["f10", "f11", "f12"]
    assert await found(stores.frames, limit=2, min_score=0.5, equals={"frame_id": "f51"}) == ["f51"]
    assert await found(stores.frames, entries=["cells/cam1"], limit=2) == ["f1", "f8"]
    assert await found(stores.frames, entries=["nothing/*"]) == []
    assert await found(stores.frames, entries=["nothing/x"]) == []


async def test_an_entry_outside_of_the_time_asked_for_is_no_error(stores: Stores) -> None:
    await stores.frames.write([record("early", T0, entry="cells/a"), record("late", T0 + 9, entry="cells/b")])
    assert await found(stores.frames, start_us=T0 + 5) == ["late"]
    assert await found(stores.frames, stop_us=T0 + 5) == ["early"]
    assert await found(stores.frames, start_us=T0 + 5, stop_us=T0 + 5) == []
    assert await found(stores.frames, start_us=T0 + 6, stop_us=T0 + 5) == []
    assert await found(stores.frames, start_us=0, stop_us=gate.MAX_TIMESTAMP_US) == ["early", "late"]
    assert await found(stores.frames, start_us=0, stop_us=0) == []
    assert await found(stores.frames, start_us=gate.MAX_TIMESTAMP_US, stop_us=gate.MAX_TIMESTAMP_US) == []


async def test_labels_are_compared_as_text(stores: Stores) -> None:
    values = ["7", "07", "7.0", "1e3", "1000.0", "true", "0123", "123", "nan", "abc", "-5", "+7"]
    written = await stores.frames.write([record(f"f{i}", T0 + i, v=value) for i, value in enumerate(values)])
    assert written == [Written(T0 + i) for i in range(len(values))]
    for i, value in enumerate(values):
        assert await found(stores.frames, limit=1, equals={"v": value}) == [f"f{i}"], value


async def test_confirm_tells_which_images_stand(stores: Stores) -> None:
    one, two, far = record("f1"), record("f2", T0 + 1), record("f3", T0 + 3_600_000_000)
    await stores.frames.write([one, two, far])
    expected = {
        T0: one.labels["sha256"],
        T0 + 1: "0" * 64,
        T0 + 2: one.labels["sha256"],
        far.timestamp_us: far.labels["sha256"],
    }
    assert await stores.frames.confirm("cells/cam1", expected) == {T0, far.timestamp_us}
    assert await stores.frames.confirm("cells/none", {T0: "x"}) == set()
    assert await stores.frames.confirm("cells/cam1", {}) == set()
    assert await stores.frames.uptime_s() >= 0


async def test_frames_are_found_by_id(stores: Stores) -> None:
    near = f"{T0 // 1000:012x}"
    own = f"{near[:8]}-{near[8:]}-7000-8000-000000000001"
    late = f"{near[:8]}-{near[8:]}-7000-8000-000000000002"
    await stores.frames.write([record(own), record(late, T0 + 10**12, entry="cells/cam2"), record("0123", T0 + 5)])
    assert (await stores.frames.find("cells", own)).timestamp_us == T0
    assert (await stores.frames.find("cells", late)).entry == "cells/cam2"
    assert (await stores.frames.find("cells", "0123", "cam1")).timestamp_us == T0 + 5
    now = time.time_ns() // 1_000
    await stores.frames.write([record("0123", at, body=str(at).encode()) for at in (T0 + 10**9, now, now + 10**8)])
    assert (await stores.frames.find("cells", "0123")).timestamp_us == now + 10**8
    for missing in ("123", uuid.uuid4().hex):
        with pytest.raises(NotFound):
            await stores.frames.find("cells", missing)
    with pytest.raises(NotFound):
        await stores.frames.find("cells", own, "cam2")
    for at in (0, T0 + 77):
        with pytest.raises(NotFound):
            await stores.frames.read("cells/cam1", at)


async def test_labels_that_come_later_join_those_that_stand(stores: Stores) -> None:
    await stores.frames.write([record("f1", line="7"), record("f2", T0 + 1)])
    done = await stores.frames.label(
        [
            Labelling("cells/cam1", T0, {"human": "normal", "by": "Zoë, of the late shift"}),
            Labelling("cells/cam1", T0, {"human": "anomalous"}),
            Labelling("cells/cam1", T0 + 1, {"human": "normal"}),
        ]
    )
    assert done == [None, None, None]
    stored, body = await stores.frames.read("cells/cam1", T0)
    assert (stored.labels["human"], stored.labels["by"], stored.labels["line"]) == (
        "anomalous",
        "Zoë, of the late shift",
        "7",
    )
    assert body == b"f1"
    assert await found(stores.frames, equals={"human": "anomalous"}) == ["f1"]
    assert await found(stores.frames, equals={"human": "normal"}) == ["f2"]


async def test_queries_ask_for_labels_that_are_there_or_not(stores: Stores) -> None:
    await stores.frames.write([record("f1", a="", b="1"), record("f2", T0 + 1, b="2"), record("f3", T0 + 2, c="x")])
    await stores.frames.label([Labelling("cells/cam1", T0 + 1, {"c": "later"})])
    assert await found(stores.frames, present=["a"]) == ["f1"]
    assert await found(stores.frames, absent=["b"]) == ["f3"]
    assert await found(stores.frames, present=["b"], absent=["c"]) == ["f1"]
    assert await found(stores.frames, limit=1, absent=["a"], equals={"b": "2"}) == ["f2"]
    assert await found(stores.frames, present=["c", "b"]) == ["f2"]


async def test_a_label_for_no_record_or_of_a_bad_name_fails_alone(stores: Stores) -> None:
    await stores.frames.write([record("f1")])
    gone, bad, long, nowhere, fine = await stores.frames.label(
        [
            Labelling("cells/cam1", T0 + 9, {"human": "normal"}),
            Labelling("cells/cam1", T0, {"not a token": "x"}),
            Labelling("cells/cam1", T0, {"human": "x" * 700}),
            Labelling("cells/none", T0, {"human": "normal"}),
            Labelling("cells/cam1", T0, {"human": "normal"}),
        ]
    )
    assert isinstance(gone, NotFound)
    assert isinstance(nowhere, NotFound)
    assert isinstance(bad, InvalidInput)
    assert isinstance(long, InvalidInput)
    assert fine is None
    assert (await stores.frames.read("cells/cam1", T0))[0].labels["human"] == "normal"


async def test_labels_given_at_once_to_one_record_are_all_kept(stores: Stores) -> None:
    await stores.frames.write([record("f1")])
    changes = [Labelling("cells/cam1", T0, {f"l{i}": str(i)}) for i in range(40)]
    results = await asyncio.gather(*(stores.frames.label([change]) for change in changes))
    assert results == [[None]] * 40
    labels = (await stores.frames.read("cells/cam1", T0))[0].labels
    assert {f"l{i}": str(i) for i in range(40)}.items() <= labels.items()


async def test_concurrent_writers_of_one_entry_lose_nothing(stores: Stores) -> None:
    batches = [[record(f"w{w}-{i}", T0 + i) for i in range(32)] for w in range(6)]
    results = await asyncio.gather(*(stores.frames.write(batch) for batch in batches))
    assert all(isinstance(result, Written) for batch in results for result in batch)
    assert sorted(await found(stores.frames)) == sorted(f"w{w}-{i}" for w in range(6) for i in range(32))


async def test_frames_that_come_late_are_all_kept_at_their_times(stores: Stores) -> None:
    """Over several of ReductStore's blocks, in batches that overlap, with frames of one microsecond and repeats."""
    rng = random.Random(0)
    order = sorted(range(1_500), key=lambda number: number + rng.uniform(0, 200))
    records = [record(f"f{number}", T0 + number // 2 * 1_000) for number in order]
    for start in range(0, len(records), 60):
        repeated = rng.sample(records[:start], min(4, start))
        results = await stores.frames.write([*records[start : start + 60], *repeated])
        assert all(isinstance(result, Written) for result in results)
        assert all(isinstance(result, Written) and result.existed for result in results[60:])
    for number in range(20):
        assert isinstance((await stores.frames.write([record(f"late{number}", T0 + number * 7_000)]))[0], Written)
    hits = [hit async for hit in stores.frames.query(FrameFilter(["cells/cam1"]), limit=2_000)]
    assert len(hits) == len({hit.labels["frame_id"] for hit in hits}) == 1_520
    assert [hit.timestamp_us for hit in hits] == sorted({hit.timestamp_us for hit in hits})
    assert all(0 <= hit.timestamp_us - _wanted(hit.labels["frame_id"]) < 3 for hit in hits)
    expected = {hit.timestamp_us: hit.labels["sha256"] for hit in hits}
    assert await stores.frames.confirm("cells/cam1", expected) == expected.keys()
    late = [hit for hit in hits if hit.labels["frame_id"].startswith("late")]
    assert await stores.frames.label([Labelling(hit.entry, hit.timestamp_us, {"seen": "yes"}) for hit in late]) == [
        None
    ] * len(late)
    assert len(await found(stores.frames, present=["seen"])) == len(late)
    at_base = await stores.frames.label([Labelling("cells/cam1", hit.timestamp_us, {"again": "yes"}) for hit in late])
    assert at_base == [None] * len(late)
    for hit in late:
        stored, body = await stores.frames.read("cells/cam1", hit.timestamp_us)
        assert (stored.labels["again"], body.decode()) == ("yes", stored.labels["frame_id"])
    assert (await stores.frames.find("cells", "late3")).timestamp_us == late[3].timestamp_us


def _wanted(frame_id: str) -> int:
    if frame_id.startswith("late"):
        return T0 + int(frame_id.removeprefix("late")) * 7_000
    return T0 + int(frame_id.removeprefix("f")) // 2 * 1_000


async def test_the_next_writer_knows_what_the_last_one_wrote(stores: Stores) -> None:
    await stores.frames.write([record("a", T0), record("c", T0 + 2)])
    stores.frames.forget("cells")
    results = await stores.frames.write([record("a", T0), record("b", T0 + 1), record("d", T0 + 2)])
    assert results == [Written(T0, existed=True), Written(T0 + 1), Written(T0 + 3)]
    assert await found(stores.frames) == ["a", "b", "c", "d"]


def version(number: int, bundle: bytes, name: str = "cells") -> ModelInfo:
    digest = f"sha256:{hashlib.sha256(bundle).hexdigest()}"
    return ModelInfo(name, number, digest, len(bundle), ("onnx", "openvino"), T0, "name: cells\nüñí, 'x'\n")


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def publish(models: ModelStore, info: ModelInfo, bundle: bytes) -> None:
    half = len(bundle) // 2
    await models.upload(info.name, info.digest, info.size_bytes, chunks(bundle[:half], bundle[half:]))
    await models.publish(info)


async def download(models: ModelStore, info: ModelInfo) -> bytes:
    return b"".join([chunk async for chunk in models.download(info)])


async def test_model_versions_are_kept_as_published(stores: Stores) -> None:
    one, two, other = version(1, b"one" * 10**6), version(2, b"two"), version(1, b"o", "a-model")
    for info, bundle in ((one, b"one" * 10**6), (two, b"two"), (other, b"o")):
        await publish(stores.models, info, bundle)
    assert await stores.models.list() == [other, one, two]
    assert await stores.models.list("cells") == [one, two]
    assert await stores.models.list("cell") == []
    assert await stores.models.get("cells") == two
    assert await stores.models.get("cells", 1) == one
    assert await download(stores.models, one) == b"one" * 10**6
    with pytest.raises(Conflict) as taken:
        await publish(stores.models, version(2, b"three"), b"three")
    assert taken.value.reason == "VERSION_EXISTS"
    assert await download(stores.models, two) == b"two"
    with pytest.raises(NotFound) as missing:
        await stores.models.get("cells", 9)
    assert missing.value.reason == "UNKNOWN_VERSION"
    with pytest.raises(NotFound) as unknown:
        await stores.models.get("none")
    assert unknown.value.reason == "UNKNOWN_MODEL"


async def test_a_bundle_can_stand_as_several_versions(stores: Stores) -> None:
    one, two = version(1, b"same"), version(2, b"same")
    await publish(stores.models, one, b"same")
    await stores.models.publish(two)
    assert await download(stores.models, one) == await download(stores.models, two) == b"same"


async def test_a_deprecated_version_stays_and_the_first_reason_stands(stores: Stores) -> None:
    one = version(1, b"one")
    await publish(stores.models, one, b"one")
    told = await stores.models.deprecate("cells", 1, 'misses cräcks, "often"')
    assert told == replace(one, deprecated='misses cräcks, "often"')
    assert await stores.models.deprecate("cells", 1, "another") == told
    assert await stores.models.list("cells") == [await stores.models.get("cells", 1)] == [told]
    with pytest.raises(NotFound):
        await stores.models.deprecate("cells", 2, "there is none")


@pytest.mark.parametrize("parts", [(b"to", b"o short"), (b"much ", b"too long"), ()])
async def test_an_upload_of_another_size_leaves_nothing(stores: Stores, parts: tuple[bytes, ...]) -> None:
    info = version(1, b"ten bytes.")
    with pytest.raises(DataLost) as incomplete:
        await stores.models.upload(info.name, info.digest, info.size_bytes, chunks(*parts))
    assert incomplete.value.reason == "BUNDLE_INCOMPLETE"
    with pytest.raises(Unavailable):
        await stores.models.publish(info)
    assert await stores.models.list() == []
    await publish(stores.models, info, b"ten bytes.")


async def test_a_bundle_can_be_sent_again_at_once_after_an_upload_that_was_cut_off(stores: Stores) -> None:
    for number in range(30):  # the server needs a moment to see that the first is over
        bundle = f"ten bytes {number}".encode()
        info = version(number + 1, bundle)
        with pytest.raises(DataLost):
            await stores.models.upload(info.name, info.digest, info.size_bytes, chunks(bundle[:3]))
        await publish(stores.models, info, bundle)
        assert await download(stores.models, info) == bundle


async def test_an_upload_cut_off_raises_what_cut_it_and_can_be_done_again(stores: Stores) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield b"ten"
        raise InvalidInput("CUT", "cut off")

    info = version(1, b"ten bytes.")
    with pytest.raises(InvalidInput) as error:
        await stores.models.upload(info.name, info.digest, info.size_bytes, cut())
    assert error.value.reason == "CUT"
    assert await stores.models.list() == []
    await publish(stores.models, info, b"ten bytes.")
    assert await download(stores.models, info) == b"ten bytes."


async def test_versions_of_several_models_are_told_apart(stores: Stores) -> None:
    wanted = []
    for number in (1, 2, 3):
        for name in ("cells", "nuts"):
            bundle = f"{name} {number}".encode()
            info = replace(version(number, bundle, name), manifest=f"name: {name}\n" + "#" * 10 * number + "\n")
            await publish(stores.models, info, bundle)
            wanted.append(info)
    assert await stores.models.list() == sorted(wanted, key=lambda info: (info.name, info.version))


async def test_stores_open_by_url(tmp_path: Path) -> None:
    frames, models = await open_stores(f"file://{tmp_path}/a%20b", None)
    await frames.write([record("f1")])
    reader = await EmbeddedFrameStore.open(tmp_path / "a b")
    assert await found(reader) == ["f1"]
    for store in (frames, models, reader):
        await store.close()
    with pytest.raises(InvalidInput):
        await open_stores("redis://x", None)
    with pytest.raises(Unavailable):
        await open_stores("http://127.0.0.1:1", None)


async def test_an_altered_image_is_not_given_out(tmp_path: Path) -> None:
    store = await EmbeddedFrameStore.open(tmp_path)
    await store.write([record("f1")])
    await store._db.execute("UPDATE bodies SET body = x'00'")
    with pytest.raises(DataLost):
        await store.read("cells/cam1", T0)
    await store.close()


@needs_reduct
async def test_a_write_cut_off_before_it_began_holds_up_no_other(tmp_path: Path) -> None:
    store = await EmbeddedFrameStore.open(tmp_path)
    busy = threading.Event()
    await store._db.create_function("wait", 0, lambda: busy.wait(10))
    other = asyncio.create_task(store._db.execute_fetchall("SELECT wait()"))
    await asyncio.sleep(0)
    cut = asyncio.create_task(store.write([record("f1")]))
    await asyncio.sleep(0.05)
    cut.cancel()
    await asyncio.sleep(0)
    cut.cancel()
    after = asyncio.create_task(store.write([record("f2")]))
    await asyncio.sleep(0.05)
    busy.set()
    await other
    with pytest.raises(asyncio.CancelledError):
        await cut
    assert await after == [Written(T0)]
    assert await found(store) == ["f2"]
    await store.close()


async def test_a_commit_that_failed_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await EmbeddedFrameStore.open(tmp_path)
    execute = store._db.execute
    with monkeypatch.context() as patch:
        patch.setattr(store._db, "execute", lambda sql, *more: execute("full" if sql == "COMMIT" else sql, *more))
        (refused,) = await store.write([record("f1")])
        assert isinstance(refused, Unavailable)
    assert await store.write([record("f2")]) == [Written(T0)]
    assert await found(store) == ["f2"]
    await store.close()


async def test_no_condition_is_made_of_values_the_server_would_read_otherwise() -> None:
    assert condition("v", "$and") is None
    assert condition("v", "&x") is None
    assert condition("v", "1.5") is None
    assert condition("v", "7") == {"&v": {"$eq": 7}}


@needs_reduct
async def test_a_record_cut_while_written_is_repaired(server: ReductServer, reduct: ReductFrameStore) -> None:
    one = record("f1", body=b"x" * 100_000)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    request = (
        f"POST /api/v1/b/{reduct._bucket.name}/cells/cam1?ts={T0} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
    )
    writer.write(request.encode() + b"\r\n" + b"y" * 50_000)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    result = (await reduct.write([one]))[0]
    assert result == Written(T0)
    assert (await reduct.read("cells/cam1", T0))[1] == one.body


@needs_reduct
async def test_late_records_make_no_block_inside_another(own_server: ReductServer) -> None:
    """What the server does with one entry, and that the store does not get there."""
    async with Client(own_server.url) as client:
        bucket = await client.create_bucket("bare", BucketSettings(max_block_records=64))
        for time_us in (*range(T0, T0 + 63), T0 + 2_000, T0 + 1_000, T0 + 2_000):
            await bucket.write("cells/cam1", str(time_us).encode(), time_us)
        entry = next(entry for entry in await bucket.get_entry_list() if entry.name == "cells/cam1")
        assert entry.record_count == 66, "the last time was taken already, and no error came"
        assert len([one async for one in bucket.query("cells/cam1", head=True)]) < 66
    store = await ReductFrameStore.open(own_server.url)
    try:
        batches = [range(T0 + start, T0 + min(start + 64, 1_023)) for start in range(0, 1_023, 64)]
        for times_us in (*batches, [T0 + 20_000], [T0 + 10_000], [T0 + 20_000]):
            records = [record(f"f{uuid.uuid4()}", time_us) for time_us in times_us]
            assert all(isinstance(one, Written) for one in await store.write(records))
        times = [hit.timestamp_us async for hit in store.query(FrameFilter(["cells/cam1"]), limit=2_000)]
        assert times[-3:] == [T0 + 10_000, T0 + 20_000, T0 + 20_001]
        assert len(times) == 1_026
    finally:
        await store.close()


@needs_reduct
async def test_an_older_bucket_gets_small_blocks_and_keeps_its_quota(server: ReductServer) -> None:
    name = f"frames-{uuid.uuid4().hex[:8]}"
    async with Client(server.url) as client:
        bucket = await client.create_bucket(name, BucketSettings(quota_type=QuotaType.FIFO, quota_size=10**9))
        await (await ReductFrameStore.open(server.url, bucket=name)).close()
        found = await bucket.get_settings()
    assert (found.max_block_records, found.quota_type, found.quota_size) == (BLOCK_RECORDS, QuotaType.FIFO, 10**9)


@needs_reduct
async def test_the_server_lives_on_after_refused_label_names(server: ReductServer, reduct: ReductFrameStore) -> None:
    await reduct.write([record("f1", labels={"not a token": "x"}), record("f2")])
    assert await found(reduct) == ["f2"]
    await reduct.read("cells/cam1", T0)
    assert server.alive()


@needs_reduct
async def test_after_a_kill_confirm_tells_the_truth_and_writing_again_mends(own_server: ReductServer) -> None:
    store = await ReductFrameStore.open(own_server.url)
    batches = [[record(f"f{n}-{i}", T0 + n * 32 + i, entry=f"cells/cam{n % 2}") for i in range(32)] for n in range(20)]
    for batch in batches:
        assert all(isinstance(result, Written) for result in await store.write(batch))
    own_server.kill()
    (away,) = await store.write([record("late", T0 + 10**6)])
    assert isinstance(away, Unavailable)
    with pytest.raises(Unavailable):
        await store.confirm("cells/cam0", {T0: "x"})
    own_server.start()
    assert await store.uptime_s() < 5
    everything = [one for batch in batches for one in batch]
    missing = []
    for entry in ("cells/cam0", "cells/cam1"):
        mine = {one.timestamp_us: one for one in everything if one.entry == entry}
        present = await store.confirm(entry, {at: one.labels["sha256"] for at, one in mine.items()})
        for at in present:
            assert (await store.read(entry, at))[1] == mine[at].body
        missing += [one for at, one in mine.items() if at not in present]
    assert all(isinstance(result, Written) for result in await store.write(missing))
    assert len(await found(store)) == len(everything)
    await store.close()


@needs_reduct
async def test_a_bundle_without_its_pointer_is_not_listed_and_can_be_published(server: ReductServer) -> None:
    store = await ReductModelStore.open(server.url, bucket=f"models-{uuid.uuid4().hex[:8]}", settle_s=0)
    info = version(1, b"bundle")
    await store._bucket.write(f"bundles/cells/{info.digest[7:]}", b"half", timestamp=1)
    assert await store.list() == []
    with pytest.raises(NotFound):
        await store.get("cells")
    await publish(store, info, b"bundle")
    assert await download(store, info) == b"bundle"
    await store._bucket.remove_query(f"bundles/cells/{info.digest[7:]}", start=2)
    with pytest.raises(DataLost):
        await download(store, info)
    assert await store.list() == []
    with pytest.raises(Unavailable) as missing:
        await store.get("cells", 1)
    assert missing.value.reason == "BUNDLE_INCOMPLETE"
    await store.close()


@needs_reduct
async def test_a_published_version_survives_a_kill_that_follows_at_once(own_server: ReductServer) -> None:
    wanted = []
    for number in range(10):
        store = await ReductModelStore.open(own_server.url)
        bundle = os.urandom(500_000)
        info = version(1, bundle, f"cells{number}")
        await publish(store, info, bundle)
        own_server.kill()
        await store.close()
        wanted.append(info)
        own_server.start()
        store = await ReductModelStore.open(own_server.url)
        assert await store.list() == wanted
        assert await download(store, info) == bundle
        await store.close()


@needs_reduct
async def test_what_is_written_is_compacted_within_two_intervals(own_server: ReductServer, tmp_path: Path) -> None:
    """What `confirm_after_s` and `settle_s` build on; the interval of this server is 1 s."""
    store = await ReductFrameStore.open(own_server.url)
    cameras, written, ages = range(32), dict[int, float](), list[float]()

    def look() -> None:
        for camera, at in list(written.items()):
            folder = tmp_path / "reduct" / "vigil-frames" / "cells" / f"cam{camera}"
            if any(meta.stat().st_mtime > at for meta in folder.rglob("*.meta")):
                ages.append(time.time() - written.pop(camera))

    for second in range(5):
        at = T0 + second * 1_000_000
        records = [replace(record(f"f{second}", at), entry=f"cells/cam{camera}") for camera in cameras]
        assert all(isinstance(result, Written) for result in await store.write(records))
        written |= {camera: time.time() for camera in cameras if camera not in written}
        for _ in range(20):
            await asyncio.sleep(0.05)
            look()
    async with asyncio.timeout(5):
        while written:
            await asyncio.sleep(0.05)
            look()
    assert len(ages) >= 2 * len(cameras)
    assert max(ages) < 2.5
    await store.close()


@needs_reduct
async def test_what_is_written_to_an_entry_waits_until_the_record_before_is_safe(server: ReductServer) -> None:
    bucket = f"models-{uuid.uuid4().hex[:8]}"
    one, two = [await ReductModelStore.open(server.url, bucket=bucket, settle_s=0.5) for _ in range(2)]

    async def took(step: Awaitable[object]) -> float:
        began = time.monotonic()
        await step
        return time.monotonic() - began

    assert await took(publish(one, version(1, b"one"), b"one")) < 0.4
    assert await took(publish(one, version(1, b"o", "nuts"), b"o")) < 0.4
    assert await took(publish(two, version(2, b"two"), b"two")) > 0.3
    assert await took(one.deprecate("cells", 1, "misses cracks")) < 0.4
    assert await took(two.deprecate("cells", 2, "misses cracks")) > 0.3
    await asyncio.sleep(0.5)
    assert await took(publish(one, version(3, b"three"), b"three")) < 0.4
    for store in (one, two):
        await store.close()


@pytest.mark.parametrize("value", ["", " ", "%", "%25", "a,b", "ü", "plain text", "x" * 100, '"', "\x7f"])
def test_encoded_labels_decode_to_what_they_were(value: str) -> None:
    text = gate.encode(value)
    assert gate.decode(text) == value
    assert text.isascii()
    assert text.isprintable()
    assert not set(text) & set(',"')
    assert text == text.strip() != ""
