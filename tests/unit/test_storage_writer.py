"""The writer frees a frame only once the store is known to keep it."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_common.store.labels import MAX_TIMESTAMP_US
from vigil_common.store.ports import FrameFilter, Record, Written
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Candidate, Live, QueuedFrame, QueuedOutcome, sampled
from vigil_storage import convert, domain
from vigil_storage.app import Storage
from vigil_storage.comparisons import Places
from vigil_storage.retention import Sampling
from vigil_storage.reviews import Reviews
from vigil_storage.servicer import FrameServicer
from vigil_storage.writer import FrameWriter, WriterOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

T0 = 1_750_000_000_000_000
OPTIONS = WriterOptions(flush_ms=1, confirm_after_s=0.05, lease_ms=600)


def queued(number: int, *, camera: str = "cam1", labels: dict[str, str] | None = None, **fields: Any) -> QueuedOutcome:
    image = fields.get("image", f"image {number}".encode())
    header = types_pb2.FrameHeader(
        frame_id=fields.get("frame_id", f"f{number}"),
        model="cells",
        camera=camera,
        captured_at=convert.from_us(fields.get("at", T0 + number)),
        received_at=convert.from_us(T0 + number + 5),
        labels=labels or {},
        content_type="image/png",
        width=640,
        height=480,
        sha256=hashlib.sha256(image).digest(),
    )
    outcome = types_pb2.Outcome(frame_id=header.frame_id)
    if fields.get("failed"):
        detail = AnyMessage()
        detail.Pack(ErrorInfo(reason="IMAGE_CORRUPT", domain="vigil.dev"))
        outcome.failure.details.append(detail)
    else:
        model = types_pb2.ModelVersion(name="cells", version=3, digest="sha256:" + "a" * 64)
        anomalous = number % 2 == 1
        label = types_pb2.LABEL_ANOMALOUS if anomalous else types_pb2.LABEL_NORMAL
        outcome.verdict.CopyFrom(
            types_pb2.Verdict(frame_id=header.frame_id, model=model, score=number / 100, label=label, threshold=0.5)
        )
        outcome.verdict.timing.total.FromMicroseconds(1234)
    frame = QueuedFrame(f"{number}-1", header.SerializeToString(), image)
    return QueuedOutcome(f"{number}-2", outcome.SerializeToString(), None if fields.get("gone") else frame)


class FakeSource:
    """A stream with one group; what is read and not done is pending."""

    def __init__(self, outcomes: Sequence[QueuedOutcome]) -> None:
        self.new = list(outcomes)
        self.pending: dict[str, QueuedOutcome] = {}
        self.finished: list[str] = []
        self.owned = True
        self.closed = False
        self._after = 0

    async def own(self, *, ttl_ms: int) -> bool:
        assert ttl_ms > 0
        return self.owned

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[QueuedOutcome]:
        if pending:
            found = list(self.pending.values())[self._after : self._after + count]
            self._after = self._after + count if found else 0
            return found
        if not self.new:
            await asyncio.sleep(min(block_ms, 10) / 1000)
        taken, self.new = self.new[:count], self.new[count:]
        self.pending |= {outcome.entry_id: outcome for outcome in taken}
        return taken

    async def done(self, outcomes: Sequence[QueuedOutcome]) -> None:
        for outcome in outcomes:
            self.pending.pop(outcome.entry_id, None)
            self.finished.append(outcome.entry_id)

    async def trim(self) -> int:
        return 0

    async def close(self) -> None:
        self.closed = True


class Troubled:
    """The embedded store with a server's troubles."""

    def __init__(self, store: EmbeddedFrameStore) -> None:
        self.store = store
        self.away = 0
        self.losing: set[str] = set()
        self.uptime = 1e9
        self.writes: list[int] = []

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        if self.away:
            self.away -= 1
            return [Unavailable("STORE_UNAVAILABLE", "away")] * len(records)
        self.writes.append(len(records))
        return await self.store.write(records)

    async def confirm(self, entry: str, expected: dict[int, str]) -> set[int]:
        for at in expected:
            stored, _ = await self.store.read(entry, at)
            if stored.labels["frame_id"] in self.losing:
                self.losing.discard(stored.labels["frame_id"])
                await self.store._db.execute("DELETE FROM frames WHERE timestamp_us = ?", (at,))
        return await self.store.confirm(entry, expected)

    async def uptime_s(self) -> float:
        return self.uptime

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Troubled]:
    embedded = await EmbeddedFrameStore.open(tmp_path)
    yield Troubled(embedded)
    await embedded.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def writing(
    source: FakeSource, store: Troubled, options: WriterOptions = OPTIONS, sampling: Sampling | None = None
) -> AsyncIterator[None]:
    stop = asyncio.Event()
    writer = FrameWriter("cells", source, store, options, Places(), sampling=sampling)  # type: ignore[arg-type]
    task = asyncio.create_task(writer.run(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 5)
        assert source.closed


async def ids(store: Troubled) -> list[str]:
    return [hit.labels["frame_id"] async for hit in store.query(FrameFilter(["cells/*"]), limit=1000)]


async def test_every_frame_is_stored_with_its_verdict_and_then_freed(store: Troubled) -> None:
    source = FakeSource([queued(n, camera=f"cam{n % 3}", labels={"line": "7", "score": "x"}) for n in range(100)])
    async with writing(source, store):
        await until(lambda: len(source.finished) == 100)
    assert not source.pending
    assert await ids(store) == [f"f{n}" for n in range(100)]
    assert max(store.writes) <= 32
    stored, body = await store.read("cells/cam1", T0 + 1)
    assert body == b"image 1"
    expected = {"label": "anomalous", "anomalous": "true", "version": "3", "digest": "sha256:" + "a" * 64, "line": "7"}
    expected |= {"outcome": "judged", "latency_us": "1234", "camera": "cam1", "width": "640", "client_score": "x"}
    assert expected.items() <= stored.labels.items()
    assert float(stored.labels["score"]) == pytest.approx(0.01)


async def test_a_frame_that_could_not_be_judged_is_stored_with_the_reason(store: Troubled) -> None:
    source = FakeSource([queued(1, failed=True)])
    async with writing(source, store):
        await until(lambda: len(source.finished) == 1)
    stored, _ = await store.read("cells/cam1", T0 + 1)
    assert (stored.labels["outcome"], stored.labels["reason"]) == ("failed", "IMAGE_CORRUPT")


async def test_only_the_sample_of_normal_frames_is_stored_but_all_while_a_candidate_is_compared(
    store: Troubled,
) -> None:
    routing = MemoryStreams().routing
    live = Live(3, "sha256:a")
    await routing.write("cells", live=live)
    sampling = Sampling("cells", 0.25, routing)
    # Odd ones are anomalous.
    source = FakeSource([queued(n, failed=n < 20) for n in range(200)])
    async with writing(source, store, sampling=sampling):
        await until(lambda: len(source.finished) == 200)
    normal = [n for n in range(20, 200) if n % 2 == 0]
    kept = [n for n in normal if sampled(f"f{n}", 0.25)]
    assert len(normal) / 8 < len(kept) < len(normal) / 2
    assert await ids(store) == [f"f{n}" for n in range(200) if n not in normal or n in kept]
    await routing.write("cells", live=live, candidate=Candidate(4, "sha256:b"))
    source = FakeSource([queued(n) for n in range(200, 240)])
    async with writing(source, store, sampling=sampling):
        await until(lambda: len(source.finished) == 40)
    assert (await ids(store))[-40:] == [f"f{n}" for n in range(200, 240)]


async def test_a_models_own_fraction_goes_before_the_settings_and_may_change_at_any_time(store: Troubled) -> None:
    routing = MemoryStreams().routing
    await routing.write("cells", live=Live(3, "sha256:a"))
    sampling = Sampling("cells", 0.0, routing)
    for start, fraction in ((0, 1.0), (100, 0.25), (200, None)):
        await routing.keep_fraction("cells", fraction)
        source = FakeSource([queued(n) for n in range(start, start + 100)])
        async with writing(source, store, sampling=sampling):
            await until(lambda source=source: len(source.finished) == 100)  # type: ignore[misc]
    odd = [n for n in range(300) if n % 2]
    even = [n for n in range(0, 200, 2) if n < 100 or sampled(f"f{n}", 0.25)]
    assert await ids(store) == [f"f{n}" for n in sorted([*odd, *even])]


async def test_a_store_that_is_away_delays_and_loses_nothing(store: Troubled) -> None:
    store.away = 3
    source = FakeSource([queued(n) for n in range(40)])
    async with writing(source, store):
        await until(lambda: len(source.finished) == 40)
    assert await ids(store) == [f"f{n}" for n in range(40)]


async def test_stopping_does_not_wait_for_a_store_that_is_away(store: Troubled) -> None:
    store.away = 10**6
    source = FakeSource([queued(1)])
    async with writing(source, store):
        await until(lambda: store.away < 10**6)
    assert (source.finished, list(source.pending)) == ([], ["1-2"])


async def test_nothing_is_freed_before_the_server_has_been_up_for_long_enough(store: Troubled) -> None:
    store.uptime = 0.0
    source = FakeSource([queued(1)])
    async with writing(source, store):
        await until(lambda: bool(store.writes))
        await asyncio.sleep(0.5)
        assert not source.finished
        store.uptime = 10.0
        await until(lambda: source.finished == ["1-2"])


async def test_what_vanished_is_read_from_the_queue_and_written_again(store: Troubled) -> None:
    store.losing = {"f3", "f5"}
    source = FakeSource([queued(n) for n in range(8)])
    async with writing(source, store):
        await until(lambda: len(source.finished) == 8)
    assert await ids(store) == [f"f{n}" for n in range(8)]


async def test_an_owner_begins_with_what_the_one_before_left(store: Troubled) -> None:
    left = [queued(n) for n in range(40)]
    await store.write([convert.record_of("cells", left[0])])
    source = FakeSource([queued(99)])
    source.pending = {outcome.entry_id: outcome for outcome in left}
    async with writing(source, store):
        await until(lambda: len(source.finished) == 41)
    assert await ids(store) == [*(f"f{n}" for n in range(40)), "f99"]


async def test_without_the_lease_nothing_is_read(store: Troubled) -> None:
    source = FakeSource([queued(1)])
    source.owned = False
    async with writing(source, store):
        await asyncio.sleep(0.3)
        assert source.new
        source.owned = True
        await until(lambda: source.finished == ["1-2"])


async def test_a_lost_lease_stops_writing(store: Troubled) -> None:
    source = FakeSource([])
    async with writing(source, store):
        await asyncio.sleep(0.1)
        source.owned = False
        await asyncio.sleep(0.5)
        source.new = [queued(1)]
        await asyncio.sleep(0.3)
        assert source.new


async def test_poison_does_not_hold_up_the_others(store: Troubled) -> None:
    poison = [
        queued(1, gone=True),
        QueuedOutcome("2-2", b"\xff", QueuedFrame("2-1", b"\xff", b"")),
        queued(3, labels={"Bad Name": "x", "fine": "y"}),
        queued(4, frame_id="f0", at=T0, image=b"another"),
        queued(5, camera="../.."),
    ]
    source = FakeSource([queued(0), *poison, queued(6)])
    async with writing(source, store):
        await until(lambda: len(source.finished) == 7)
    assert not source.pending
    sha = hashlib.sha256(b"another").hexdigest()
    assert await ids(store) == ["f0", f"f0.{sha[:12]}", "f3", "f6"]
    refused, _ = await store.read("cells/cam1", T0 + 3)
    assert refused.labels["labels_refused"] == "LABEL_NAME_INVALID"
    assert refused.labels["label"] == "anomalous"
    reused, body = await store.read("cells/cam1", T0 + 1)
    assert (reused.labels["reused_frame_id"], body) == ("f0", b"another")


@pytest.fixture
async def app(tmp_path: Path, store: Troubled) -> AsyncIterator[Storage]:
    models = await EmbeddedModelStore.open(tmp_path)
    yield Storage(store, models, lambda: T0)  # type: ignore[arg-type]
    await models.close()


def reviews_of(store: Troubled) -> Reviews:
    return Reviews(store, store, MemoryStreams().reviews)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_pages_give_every_frame_once_by_time(app: Storage, store: Troubled, size: int) -> None:
    # Several cameras at the very same time, where pages like to break.
    frames = [queued(n, camera=f"cam{n % 5}", at=T0 + n // 5) for n in range(20)]
    await store.write([convert.record_of("cells", outcome) for outcome in frames])
    servicer, token, seen = FrameServicer(app, reviews_of(store)), "", []
    while True:
        request = storage_pb2.QueryRequest(model="cells", page_size=size, page_token=token)
        response = await servicer.Query(request, None)
        assert len(response.frames) <= size
        seen += [frame.header.frame_id for frame in response.frames]
        token = response.next_page_token
        if not token:
            break
    assert sorted(seen) == sorted(f"f{n}" for n in range(20))


@pytest.mark.parametrize(
    ("start_s", "stop_s", "expected"),
    [(-1, 10, (0, 10_000_000)), (-62_135_596_800, -1, (0, 0)), (0, 2**62, (0, MAX_TIMESTAMP_US))],
)
def test_times_at_which_nothing_can_stand_are_asked_for_as_those_next_to_them(
    start_s: int, stop_s: int, expected: tuple[int, int]
) -> None:
    start, stop = Timestamp(seconds=start_s), Timestamp(seconds=stop_s)
    asked = convert.filter_of(storage_pb2.QueryRequest(model="cells", start=start, stop=stop))
    exported = convert.export_filter(storage_pb2.ExportRequest(model="cells", since=start, until=stop))
    assert (asked.start_us, asked.stop_us) == (exported.start_us, exported.stop_us) == expected
    with pytest.raises(InvalidInput):
        convert.filter_of(storage_pb2.QueryRequest(model="cells", start=stop, stop=start))


async def test_queries_filter_and_frames_come_back_as_they_were(app: Storage, store: Troubled) -> None:
    await store.write([convert.record_of("cells", queued(n, labels={"line": "a,b"}, failed=n == 4)) for n in range(10)])
    servicer = FrameServicer(app, reviews_of(store))

    async def found(**fields: Any) -> list[str]:
        response = await servicer.Query(storage_pb2.QueryRequest(model="cells", **fields), None)
        return [frame.header.frame_id for frame in response.frames]

    assert await found(failed=True) == ["f4"]
    assert await found(label=types_pb2.LABEL_NORMAL) == ["f0", "f2", "f6", "f8"]
    assert await found(version=3, min_score=0.08) == ["f8", "f9"]
    assert await found(version=4) == []
    assert await found(camera="cam2") == []
    assert await found(start=convert.from_us(T0 + 2), stop=convert.from_us(T0 + 4)) == ["f2", "f3"]
    answer = await servicer.Get(storage_pb2.GetRequest(model="cells", frame_id="f7"), None)
    assert answer.image == b"image 7"
    header = types_pb2.FrameHeader.FromString(queued(7).frame.header)  # type: ignore[union-attr]
    header.labels["line"] = "a,b"
    assert answer.frame.header == header
    assert answer.frame.verdict.score == pytest.approx(0.07)
    bare = await servicer.Get(storage_pb2.GetRequest(model="cells", frame_id="f7", header_only=True), None)
    assert (bare.image, bare.frame) == (b"", answer.frame)
    for bad in ({"page_token": "x"}, {"page_token": "WzEsMl0="}, {"page_size": 5000}, {"camera": "a/b"}):
        with pytest.raises(InvalidInput):
            await found(**bad)


def test_page_tokens_come_back_as_they_were() -> None:
    token = domain.PageToken(T0, ("cells/cam1", "cells/cam2"))
    assert domain.PageToken.decode(token.encode()) == token
