"""The shadow service without transport: comparers on the streams, reviews, replays, and the page made of a report."""

from __future__ import annotations

import asyncio
import io
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from vigil.shadow.v1 import shadow_pb2
from vigil_cli.shadow_html import render
from vigil_common.errors import Conflict, InvalidInput, NotFound, Unavailable
from vigil_common.evidence import Gates, Outcome
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Candidate, Emission, Live
from vigil_shadow import convert
from vigil_shadow import replay as module
from vigil_shadow.app import Shadow
from vigil_shadow.comparer import Comparer, ComparerOptions
from vigil_shadow.domain import Failed, Origin, Said
from vigil_shadow.ports import StoredFrame, StoredRange
from vigil_shadow.replay import ReplayRequest, replay

from tests.support.shadow import CANDIDATE, LIVE, MODEL, Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_common.streams.ports import FrameSource
    from vigil_shadow.report import Report

DEADLINE_S = 10
OPTIONS = ComparerOptions(batch_size=7, lease_ms=200)


class Bench:
    """Streams with both workers' sides, played by the test."""

    def __init__(self) -> None:
        self.streams = MemoryStreams()

    async def compare(self, candidate: str = CANDIDATE) -> str:
        route = await self.streams.routing.write(MODEL, live=Live(1, LIVE), candidate=Candidate(2, candidate))
        return str(route.comparison)

    async def judge(self, *pairs: tuple[float | None, float | None], side: int = 0) -> None:
        names = [f"f{self.streams.state(MODEL).last_id + index}" for index in range(len(pairs))]
        for name in names:
            await self.streams.queue.admit(MODEL, frame_id=name, sha256=b"s", header=b"", image=b"i", reply_to="")
        await self._emit(self.streams.source(MODEL, "l"), names, [one for one, _ in pairs], side, candidate=False)
        await self._emit(
            self.streams.candidate(MODEL, "c", CANDIDATE), names, [one for _, one in pairs], side, candidate=True
        )

    @staticmethod
    async def _emit(
        source: FrameSource, names: list[str], scores: list[float | None], side: int, *, candidate: bool
    ) -> None:
        frames = await source.read(count=len(names), block_ms=100)
        answers = [Answer(name, candidate, score, side=side) for name, score in zip(names, scores, strict=True)]
        assert all(
            await source.emit(
                [
                    Emission(frame.entry_id, answer.frame_id, answer.outcome(), b"", header=answer.header())
                    for frame, answer in zip(frames, answers, strict=True)
                ]
            )
        )

    async def frames(self, run: str) -> int:
        return int((await self.streams.reports.fields(MODEL, run)).get("frames", "0"))

    async def until(self, run: str, frames: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await self.frames(run) < frames:
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def comparing(self, consumer: str = "one") -> AsyncIterator[asyncio.Task[None]]:
        stop = asyncio.Event()
        comparer = Comparer(MODEL, self.streams.verdicts(MODEL, consumer), self.streams.reports, OPTIONS)
        task = asyncio.create_task(comparer.run(stop))
        yield task
        stop.set()
        await asyncio.wait([task])

    def app(self, reviews: FakeReviews | None = None) -> Shadow:
        def no_judge(address: str) -> FakeJudge:
            raise AssertionError(address)

        return Shadow(self.streams.reports, self.streams.routing, reviews, None, no_judge)


class FakeReviews:
    def __init__(self, candidate_right: int, live_right: int) -> None:
        self._counts = candidate_right, live_right

    async def counts(self, report: Report) -> tuple[int, int]:
        assert report.count("new_alarms") + report.count("new_misses")
        return self._counts


async def test_a_comparer_follows_from_one_comparison_to_the_next() -> None:
    bench = Bench()
    async with bench.comparing():
        first = await bench.compare()
        await bench.judge(*[(0.1, 0.9)] * 20)
        await bench.until(first, 20)
        second = str(
            (
                await bench.streams.routing.write(MODEL, live=Live(1, LIVE), candidate=Candidate(2, CANDIDATE, 0.4))
            ).comparison
        )
        await bench.judge(*[(0.1, 0.1)] * 15)
        await bench.until(second, 15)
    assert (await bench.frames(first), await bench.frames(second)) == (20, 15)


async def test_a_second_comparer_takes_over_from_one_that_died_and_counts_nothing_twice() -> None:
    bench = Bench()
    run = await bench.compare()
    async with bench.comparing("first") as first:
        await bench.judge(*[(0.1, 0.2)] * 20)
        await bench.until(run, 20)
        first.cancel()
    bench.streams.state(MODEL).shadow_owner = "first"  # it had no time to give the lease back
    async with bench.comparing("second"):
        await bench.judge(*[(0.1, 0.2)] * 20)
        await bench.until(run, 40)
    assert await bench.frames(run) == 40


async def test_two_that_think_they_own_the_report_still_count_each_frame_once() -> None:
    bench = Bench()
    run = await bench.compare()
    async with bench.comparing("first"), bench.comparing("second"):
        for _ in range(10):
            bench.streams.state(MODEL).shadow_owner = ""
            await bench.judge(*[(0.1, 0.2)] * 10)
        await bench.until(run, 100)
    assert await bench.frames(run) == 100


async def test_what_people_said_decides_and_without_disagreements_nobody_is_asked() -> None:
    bench = Bench()
    run = await bench.compare()
    async with bench.comparing():
        await bench.judge(*[(0.1, 0.2)] * 5)
        await bench.until(run, 5)
        report, active = await bench.app(FakeReviews(0, 50)).report(MODEL, "")
        assert (active, report.live_right) == (True, 0)
        await bench.judge((0.1, 0.9))
        await bench.until(run, 6)
    app = bench.app(FakeReviews(1, 20))
    report, _ = await app.report(MODEL, run)
    decision = app.decide(report, Gates())
    assert decision.overall is Outcome.FAIL
    assert "people found the candidate right in 1 of 21" in decision.reason


async def test_without_a_comparison_there_is_no_report() -> None:
    for model, run in ((MODEL, ""), (MODEL, "77"), (MODEL, "replay-none")):
        with pytest.raises(NotFound, match="there is no report"):
            await Bench().app().report(model, run)


async def test_the_page_says_everything_and_asks_the_network_for_nothing() -> None:
    bench = Bench()
    run = await bench.compare()
    async with bench.comparing():
        await bench.judge((0.1, 0.9), (0.8, 0.85), (0.2, 0.1), side=16)
        await bench.until(run, 3)
    app = bench.app()
    report, active = await app.report(MODEL, "")
    found = shadow_pb2.GetReportResponse(
        report=convert.report(report, active=active, detail=True),
        decision=convert.decision(app.decide(report, Gates())),
    )
    found.report.model = "<script>"
    details, _ = await app.disagreements(MODEL, "", start=0, size=10)
    worst = [shadow_pb2.Disagreement.FromString(detail) for detail in details]
    deep = io.BytesIO()
    Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(deep, "PNG")
    page = render(found, worst, {worst[0].frame_id: deep.getvalue()})
    tags: dict[str, list[dict[str, str | None]]] = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.setdefault(tag, []).append(dict(attributes))

    Reader().feed(page)
    assert len(tags["svg"]) == 3
    assert "script" not in tags
    assert len(tags["img"]) == 4
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in tags["img"])
    assert {"minFrames", "inconclusive"} <= set(page.replace("<", " ").replace(">", " ").split())
    assert worst[0].frame_id in page


class FakeArchive:
    """Stored frames f0, f1 …, a page token being the next one's number; the third has lost its image."""

    def __init__(self, count: int) -> None:
        self.frames = [
            StoredFrame(f"f{index}", Origin("c1", index), index + 1, Said(LIVE, 1, 0.2, 0.5, anomalous=False))
            for index in range(count)
        ]
        self.asked: list[StoredRange] = []

    async def page(self, model: str, where: StoredRange, *, size: int, token: str) -> tuple[list[StoredFrame], str]:
        assert model == MODEL
        self.asked.append(where)
        start = int(token or 0)
        rest = self.frames[start + size :]
        return self.frames[start : start + size], str(start + size) if rest else ""

    async def image(self, model: str, frame: StoredFrame) -> bytes | None:
        assert model == MODEL
        return None if frame.frame_id == "f2" else frame.frame_id.encode()


class FakeJudge:
    """Every fifth frame is anomalous, every seventh can't be judged; away where asked to be."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.busy = 0
        self.stays_for = 1_000  # images; then another version is at its address

    async def version(self) -> tuple[str, int, str]:
        return MODEL, 2, CANDIDATE

    async def judge(self, frame_id: str, image: bytes) -> Said | Failed:
        assert image == frame_id.encode()
        if self.busy:
            self.busy -= 1
            raise Unavailable("SERVICE_AWAY", "away")
        self.asked.append(frame_id)
        number = int(frame_id[1:])
        if number % 7 == 6:
            return Failed("IMAGE_TRUNCATED")
        anomalous = number % 5 == 0
        digest = CANDIDATE if len(self.asked) <= self.stays_for else "sha256:another"
        return Said(digest, 2, 0.9 if anomalous else 0.1, 0.5, anomalous)

    async def close(self) -> None:
        pass


def asked(**changed: object) -> ReplayRequest:
    given: dict[str, object] = {"where": StoredRange("", 0, 0), "replay_id": "week", "rate": 1000.0, **changed}
    return ReplayRequest(model=MODEL, worker="w:1", version=2, **given)  # type: ignore[arg-type]


async def test_a_replay_counts_each_stored_frame_once_however_often_it_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PAGE", 4)
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)
    streams, archive = MemoryStreams(), FakeArchive(30)
    frames: list[int] = []
    for attempt in range(40):
        judge = FakeJudge()
        pages = replay(asked(), streams.reports, archive, judge, now_us=lambda at=attempt: 1_000 + at)  # type: ignore[misc]
        try:
            async for progress in pages:
                frames.append(progress.frames)
                judge.busy = 100  # away in the next page, for longer than is waited
        except Unavailable:
            continue
        if progress.done:
            break
    fields = await streams.reports.fields(MODEL, "replay-week")
    assert frames == [4, 8, 12, 16, 20, 24, 28, 30]
    assert (fields["replayed"], fields["dropped"], fields["candidate_failed"]) == ("30", "1", "4")
    assert (fields["frames"], fields["new_alarms"]) == ("25", "5")
    report, _ = await Shadow(streams.reports, streams.routing, None, None, lambda _: FakeJudge()).report(MODEL, "week")
    assert report.run == "replay-week", "as it was called when it was asked for"
    # What has no end ends where the first call was made.
    assert {where.stop_us for where in archive.asked} == {1_000}
    assert [progress.done async for progress in replay(asked(), streams.reports, archive, FakeJudge())] == [True]


async def test_a_worker_that_is_busy_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)
    streams, judge = MemoryStreams(), FakeJudge()
    judge.busy = 3
    async for _ in replay(asked(), streams.reports, FakeArchive(5), judge):
        pass
    assert judge.asked == ["f0", "f1", "f3", "f4"]


async def test_a_replay_counts_nothing_of_another_version_that_has_taken_the_workers_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PAGE", 4)
    streams, judge = MemoryStreams(), FakeJudge()
    judge.stays_for = 4
    with pytest.raises(NotFound, match="version 2, and the replay goes on"):
        async for _ in replay(asked(), streams.reports, FakeArchive(8), judge):
            pass
    assert (await streams.reports.fields(MODEL, "replay-week"))["replayed"] == "4"
    last = [progress async for progress in replay(asked(), streams.reports, FakeArchive(8), FakeJudge())][-1]
    assert (last.frames, last.done) == (8, True)


async def test_a_replay_keeps_to_its_rate() -> None:
    streams = MemoryStreams()
    began = asyncio.get_running_loop().time()
    async for _ in replay(asked(rate=50.0), streams.reports, FakeArchive(11), FakeJudge()):
        pass
    assert asyncio.get_running_loop().time() - began >= 10 / 50


async def test_a_replay_of_something_else_under_the_same_id_is_refused() -> None:
    streams = MemoryStreams()
    async for _ in replay(asked(), streams.reports, FakeArchive(3), FakeJudge()):
        pass
    with pytest.raises(Conflict, match="choose another id"):
        async for _ in replay(asked(where=StoredRange("c9", 0, 0)), streams.reports, FakeArchive(3), FakeJudge()):
            pass


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"replay_id": "Week 1"}, "REPLAY_ID_INVALID"),
        ({"rate": float("nan")}, "RATE_INVALID"),
        ({"rate": 1e9}, "RATE_INVALID"),
        ({"where": StoredRange("", 10, 5)}, "RANGE_INVALID"),
    ],
)
def test_replays_that_make_no_sense_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidInput) as error:
        asked(**wrong)
    assert error.value.reason == reason
