"""The shadow service as a real process beside a real Valkey: killed, replaced, stopped, and asked over gRPC."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from vigil.shadow.v1 import shadow_pb2, shadow_pb2_grpc
from vigil_cli.local.process import Process
from vigil_common.streams.ports import Candidate, Emission, Live
from vigil_common.streams.redis import RedisStreams
from vigil_shadow import scale

from tests.support.shadow import CANDIDATE, COUNTS, LIVE, MODEL, Answer, expected
from tests.support.valkey import ValkeyProcess, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from vigil_common.streams.ports import FrameSource

DEADLINE_S = 60.0
BATCH = 50


@dataclass
class Setup:
    """A Valkey, a shadow process, and both workers' sides played by the test."""

    streams: RedisStreams
    process: Process
    address: str

    async def compare(self, candidate: str = CANDIDATE, version: int = 2) -> str:
        """Begin a comparison; its run."""
        route = await self.streams.routing.write(MODEL, live=Live(1, LIVE), candidate=Candidate(version, candidate))
        return str(route.comparison)

    async def judge(self, pairs: Sequence[tuple[Answer, Answer]], digest: str = CANDIDATE) -> None:
        """Frames go through both workers."""
        for start in range(0, len(pairs), BATCH):
            await asyncio.gather(
                *(
                    self.streams.queue.admit(
                        MODEL, frame_id=live.frame_id, sha256=b"s", header=live.header(), image=b"i", reply_to=""
                    )
                    for live, _ in pairs[start : start + BATCH]
                )
            )
        await self._emit(self.streams.source(MODEL, "live"), [live for live, _ in pairs])
        await self._emit(self.streams.candidate(MODEL, "candidate", digest), [answer for _, answer in pairs])

    @staticmethod
    async def _emit(source: FrameSource, answers: Sequence[Answer]) -> None:
        frames = await source.read(count=len(answers), block_ms=1000)
        assert len(frames) == len(answers)
        by_header = {answer.header(): answer for answer in answers}
        emissions = []
        for frame in frames:
            answer = by_header[frame.header]
            outcome = answer.outcome()
            emissions.append(Emission(frame.entry_id, answer.frame_id, outcome, outcome, header=frame.header))
        assert all(await source.emit(emissions))

    async def ready(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + DEADLINE_S
        async with grpc.aio.insecure_channel(self.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            answer = await check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert time.monotonic() < deadline

    async def until(self, run: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """A report's fields once they are so."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            fields = await self.streams.reports.fields(MODEL, run)
            if condition(fields):
                return fields
            if time.monotonic() > deadline:
                raise TimeoutError(f"{fields}\n{self.process.tail()}")
            await asyncio.sleep(0.02)


@asynccontextmanager
async def shadow(folder: Path) -> AsyncIterator[Setup]:
    valkey = ValkeyProcess(folder / "valkey").start()
    streams = await RedisStreams.connect(valkey.url)
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "VIGIL_REDIS_URL": valkey.url,
        "VIGIL_SHADOW_BIND": address,
        "VIGIL_METRICS_PORT": "0",
        "VIGIL_SHADOW_LEASE_MS": "200",
    }
    process = Process(
        "shadow", [sys.executable, "-m", "vigil_shadow"], folder / "shadow.log", {**os.environ, **settings}
    )
    setup = Setup(streams, process, address)
    try:
        process.start()
        await setup.ready()
        yield setup
    finally:
        await process.stop()
        await streams.close()
        valkey.stop()


def drawn(count: int, *, seed: int = 0, start: int = 0) -> list[tuple[Answer, Answer]]:
    """Answers of both versions, now and then a failure or a flip."""
    rng = random.Random(seed)
    pairs = []
    for index in range(start, start + count):
        live = rng.choice([None, *[round(rng.random(), 3)] * 40])
        candidate = rng.choice([None, *[min(1.0, max(0.0, (live or 0.3) + rng.gauss(0, 0.05)))] * 40])
        times = [rng.randint(8_000, 12_000) for _ in range(2)]
        pairs.append(
            (
                Answer(f"f{index}", candidate=False, score=live, inference_us=times[0]),
                Answer(f"f{index}", candidate=True, score=candidate, inference_us=times[1]),
            )
        )
    return pairs


def joint_of(pairs: Sequence[tuple[Answer, Answer]]) -> Counter[str]:
    """The joint histogram, worked out the plain way."""
    cells: Counter[str] = Counter()
    for pair in pairs:
        if all(answer.score is not None for answer in pair):
            places = [
                scale.cell_of(answer.score or 0.0, answer.threshold, anomalous=answer.anomalous) for answer in pair
            ]
            cells[f"{places[0]}:{places[1]}"] += 1
    return cells


async def test_killed_twenty_times_in_five_thousand_frames_the_report_is_exactly_the_one_worked_out_offline(
    tmp_path: Path,
) -> None:
    pairs = drawn(5_000)
    async with shadow(tmp_path) as setup:
        run = await setup.compare()
        rng, kills = random.Random(1), 0
        for index in range(0, len(pairs), BATCH):
            await setup.judge(pairs[index : index + BATCH])
            if index % 250 == 200:
                # Once it has begun on what is there, at a moment of its own.
                begun = int((await setup.streams.reports.fields(MODEL, run)).get("last_ms", 0))
                await setup.until(run, lambda fields, begun=begun: int(fields.get("last_ms", 0)) > begun)  # type: ignore[misc]
                await asyncio.sleep(rng.random() * 0.02)
                setup.process.kill()
                kills += 1
                setup.process.start()
        assert kills == 20
        answers = [answer for pair in pairs for answer in pair]
        wanted = expected(answers)
        judged = sum(wanted.get(name, 0) for name in ("frames", "candidate_failed", "live_failed", "both_failed"))
        assert judged == 5_000
        fields = await setup.until(run, lambda fields: int(fields.get("frames", 0)) >= wanted["frames"])
        assert {name: int(value) for name, value in fields.items() if name in COUNTS and int(value)} == wanted
        assert await setup.streams.reports.joint(MODEL, run) == joint_of(pairs)
        told = await setup.streams.comparisons(MODEL).read(count=10_000, block_ms=0)
        names = Counter(shadow_pb2.Comparison.FromString(blob).frame_id for _, blob in told)
        assert set(names.values()) == {1}
        assert len(names) == wanted["frames"]


async def test_a_replaced_candidate_s_report_begins_anew_and_the_old_one_stays(tmp_path: Path) -> None:
    async with shadow(tmp_path) as setup, grpc.aio.insecure_channel(setup.address) as channel:
        first = await setup.compare()
        await setup.judge(drawn(100))
        await setup.until(first, lambda fields: int(fields.get("frames", 0)) > 80)
        second = await setup.compare("sha256:third", 3)
        later = [(live, replace(answer, digest="sha256:third")) for live, answer in drawn(60, seed=2, start=100)]
        await setup.judge(later, "sha256:third")
        wanted = expected([answer for pair in later for answer in pair])
        await setup.until(second, lambda fields: int(fields.get("frames", 0)) >= wanted["frames"])
        stub: shadow_pb2_grpc.ShadowServiceAsyncStub = shadow_pb2_grpc.ShadowServiceStub(channel)
        found = await stub.GetReport(shadow_pb2.GetReportRequest(model=MODEL))
        assert (found.report.run, found.report.candidate.digest, found.report.active) == (second, "sha256:third", True)
        assert found.report.frames == wanted["frames"]
        assert found.decision.overall == shadow_pb2.OUTCOME_INCONCLUSIVE
        old = await stub.GetReport(shadow_pb2.GetReportRequest(model=MODEL, run=first))
        assert (old.report.candidate.digest, old.report.active) == (CANDIDATE, False)


async def test_reports_disagreements_and_errors_as_a_caller_sees_them(tmp_path: Path) -> None:
    async with shadow(tmp_path) as setup, grpc.aio.insecure_channel(setup.address) as channel:
        stub: shadow_pb2_grpc.ShadowServiceAsyncStub = shadow_pb2_grpc.ShadowServiceStub(channel)
        for request, code, reason in (
            (shadow_pb2.GetReportRequest(model=MODEL), grpc.StatusCode.NOT_FOUND, "NO_COMPARISON"),
            (shadow_pb2.GetReportRequest(), grpc.StatusCode.INVALID_ARGUMENT, "MODEL_MISSING"),
            (
                shadow_pb2.GetReportRequest(model=MODEL, gates=shadow_pb2.Gates(max_flip_fraction=7)),
                grpc.StatusCode.INVALID_ARGUMENT,
                "GATES_INVALID",
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.GetReport(request)
            assert error.value.code() is code
            assert reason_of(error.value) == reason
        run = await setup.compare()
        pairs = drawn(300)
        watching = stub.WatchReport(shadow_pb2.WatchReportRequest(model=MODEL))
        first = await anext(aiter(watching))
        assert first.report.frames == 0
        await setup.judge(pairs)
        wanted = expected([answer for pair in pairs for answer in pair])
        await setup.until(run, lambda fields: int(fields.get("frames", 0)) >= wanted["frames"])
        async with asyncio.timeout(DEADLINE_S):
            async for found in watching:
                if found.report.frames >= wanted["frames"]:
                    break
        watching.cancel()
        report = found.report
        assert (report.new_alarms, report.new_misses) == (wanted["new_alarms"], wanted["new_misses"])
        assert 0.5 < report.kendall_tau < 1
        assert 0.9 < report.latency.ratio < 1.1
        detail = await stub.GetReport(shadow_pb2.GetReportRequest(model=MODEL, detail=True))
        assert sum(cell.count for cell in detail.report.joint) == wanted["frames"]
        flips = wanted["new_alarms"] + wanted["new_misses"]
        listed: list[shadow_pb2.Disagreement] = []
        token = ""
        while not listed or token:
            page = await stub.ListDisagreements(
                shadow_pb2.ListDisagreementsRequest(model=MODEL, page_size=5, page_token=token)
            )
            listed += page.disagreements
            token = page.next_page_token
        severities = [one.severity for one in listed]
        assert len(severities) == len({one.frame_id for one in listed}) == flips
        assert severities == sorted(severities, reverse=True)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)
