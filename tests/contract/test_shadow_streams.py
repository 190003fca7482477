"""What shadow needs of the backbone, of the memory fake and of a real Valkey alike."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from vigil_common.streams import memory, redis_frames, redis_shadow
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Admission, Candidate, Disagreed, Emission, Live, ReportStep, Route, sampled
from vigil_common.streams.redis import RedisStreams

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vigil_common.streams.ports import QueuedFrame, QueuedOutcome

M = "cells"
BUDGET = 100_000
LIVE, CANDIDATE = Live(1, "sha256:1"), Candidate(2, "sha256:2")
Streams = MemoryStreams | RedisStreams


async def compare(streams: Streams, fraction: float = 1.0) -> Route:
    return await streams.routing.write(M, live=LIVE, candidate=replace(CANDIDATE, sample_fraction=fraction))


async def admit(streams: Streams, *frame_ids: str, size: int = 1000) -> None:
    for frame_id in frame_ids:
        image = b"x" * size
        await streams.queue.admit(M, frame_id=frame_id, sha256=b"s", header=b"h", image=image, reply_to="")


async def judge(streams: Streams, *frame_ids: str) -> None:
    """Live judges the next frames, which are these."""
    source = streams.source(M, "live")
    frames = await source.read(count=len(frame_ids), block_ms=100)
    assert len(frames) == len(frame_ids)
    outcomes = [
        Emission(frame.entry_id, frame_id, b"o", b"o", compared=b"live " + frame_id.encode())
        for frame, frame_id in zip(frames, frame_ids, strict=True)
    ]
    assert all(await source.emit(outcomes))


async def store(streams: Streams) -> int:
    """Storage confirms everything there is; how many frames went."""
    outcomes = streams.outcomes(M, "s")
    await outcomes.done(await outcomes.read(count=5000, block_ms=10))
    return await outcomes.trim()


def shadow_may_hold(monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    """The queue holds no more than these for shadow's sake alone."""
    for module in (memory, redis_frames):
        monkeypatch.setattr(module, "SHADOW_FRAMES_AT_MOST", frames)


def shown(frame: QueuedFrame, frame_id: str) -> Emission:
    return Emission(frame.entry_id, frame_id, b"candidate " + frame_id.encode(), b"", header=frame.header)


async def skipped(streams: Streams, route: Route) -> int:
    return int((await streams.reports.fields(M, str(route.comparison))).get("skipped", "0"))


async def test_both_verdicts_of_a_frame_reach_shadow_numbered_and_only_live_s_reaches_storage(streams: Streams) -> None:
    route = await compare(streams)
    await admit(streams, "f1")
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    (frame,) = await candidate.read(count=10, block_ms=100)
    assert await candidate.emit([shown(frame, "f1")]) == [True]
    assert await candidate.emit([shown(frame, "f1")]) == [False]
    await judge(streams, "f1")
    first, second = await streams.verdicts(M, "v").read("0-0", count=10, block_ms=100)
    assert (first.candidate, first.outcome, first.header) == (True, b"candidate f1", b"h")
    assert (second.candidate, second.outcome, second.frame_id) == (False, b"live f1", "f1")
    assert (first.number, second.number) == (1, 2)
    assert {first.comparison, second.comparison} == {route.comparison}
    outcomes = await streams.outcomes(M, "s").read(count=10, block_ms=100)
    assert [outcome.outcome for outcome in outcomes] == [b"o"]


async def test_without_a_candidate_nothing_goes_to_shadow(streams: Streams) -> None:
    await streams.routing.write(M, live=LIVE)
    await admit(streams, "f1")
    await judge(streams, "f1")
    assert await streams.verdicts(M, "v").read("0-0", count=10, block_ms=10) == []


async def test_frames_admitted_before_the_comparison_are_in_neither_side(streams: Streams) -> None:
    await streams.routing.write(M, live=LIVE)
    await admit(streams, "before")
    await compare(streams)
    await admit(streams, "after")
    frames = await streams.candidate(M, "c", CANDIDATE.digest).read(count=10, block_ms=100)
    assert len(frames) == 1
    await judge(streams, "before", "after")
    verdicts = await streams.verdicts(M, "v").read("0-0", count=10, block_ms=100)
    assert [verdict.frame_id for verdict in verdicts] == ["after"]


async def test_the_sample_is_the_same_for_both_sides_and_grows_into_larger_ones(streams: Streams) -> None:
    names = [f"frame-{index}" for index in range(60)]
    tenth, half = ({name for name in names if sampled(name, part)} for part in (0.1, 0.5))
    assert 0 < len(tenth) < len(half) < len(names)
    assert tenth < half
    await compare(streams, 0.5)
    await admit(streams, *names, size=100)
    await judge(streams, *names)
    verdicts = await streams.verdicts(M, "v").read("0-0", count=100, block_ms=100)
    assert {verdict.frame_id for verdict in verdicts} == half


async def test_a_version_that_is_no_candidate_any_more_tells_shadow_nothing(streams: Streams) -> None:
    await compare(streams)
    await admit(streams, "f1")
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    (frame,) = await candidate.read(count=1, block_ms=100)
    await streams.routing.write(M, live=LIVE, candidate=Candidate(3, "sha256:3"))
    await candidate.emit([shown(frame, "f1")])
    await streams.routing.write(M, live=LIVE)
    assert await candidate.emit([shown(frame, "f1")]) == [False]
    assert await candidate.read(count=1, block_ms=10) == []
    assert await streams.verdicts(M, "v").read("0-0", count=10, block_ms=10) == []


async def test_frames_that_the_candidate_has_yet_to_judge_wait_for_it(streams: Streams) -> None:
    route = await compare(streams)
    await admit(streams, "f1", "f2")
    await judge(streams, "f1", "f2")
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    (first,) = await candidate.read(count=1, block_ms=100)
    assert await store(streams) == 0
    await candidate.emit([shown(first, "f1")])
    assert await store(streams) == 1
    (second,) = await candidate.read(count=1, block_ms=100)
    assert second.image == b"x" * 1000
    assert await skipped(streams, route) == 0


@pytest.mark.parametrize("by", ["frames", "bytes"])
async def test_a_candidate_far_behind_goes_on_where_live_is_and_the_skipped_are_counted(
    streams: Streams, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "frames":
        shadow_may_hold(monkeypatch, 5)
    names = [f"f{index}" for index in range(8)]
    route = await compare(streams)
    await admit(streams, *names, size=1000 if by == "frames" else 7000)
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    held = await candidate.read(count=2, block_ms=100)
    await judge(streams, *names[:6])
    assert await store(streams) == 6
    assert await skipped(streams, route) == 6
    assert await candidate.emit([shown(held[0], "f0")]) == [False]
    assert await candidate.claim(min_idle_ms=0, count=10) == []
    assert len(await candidate.read(count=10, block_ms=100)) == 2
    await store(streams)
    assert await skipped(streams, route) == 6
    # Live is as it would be without: it finds what it has yet to judge.
    await judge(streams, *names[6:])


async def test_a_candidate_moved_to_the_first_frame_of_a_millisecond_harms_nobody(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_may_hold(monkeypatch, 2)
    names = [f"f{index}" for index in range(6)]
    route = await compare(streams)
    for name in names:
        await admit(streams, name)
        await asyncio.sleep(0.003)  # so that each is the first of its millisecond
    await judge(streams, *names[:5])
    outcomes = streams.outcomes(M, "s")
    done = await outcomes.read(count=10, block_ms=100)
    await outcomes.done(done[:4])
    assert await outcomes.trim() == 4  # up to the fifth, which storage has yet to write
    assert await skipped(streams, route) == 4
    # It stands still there while others go on.
    assert await outcomes.trim() == 0
    await outcomes.done(done[4:])
    assert await outcomes.trim() == 0
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    assert len(await candidate.read(count=10, block_ms=100)) == 2
    assert await skipped(streams, route) == 4


async def test_a_candidate_that_holds_every_frame_costs_live_none(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_may_hold(monkeypatch, 5)
    names = [f"f{index}" for index in range(8)]
    route = await compare(streams)
    await admit(streams, *names)
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    held = await candidate.read(count=8, block_ms=100)
    await judge(streams, *names[:6])
    assert await store(streams) == 6
    assert await skipped(streams, route) == 6
    assert (await streams.queue.depth(M)).frames == 2
    await judge(streams, *names[6:])
    assert await candidate.emit([shown(frame, name) for frame, name in zip(held, names, strict=True)]) == [
        *[False] * 6,
        *[True] * 2,
    ]
    assert await store(streams) == 2


async def test_a_backlog_of_live_makes_the_candidate_skip_nothing(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_may_hold(monkeypatch, 5)
    names = [f"f{index}" for index in range(20)]
    route = await compare(streams)
    await admit(streams, *names)
    candidate = streams.candidate(M, "c", CANDIDATE.digest)
    await judge(streams, *names[:4])
    assert await store(streams) == 0
    assert len(await candidate.read(count=100, block_ms=100)) == 20
    assert await skipped(streams, route) == 0


class Everyone:
    """All who work on a model's frames, each doing some of its work when told to."""

    def __init__(self, streams: Streams, rng: random.Random) -> None:
        self.streams = streams
        self.rng = rng
        self.sides = {"live": streams.source(M, "live"), "candidate": streams.candidate(M, "c", CANDIDATE.digest)}
        self.outcomes = streams.outcomes(M, "s")
        self.in_hand: dict[str, list[QueuedFrame]] = {"live": [], "candidate": []}
        self.in_storage: list[QueuedOutcome] = []
        self.done = dict.fromkeys(("admitted", "live", "candidate", "stored"), 0)

    async def admit(self, most: int) -> None:
        for _ in range(most):
            name = b"%d" % self.done["admitted"]
            admission = await self.streams.queue.admit(
                M, frame_id=name.decode(), sha256=name, header=name, image=b"x" * 1000, reply_to=""
            )
            self.done["admitted"] += admission.state is Admission.ADMITTED

    async def read(self, side: str, most: int) -> None:
        self.in_hand[side] += await self.sides[side].read(count=most, block_ms=1)

    async def emit(self, side: str, most: int) -> None:
        self.rng.shuffle(self.in_hand[side])
        frames = [self.in_hand[side].pop() for _ in range(min(most, len(self.in_hand[side])))]
        won = await self.sides[side].emit([Emission(f.entry_id, f.header.decode(), b"o", b"o") for f in frames])
        assert side == "candidate" or all(won)
        self.done[side] += sum(won)

    async def store(self, most: int) -> None:
        self.in_storage += await self.outcomes.read(count=most, block_ms=1)
        self.rng.shuffle(self.in_storage)
        found = [self.in_storage.pop() for _ in range(min(most, len(self.in_storage)))]
        assert all(one.frame is not None and one.frame.image == b"x" * 1000 for one in found)
        await self.outcomes.done(found)
        self.done["stored"] += len(found)


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_the_candidate_does_live_and_storage_get_every_frame(
    streams: Streams, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow_may_hold(monkeypatch, 6)
    rng = random.Random(seed)
    route = await compare(streams)
    everyone = Everyone(streams, rng)
    works: list[Callable[[int], Awaitable[object]]] = [
        everyone.admit,
        lambda most: everyone.read("live", most),
        lambda most: everyone.emit("live", most),
        everyone.store,
        lambda _: everyone.outcomes.trim(),
        lambda most: everyone.read("candidate", most),
        lambda most: everyone.emit("candidate", most),
    ]
    for _ in range(150):
        await rng.choices(works, [3, 3, 3, 3, 3, 2, 1])[0](rng.randint(1, 4))
    for work in works[1:]:
        await work(1000)
    done = everyone.done
    assert done["live"] == done["stored"] == done["admitted"] > 50
    assert done["candidate"] + await skipped(streams, route) == done["admitted"]
    await everyone.outcomes.trim()
    assert (await streams.queue.depth(M)).frames == 0


async def test_a_step_counts_once_however_often_it_is_tried(streams: Streams) -> None:
    await compare(streams)
    step = ReportStep(
        *("0-0", "5-0", 7, {"pairs": 3}, {"greatest": 9}, {"fact": "a b"}, {"1:2": 3}, {"f1": b"l"}),
        comparisons=(b"one",),
    )
    assert await streams.reports.commit(M, "1", step)
    assert not await streams.reports.commit(M, "1", step)
    after = ReportStep("5-0", "6-0", 8, {"pairs": 1}, {"greatest": 4}, {}, {"1:2": 1}, {"f1": b"", "f2": b"c"})
    assert await streams.reports.commit(M, "1", after)
    fields = await streams.reports.fields(M, "1")
    assert (fields["pairs"], fields["greatest"], fields["fact"]) == ("4", "9", "a b")
    assert await streams.reports.joint(M, "1") == {"1:2": 4}
    place = await streams.reports.place(M, "1")
    assert (place.place, place.number, place.open) == ("6-0", 8, {"f2": b"c"})
    comparisons = streams.comparisons(M)
    ((entry, blob),) = await comparisons.read(count=10, block_ms=100)
    assert blob == b"one"
    assert await comparisons.read(count=10, block_ms=0) == []
    assert await comparisons.read(count=10, block_ms=0, pending=True) == [(entry, b"one")]
    await comparisons.done([entry])
    assert await comparisons.read(count=10, block_ms=0, pending=True) == []


async def test_open_frames_of_any_name_and_state_come_back_and_go(streams: Streams) -> None:
    states = {"plain": b"p1:0:", "two words": b"p2:0:", "payload": bytes(range(256)), "new\nline": b"l3"}
    assert await streams.reports.commit(M, "1", ReportStep("0-0", "1-0", 1, open=states))
    assert (await streams.reports.place(M, "1")).open == states
    assert await streams.reports.commit(M, "1", ReportStep("1-0", "2-0", 2, open=dict.fromkeys(states, b"")))
    assert (await streams.reports.place(M, "1")).open == {}


async def test_comparisons_come_back_each_for_itself_whatever_their_bytes(streams: Streams) -> None:
    await compare(streams)
    blobs = (b"1 2", bytes(range(256)), b"\x00", b"x" * 1000)
    assert await streams.reports.commit(M, "1", ReportStep("0-0", "1-0", 1, comparisons=blobs))
    assert tuple(blob for _, blob in await streams.comparisons(M).read(count=10, block_ms=100)) == blobs


async def test_reports_of_different_runs_are_apart_and_a_replay_has_its_own_place(streams: Streams) -> None:
    await streams.reports.begin(M, "replay-a", {"candidate_version": "2", "pairs": "0"})
    assert await streams.reports.commit(M, "replay-a", ReportStep("0-0", "9-0", 0, {"pairs": 1}))
    await streams.reports.begin(M, "replay-a", {"candidate_version": "3", "pairs": "0"})
    assert (await streams.reports.fields(M, "replay-a")) == {"candidate_version": "2", "pairs": "1"}
    assert (await streams.reports.place(M, "replay-a")).place == "9-0"
    assert (await streams.reports.place(M, "7")).place == "0-0"
    assert await streams.reports.fields(M, "7") == {}


async def test_the_worst_disagreements_come_first_and_only_so_many_are_kept(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, redis_shadow):
        monkeypatch.setattr(module, "DISAGREEMENTS_AT_MOST", 3)
    found = [Disagreed(f"f{index}", severity, b"%d" % index) for index, severity in enumerate((0.1, 0.9, 0.5, 0.7))]
    assert await streams.reports.commit(M, "1", ReportStep("0-0", "1-0", 1, disagreements=found))
    assert await streams.reports.worst(M, "1", start=0, count=2) == [b"1", b"3"]
    assert await streams.reports.worst(M, "1", start=2, count=2) == [b"2"]


async def test_a_comparison_says_what_it_compares_and_is_found_when_it_has_ended(streams: Streams) -> None:
    assert await streams.reports.latest(M) is None
    route = await compare(streams, 0.5)
    run = await streams.reports.latest(M)
    assert run == str(route.comparison)
    fields = await streams.reports.fields(M, run)
    assert (fields["live_version"], fields["candidate_digest"], fields["sample_fraction"]) == ("1", "sha256:2", "0.5")
    await streams.routing.write(M, live=LIVE)
    assert await streams.reports.latest(M) == run


async def test_one_shadow_owns_a_model_at_a_time(streams: Streams) -> None:
    first, second = streams.verdicts(M, "a"), streams.verdicts(M, "b")
    assert await first.own(ttl_ms=10_000)
    assert not await second.own(ttl_ms=10_000)
    await first.close()
    assert await second.own(ttl_ms=10_000)


async def test_verdicts_that_fell_off_show_as_a_gap_in_the_numbers(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, redis_frames):
        monkeypatch.setattr(module, "SHADOW_VERDICTS_AT_MOST", 4)
    await compare(streams)
    names = [f"f{index}" for index in range(10)]
    await admit(streams, *names, size=100)
    await judge(streams, *names)
    found = await streams.verdicts(M, "v").read("0-0", count=100, block_ms=100)
    assert [verdict.number for verdict in found] == [7, 8, 9, 10]
