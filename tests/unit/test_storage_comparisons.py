"""Comparisons become labels of their frames: late frames, malformed entries, and an owner that comes back."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from vigil.shadow.v1 import shadow_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import Unavailable
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.ports import FrameFilter, Record
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import ReportStep
from vigil_storage import comparisons as module
from vigil_storage.comparisons import REMEMBERED, ComparisonLabeller, Places

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

M = "cells"
CAPTURED_US = 1_700_000_000_000_000
DEADLINE_S = 10


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUND_S", 0.02)


class Bench:
    """A store, the comparisons, and a labeller on them."""

    def __init__(self, store: EmbeddedFrameStore) -> None:
        self.store = store
        self.streams = MemoryStreams()
        self.steps = 0

    async def tell(self, *blobs: bytes) -> None:
        """As shadow does."""
        step = ReportStep(f"{self.steps}-0", f"{self.steps + 1}-0", 0, comparisons=blobs)
        assert await self.streams.reports.commit(M, "1", step)
        self.steps += 1

    async def keep(self, frame_id: str, *, captured_us: int = CAPTURED_US) -> None:
        """As the writer does."""
        image = frame_id.encode()
        labels = {"frame_id": frame_id, "sha256": hashlib.sha256(image).hexdigest(), "score": "0.25"}
        await self.store.write([Record(f"{M}/line-1", captured_us, labels, image, "image/png")])

    async def labels(self, frame_id: str) -> dict[str, str]:
        where = FrameFilter([f"{M}/*"], equals={"frame_id": frame_id})
        return {name: value async for one in self.store.query(where, limit=1) for name, value in one.labels.items()}

    def left(self) -> int:
        return len(self.streams.state(M).comparisons)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = await EmbeddedFrameStore.open(tmp_path)
    yield Bench(store)
    await store.close()


@asynccontextmanager
async def labelling(
    bench: Bench,
    confirm_after_s: float = 0.0,
    places: Places | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[None]:
    comparisons, places = bench.streams.comparisons(M), places or Places()
    labeller = ComparisonLabeller(M, comparisons, bench.store, places, confirm_after_s=confirm_after_s, clock=clock)
    task = asyncio.create_task(labeller.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def comparison(frame_id: str, *, agree: bool = False, captured_us: int = CAPTURED_US) -> bytes:
    found = shadow_pb2.Comparison(
        frame_id=frame_id,
        model=M,
        camera="line-1",
        candidate=types_pb2.ModelVersion(name=M, version=2, digest="sha256:2"),
        score=0.75,
        label=types_pb2.LABEL_ANOMALOUS,
        threshold=0.5,
        agree=agree,
    )
    found.captured_at.FromMicroseconds(captured_us)
    return found.SerializeToString()


async def test_a_stored_frame_gets_what_the_candidate_said_and_keeps_what_it_had(bench: Bench) -> None:
    await bench.keep("f1")
    await bench.tell(comparison("f1"))
    async with labelling(bench):
        await bench.until(lambda: bench.left() == 0)
    found = await bench.labels("f1")
    assert found["score"] == "0.25"
    assert {name: value for name, value in found.items() if name.startswith("candidate") or name == "agree"} == {
        "candidate_version": "2",
        "candidate_digest": "sha256:2",
        "candidate_score": "0.75",
        "candidate_label": "anomalous",
        "candidate_threshold": "0.5",
        "agree": "false",
    }


async def test_frames_at_one_time_and_hours_apart_each_get_their_own(bench: Bench) -> None:
    hour_us = 3_600_000_000
    for name, captured_us in (("f1", CAPTURED_US), ("f2", CAPTURED_US), ("f3", CAPTURED_US + hour_us)):
        await bench.keep(name, captured_us=captured_us)
    await bench.tell(
        comparison("f3", captured_us=CAPTURED_US + hour_us), comparison("f1", agree=True), comparison("f2")
    )
    async with labelling(bench):
        await bench.until(lambda: bench.left() == 0)
    assert [(await bench.labels(name))["agree"] for name in ("f1", "f2", "f3")] == ["true", "false", "false"]


async def test_where_the_writer_has_put_a_frame_is_not_looked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vigil_storage.comparisons.ROUND_S", 0.01)
    await bench.keep("f1")
    await bench.keep("f2", captured_us=CAPTURED_US + 9)
    places = Places()
    places.add("f1", f"{M}/line-1", CAPTURED_US)
    places.add("f2", f"{M}/line-1", CAPTURED_US + 5)  # lost with the server, and written again a little later
    # A time of capture at which nothing is found tells which of them was looked for.
    await bench.tell(comparison("f1", captured_us=1), comparison("f2", captured_us=CAPTURED_US + 9))
    async with labelling(bench, places=places):
        await bench.until(lambda: places.get("f2") is None)
        async with asyncio.timeout(DEADLINE_S):
            while not {"agree"} <= (await bench.labels("f1")).keys() & (await bench.labels("f2")).keys():
                await asyncio.sleep(0.005)


async def test_the_places_of_the_oldest_frames_are_forgotten() -> None:
    places = Places()
    for index in range(REMEMBERED + 2):
        places.add(f"f{index}", "m/c", index)
    assert [places.get(f"f{index}") for index in (1, 2, REMEMBERED + 1)] == [None, ("m/c", 2), ("m/c", REMEMBERED + 1)]


async def test_a_comparison_waits_for_its_frame(bench: Bench) -> None:
    await bench.tell(comparison("f1"), comparison("f2"))
    async with labelling(bench):
        await bench.keep("f2")
        await bench.until(lambda: bench.left() == 1)
        await bench.keep("f1")
        await bench.until(lambda: bench.left() == 0)
    assert (await bench.labels("f1"))["candidate_version"] == "2"


async def test_a_comparison_is_forgotten_only_once_its_labels_are_found_again(bench: Bench) -> None:
    await bench.keep("f1")
    await bench.tell(comparison("f1"))
    async with labelling(bench, confirm_after_s=3600):
        async with asyncio.timeout(DEADLINE_S):
            while "agree" not in await bench.labels("f1"):
                await asyncio.sleep(0.005)
        assert bench.left() == 1
    async with labelling(bench):  # the next owner finds it, and does it again
        await bench.until(lambda: bench.left() == 0)


async def test_rubbish_and_frames_that_never_come_are_let_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_UP_S", 0.1)
    await bench.keep("f1")
    await bench.tell(b"\xff\xff", comparison("never"), comparison("f1"))
    async with labelling(bench):
        await bench.until(lambda: bench.left() == 0)
    assert (await bench.labels("f1"))["agree"] == "false"


async def test_a_frame_is_waited_for_through_a_long_outage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped_s, query, looks = 0.0, bench.store.query, 0

    def watched(where: FrameFilter, *, limit: int) -> Any:
        nonlocal looks
        looks += 1
        return query(where, limit=limit)

    def away(_: FrameFilter, **__: Any) -> Any:
        nonlocal looks
        looks += 1
        raise Unavailable("STORE_AWAY", "it is away")

    async def some_looks(how: Any) -> None:
        monkeypatch.setattr(bench.store, "query", how)
        before = looks
        await bench.until(lambda: looks > before + 3)

    await bench.tell(comparison("f1"))
    async with labelling(bench, clock=lambda: time.monotonic() + skipped_s):
        await some_looks(watched)
        await some_looks(away)
        skipped_s = 2 * module.GIVE_UP_S
        await some_looks(watched)
        assert bench.left() == 1
        monkeypatch.setattr(bench.store, "query", query)
        await bench.keep("f1")
        await bench.until(lambda: bench.left() == 0)
    assert (await bench.labels("f1"))["agree"] == "false"
