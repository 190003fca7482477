"""The worker on the stream: what it takes, gives back, gives up on, and does while Redis is away."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.rpc import error_details_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Candidate, Live, sampled
from vigil_inference import outbox as outbox_module
from vigil_inference import worker as module
from vigil_inference.pipeline import Judged
from vigil_inference.roles import Role
from vigil_inference.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from vigil_common.streams.memory import MemoryFrameSource
    from vigil_common.streams.ports import ComparedVerdict, Emission, QueuedFrame

M = "cells"
VERSION = types_pb2.ModelVersion(name=M, version=2, digest="sha256:two")
DEADLINE_S = 10
GREY = np.full((8, 8), 100, dtype=np.uint8)


class FakePipeline:
    """The score is the image's text; b"bad" is no image, b"broken" breaks the runtime."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.let.set()
        self.judged: list[bytes] = []
        self.running = 0
        self.frame_s = 0.011
        self.aside: bool | None = None

    def stand_aside(self, *, aside: bool) -> None:
        self.aside = aside

    async def judge(self, image: bytes, *, pictures: bool) -> Judged:
        self.running += 1
        try:
            await self.let.wait()
            self.judged.append(image)
            if image == b"bad":
                raise InvalidInput("IMAGE_TRUNCATED", "cut short")
            if image == b"broken":
                raise RuntimeError("the runtime broke")
            found = np.full((8, 8), 0.9, dtype=np.float32) if pictures else None
            return Judged(float(image), GREY if pictures else None, found, None, 0.001, self.frame_s - 0.001)
        finally:
            self.running -= 1


class SteppedPipeline(FakePipeline):
    """Judges a frame for each ticket."""

    def __init__(self) -> None:
        super().__init__()
        self.tickets = asyncio.Semaphore(0)

    async def judge(self, image: bytes, *, pictures: bool) -> Judged:
        await self.tickets.acquire()
        return await super().judge(image, pictures=pictures)

    async def step(self) -> None:
        """Judge one, and let its verdict go where it would."""
        self.tickets.release()
        for _ in range(50):  # rounds of the loop, of which it takes a few
            await asyncio.sleep(0)


class WatchedSource:
    """A source that remembers what was emitted together, and can be away or broken."""

    def __init__(self, inner: MemoryFrameSource) -> None:
        self._inner = inner
        self.away = False
        self.broken = False
        self.claims = 0
        self.counts: list[int] = []
        self.emitted: list[Emission] = []
        self.groups: list[int] = []

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        self.counts.append(count)
        return await self._inner.read(count=count, block_ms=block_ms)

    async def claim(self, *, min_idle_ms: int, count: int, held: Collection[str] = ()) -> list[QueuedFrame]:
        self.claims += 1
        return await self._inner.claim(min_idle_ms=min_idle_ms, count=count, held=held)

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        if self.away:
            raise Unavailable("QUEUE_UNAVAILABLE", "Redis is away")
        if self.broken:
            raise ValueError("a reply that makes no sense")
        self.groups.append(len(emissions))
        self.emitted += emissions
        return await self._inner.emit(emissions)

    async def close(self) -> None:
        await self._inner.close()


class Bench:
    """A worker with everything around it."""

    def __init__(
        self,
        *,
        prefetch: int = 4,
        claim_idle_ms: int = 60_000,
        frame_s: float = 0.0,
        hand_s: float = math.inf,
        pipeline: FakePipeline | None = None,
    ) -> None:
        self.streams = MemoryStreams()
        self.pipeline = pipeline or FakePipeline()
        self.source = WatchedSource(self.streams.source(M, "me"))
        self.stop = asyncio.Event()
        self.shadow = WatchedSource(self.streams.candidate(M, "me", VERSION.digest))
        self.worker = Worker(
            self.source,
            self.shadow,
            self.streams.routing,
            self.pipeline,  # type: ignore[arg-type]
            version=VERSION,
            default_threshold=0.5,
            prefetch=prefetch,
            claim_idle_ms=claim_idle_ms,
            frame_s=frame_s,
            hand_s=hand_s,
            at_least=2,
        )

    async def admit(
        self, frame_id: str, image: bytes = b"0.75", *, header: bytes | None = None, pictures: bool = False
    ) -> None:
        made = types_pb2.FrameHeader(frame_id=frame_id, model=M)
        made.received_at.GetCurrentTime()
        if pictures:
            made.outputs.anomaly_map = True
        data = made.SerializeToString() if header is None else header
        sha = hashlib.sha256(image).digest()
        await self.streams.queue.admit(M, frame_id=frame_id, sha256=sha, header=data, image=image, reply_to="r")

    async def compare(self, *, fraction: float = 1.0, threshold: float | None = None) -> None:
        candidate = Candidate(2, VERSION.digest, threshold, fraction)
        await self.streams.routing.write(M, live=Live(1, "sha256:one"), candidate=candidate)

    async def shown(self) -> list[ComparedVerdict]:
        """What shadow has been told."""
        return await self.streams.verdicts(M, "v").read("0-0", count=100, block_ms=0)

    async def admit_many(self, count: int) -> None:
        for index in range(count):
            await self.admit(f"f{index}")

    async def promote(self, digest: str = VERSION.digest, threshold: float | None = None) -> None:
        await self.streams.routing.promote(M, version=2, digest=digest, threshold=threshold)

    def outcomes(self) -> dict[str, types_pb2.Outcome]:
        return {one.frame_id: types_pb2.Outcome.FromString(one.outcome) for one in self.source.emitted}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_MS", 20)
    monkeypatch.setattr(module, "RECONNECT_S", 0.01)


@asynccontextmanager
async def working(bench: Bench) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(bench.worker.run(bench.stop))
    try:
        yield task
    finally:
        bench.stop.set()
        await asyncio.wait([task], timeout=DEADLINE_S)
        assert task.done()
    task.result()


def reason(outcome: types_pb2.Outcome) -> str:
    info = error_details_pb2.ErrorInfo()
    assert outcome.failure.details[0].Unpack(info)
    assert info.domain == "vigil.dev"
    return str(info.reason)


async def test_a_frame_is_judged_and_its_verdict_says_all_there_is_to_say() -> None:
    bench = Bench()
    await bench.admit("f1")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 1)
    (emission,) = bench.source.emitted
    verdict = types_pb2.Outcome.FromString(emission.outcome).verdict
    assert (verdict.frame_id, verdict.model, verdict.score) == ("f1", VERSION, 0.75)
    assert (verdict.label, verdict.threshold) == (types_pb2.LABEL_ANOMALOUS, 0.5)
    assert verdict.timing.total.ToNanoseconds() >= verdict.timing.queue.ToNanoseconds() > 0
    assert verdict.timing.inference.ToMilliseconds() == 10
    assert emission.reply is emission.outcome
    assert emission.dead_reason == ""
    assert (await bench.streams.queue.depth(M)).unjudged == 0


async def test_pictures_travel_in_the_reply_and_not_to_storage() -> None:
    bench = Bench()
    await bench.admit("f1", pictures=True)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 1)
    (emission,) = bench.source.emitted
    assert types_pb2.Outcome.FromString(emission.reply).verdict.anomaly_map.data[1:4] == b"PNG"
    assert not types_pb2.Outcome.FromString(emission.outcome).verdict.HasField("anomaly_map")


async def test_the_route_decides_who_reads_and_by_which_threshold() -> None:
    bench = Bench()
    await bench.promote("sha256:one")
    await bench.admit("f1")
    async with working(bench):
        await bench.until(lambda: bench.worker._route is not None)
        assert not bench.worker.live
        assert bench.source.counts == []
        await bench.promote(threshold=0.8)
        await bench.until(lambda: "f1" in bench.outcomes())
        assert bench.worker.threshold == 0.8
        await bench.promote("sha256:three", threshold=0.1)
        await bench.until(lambda: not bench.worker.live)
        assert bench.worker.threshold == 0.5
        reads = len(bench.source.counts)
        await bench.admit("f2")
        await bench.promote("sha256:four")
        await bench.until(lambda: bench.worker._route is not None and bench.worker._route.live.digest == "sha256:four")
        assert len(bench.source.counts) <= reads + 1
    assert bench.outcomes()["f1"].verdict.label == types_pb2.LABEL_NORMAL


async def test_a_frame_in_hand_when_another_version_becomes_live_keeps_the_threshold_it_was_read_under() -> None:
    bench = Bench()
    bench.pipeline.let.clear()
    await bench.admit("f1")
    await bench.promote(threshold=0.8)
    async with working(bench):
        await bench.until(lambda: bench.pipeline.running == 1)
        await bench.promote("sha256:three")
        await bench.until(lambda: not bench.worker.live)
        bench.pipeline.let.set()
        await bench.until(lambda: "f1" in bench.outcomes())
    assert bench.outcomes()["f1"].verdict.threshold == pytest.approx(0.8)


async def test_a_candidate_tells_shadow_with_small_pictures_and_nobody_else() -> None:
    bench = Bench()
    await bench.compare(threshold=0.8)
    await bench.admit("f1")
    async with working(bench):
        await bench.until(lambda: len(bench.shadow.emitted) == 1)
        assert (bench.worker.role, bench.worker.threshold) == (Role.CANDIDATE, 0.8)
    (told,) = await bench.shown()
    verdict = types_pb2.Outcome.FromString(told.outcome).verdict
    assert (told.candidate, told.frame_id, verdict.model, verdict.score) == (True, "f1", VERSION, 0.75)
    assert verdict.label == types_pb2.LABEL_NORMAL
    assert (verdict.anomaly_map.width, verdict.anomaly_map.data[1:4]) == (8, b"PNG")
    assert verdict.mask.data[1:4] == b"PNG"
    assert types_pb2.FrameHeader.FromString(told.header).frame_id == "f1"
    assert bench.source.emitted == []
    depth = await bench.streams.queue.depth(M)
    assert (depth.unjudged, depth.unstored) == (1, 0)


async def test_live_gives_shadow_small_pictures_and_storage_none_while_a_candidate_is_compared() -> None:
    bench = Bench()
    live, candidate = Live(2, VERSION.digest), Candidate(3, "sha256:three")
    await bench.streams.routing.write(M, live=live, candidate=candidate)
    await bench.admit("f1")
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 1)
    (emission,) = bench.source.emitted
    assert not types_pb2.Outcome.FromString(emission.outcome).verdict.HasField("anomaly_map")
    assert emission.reply is emission.outcome
    (told,) = await bench.shown()
    assert not told.candidate
    assert types_pb2.Outcome.FromString(told.outcome).verdict.anomaly_map.width == 8


async def test_a_candidate_judges_its_sample_alone() -> None:
    bench = Bench()
    await bench.compare(fraction=0.5)
    names = [f"f{index}" for index in range(20)]
    for name in names:
        await bench.admit(name)
    async with working(bench):
        await bench.until(lambda: len(bench.shadow.emitted) == 20)
    sample = [name for name in names if sampled(name, 0.5)]
    assert [told.frame_id for told in await bench.shown()] == sample
    assert len(bench.pipeline.judged) == len(sample) < 20


async def test_what_a_candidate_can_not_judge_is_told_to_shadow_and_dead_for_nobody() -> None:
    bench = Bench()
    await bench.compare()
    await bench.admit("f1", b"nan")
    async with working(bench):
        await bench.until(lambda: len(bench.shadow.emitted) == 1)
    (told,) = await bench.shown()
    assert reason(types_pb2.Outcome.FromString(told.outcome)) == "SCORE_NOT_FINITE"
    assert bench.streams.state(M).dead == []


async def test_a_promoted_candidate_goes_on_as_live_with_every_frame_live_had_left() -> None:
    bench = Bench()
    await bench.compare()
    await bench.admit_many(3)
    async with working(bench):
        await bench.until(lambda: len(bench.shadow.emitted) == 3)
        assert bench.pipeline.aside
        await bench.promote()
        await bench.until(lambda: len(bench.source.emitted) == 3)
        assert not bench.pipeline.aside
    assert sorted(bench.outcomes()) == ["f0", "f1", "f2"]


async def test_lives_frames_do_not_wait_for_the_read_of_a_candidate_that_is_promoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK_MS", 3_000)
    bench = Bench()
    await bench.compare()
    async with working(bench):
        await bench.admit("before")
        await bench.until(lambda: len(bench.shadow.emitted) == 1)
        await bench.promote()
        began = time.monotonic()
        await bench.until(lambda: len(bench.source.emitted) == 1)
        assert time.monotonic() - began < 1


async def test_no_more_than_prefetch_is_ever_in_hand() -> None:
    bench = Bench(prefetch=3)
    bench.pipeline.let.clear()
    await bench.admit_many(10)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bench.pipeline.running == 3)
        assert (await bench.streams.queue.depth(M)).unjudged == 10
        assert len(bench.streams.state(M).pending) == 3
        bench.pipeline.let.set()
        await bench.until(lambda: len(bench.source.emitted) == 10)
    assert sorted(bench.outcomes()) == [f"f{index}" for index in range(10)]
    assert max(bench.source.counts) == 3


async def test_with_much_to_do_half_a_hand_is_read_at_once() -> None:
    bench = Bench(prefetch=4)
    await bench.admit_many(20)
    judge, turn = bench.pipeline.judge, asyncio.Lock()

    async def one_by_one(image: bytes, *, pictures: bool) -> Judged:
        async with turn:
            await asyncio.sleep(0.002)
            return await judge(image, pictures=pictures)

    bench.pipeline.judge = one_by_one  # type: ignore[method-assign]
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 20)
    assert min(bench.source.counts) == 2


@pytest.mark.parametrize(("frame_s", "expected"), [(0.001, 8), (0.05, 4), (1.0, 2)])
async def test_of_large_frames_no_more_are_in_hand_than_is_little_work(frame_s: float, expected: int) -> None:
    bench = Bench(prefetch=8, hand_s=0.2)
    bench.pipeline.frame_s = frame_s
    await bench.promote()
    async with working(bench):
        await bench.admit_many(60)
        await bench.until(lambda: len(bench.outcomes()) == 60)
        bench.pipeline.let.clear()
        for index in range(20):
            await bench.admit(f"g{index}")
        # More than half: the next half is read where there is room for it.
        await bench.until(lambda: bench.pipeline.running > expected // 2)
        await asyncio.sleep(0.1)  # that no more are taken shows only by waiting a moment
        assert bench.pipeline.running <= expected
        bench.pipeline.let.set()
        await bench.until(lambda: len(bench.outcomes()) == 80)


async def test_what_is_ready_together_is_emitted_together() -> None:
    bench = Bench(prefetch=4)
    bench.pipeline.let.clear()
    await bench.admit_many(4)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bench.pipeline.running == 4)
        bench.pipeline.let.set()
        await bench.until(lambda: len(bench.source.emitted) == 4)
    assert bench.source.groups == [4]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        # In twos, a quarter of a full hand; the last, with less than that in hand, at once.
        (6, [0, 2, 2, 4, 5, 6]),
        # More waits than a hand holds: in fours, half of a full one.
        (20, [0, 0, 0, 4, 4, 4, 4, 8]),
    ],
)
async def test_verdicts_wait_for_company_only_while_there_is_much_to_do(frames: int, expected: list[int]) -> None:
    pipeline = SteppedPipeline()
    bench = Bench(prefetch=8, pipeline=pipeline)
    for number in range(frames):
        await bench.admit(f"f{number}")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.worker._in_hand) == min(frames, 8))
        after = []
        for _ in expected:
            await pipeline.step()
            after.append(len(bench.source.emitted))
        assert after == expected
        for _ in range(frames - len(expected)):
            pipeline.tickets.release()
        await bench.until(lambda: len(bench.source.emitted) == frames)


async def test_a_bad_image_is_dead_with_its_reason_and_the_stream_goes_on() -> None:
    bench = Bench()
    await bench.admit("f1", b"bad")
    await bench.admit("f2", b"0.25")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 2)
    found = bench.outcomes()
    assert reason(found["f1"]) == "IMAGE_TRUNCATED"
    assert found["f2"].verdict.label == types_pb2.LABEL_NORMAL
    assert bench.streams.state(M).dead == [("f1", "IMAGE_TRUNCATED")]


async def test_a_score_that_is_no_number_is_dead_and_no_verdict() -> None:
    bench = Bench()
    await bench.admit("f1", b"nan")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 1)
    assert reason(bench.outcomes()["f1"]) == "SCORE_NOT_FINITE"


async def test_a_frame_that_others_left_is_taken_over() -> None:
    bench = Bench(claim_idle_ms=30)
    await bench.admit("f1")
    await bench.streams.source(M, "died").read(count=1, block_ms=0)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: "f1" in bench.outcomes())


async def test_a_frame_that_others_hold_is_left_to_them_for_as_long_as_this_model_takes() -> None:
    bench = Bench(claim_idle_ms=30, prefetch=4)
    bench.pipeline.frame_s = 0.05
    await bench.admit("held")
    await bench.streams.source(M, "slow").read(count=1, block_ms=0)
    held = time.monotonic()
    await bench.admit("ours")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: "ours" in bench.outcomes())
        await bench.until(lambda: "held" in bench.outcomes())
    # A full hand of four takes 0.2 s, and four times that is patience enough.
    assert time.monotonic() - held >= 0.75


async def test_a_worker_that_has_judged_nothing_yet_leaves_others_their_frames_for_as_long() -> None:
    bench = Bench(claim_idle_ms=30, prefetch=4, frame_s=0.05)
    await bench.admit("held")
    await bench.streams.source(M, "slow").read(count=1, block_ms=0)
    held = time.monotonic()
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: "held" in bench.outcomes())
    assert time.monotonic() - held >= 0.75


async def test_a_frame_that_always_breaks_the_run_dies_after_three_deliveries() -> None:
    bench = Bench(claim_idle_ms=30)
    await bench.admit("f1", b"broken")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.source.emitted) == 1)
    assert reason(bench.outcomes()["f1"]) == "MAX_DELIVERIES"
    assert bench.pipeline.judged == [b"broken"] * 3


async def test_a_header_that_is_rubbish_costs_no_room() -> None:
    bench = Bench(prefetch=1)
    for index in range(3):
        await bench.admit(f"bad{index}", header=b"\xff\xff")
    await bench.admit("good")
    # The fake keeps what it knows by the header's frame id, which here is none.
    bench.streams.state(M).known[""] = bench.streams.state(M).known["bad0"]
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: "good" in bench.outcomes())
    assert [one.dead_reason for one in bench.source.emitted[:3]] == ["HEADER_UNREADABLE"] * 3


async def test_our_own_frame_that_takes_long_is_not_judged_twice() -> None:
    bench = Bench(claim_idle_ms=15)
    bench.pipeline.let.clear()
    await bench.admit("f1")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bench.source.claims > 3)
        assert [one.deliveries for one in bench.streams.state(M).pending.values()] == [1]
        assert bench.pipeline.running == 1
        bench.pipeline.let.set()
        await bench.until(lambda: "f1" in bench.outcomes())
    assert bench.pipeline.judged == [b"0.75"]


async def test_our_own_frame_that_takes_long_to_come_is_not_claimed_meanwhile() -> None:
    bench = Bench(claim_idle_ms=15)
    read, came = bench.source.read, asyncio.Event()

    async def slowly(*, count: int, block_ms: int) -> list[QueuedFrame]:
        frames = await read(count=count, block_ms=block_ms)
        if frames:
            await came.wait()
        return frames

    bench.source.read = slowly  # type: ignore[method-assign]
    await bench.admit("f1")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bool(bench.streams.state(M).pending))
        await asyncio.sleep(0.1)  # that it is not taken shows only by waiting a moment
        assert [one.deliveries for one in bench.streams.state(M).pending.values()] == [1]
        came.set()
        await bench.until(lambda: "f1" in bench.outcomes())
    assert bench.pipeline.judged == [b"0.75"]


async def test_what_a_stuck_worker_holds_another_one_takes_and_the_stuck_one_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(claim_idle_ms=15)
    bench.pipeline.let.clear()
    await bench.admit("f1")
    await bench.promote()
    task = asyncio.create_task(bench.worker.run(bench.stop))
    other = bench.streams.source(M, "other")
    async with asyncio.timeout(DEADLINE_S):
        while not (taken := await other.claim(min_idle_ms=15, count=1)):
            await asyncio.sleep(0.005)
    assert taken[0].deliveries == 2
    monkeypatch.setattr(module, "HUNG_S", 0.05)
    monkeypatch.setattr(module, "DRAIN_S", 0.05)
    with pytest.raises(RuntimeError, match="does not end"):
        await asyncio.wait_for(task, DEADLINE_S)


async def test_large_pictures_leave_one_at_a_time_and_nothing_is_read_beside_many_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "EMIT_BYTES", 1)
    monkeypatch.setattr(outbox_module, "OUTBOX_BYTES", 1)
    bench = Bench(prefetch=4)
    bench.source.away = True
    await bench.admit_many(6)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bool(bench.streams.state(M).pending) and not bench.pipeline.running)
        reads = len(bench.source.counts)
        await asyncio.sleep(0.05)
        assert len(bench.source.counts) == reads
        bench.source.away = False
        await bench.until(lambda: len(bench.source.emitted) == 6)
    assert set(bench.source.groups) == {1}


async def test_verdicts_wait_for_redis_and_are_not_made_again() -> None:
    bench = Bench(claim_idle_ms=15)
    bench.source.away = True
    await bench.admit_many(3)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bench.source.claims > 3)
        bench.source.away = False
        await bench.until(lambda: len(bench.source.emitted) == 3)
    assert len(bench.pipeline.judged) == 3
    assert (await bench.streams.queue.depth(M)).unjudged == 0


async def test_verdicts_that_can_not_leave_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "OUTBOX_AT_MOST", 4)
    bench = Bench(prefetch=2)
    bench.source.away = True
    await bench.admit_many(20)
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: len(bench.pipeline.judged) >= 4)
        await asyncio.sleep(0.1)  # that no more are taken shows only by waiting a moment
        assert len(bench.pipeline.judged) <= 4 + 2
        bench.source.away = False
        await bench.until(lambda: len(bench.source.emitted) == 20)


async def test_stopping_finishes_what_is_in_hand_and_takes_no_more() -> None:
    bench = Bench(prefetch=2)
    bench.pipeline.let.clear()
    await bench.admit_many(6)
    await bench.promote()
    async with working(bench) as task:
        await bench.until(lambda: bench.pipeline.running == 2)
        bench.stop.set()
        await bench.until(lambda: not bench.worker.live)
        assert not task.done()
        bench.pipeline.let.set()
        await asyncio.wait_for(task, DEADLINE_S)
    assert sorted(bench.outcomes()) == ["f0", "f1"]
    assert bench.streams.state(M).pending == {}


async def test_stopping_waits_for_a_frame_in_hand_though_there_is_room_for_more() -> None:
    bench = Bench(prefetch=4)
    bench.pipeline.let.clear()
    await bench.admit("f1")
    await bench.promote()
    async with working(bench) as task:
        await bench.until(lambda: bench.pipeline.running == 1)
        bench.stop.set()
        await asyncio.wait([task], timeout=0.2)
        assert not task.done()
        bench.pipeline.let.set()
    assert "f1" in bench.outcomes()


async def test_stopping_without_redis_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)
    bench = Bench()
    bench.source.away = True
    await bench.admit("f1")
    await bench.promote()
    async with working(bench):
        await bench.until(lambda: bench.pipeline.judged == [b"0.75"])
    assert bench.source.emitted == []


async def test_a_step_that_breaks_for_good_ends_the_worker_instead_of_idling() -> None:
    bench = Bench()
    bench.source.broken = True
    await bench.admit("f1")
    await bench.promote()
    task = asyncio.create_task(bench.worker.run(bench.stop))
    await asyncio.wait([task], timeout=DEADLINE_S)
    with pytest.raises(ValueError, match="makes no sense"):
        task.result()
