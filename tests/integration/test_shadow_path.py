"""A candidate beside live through real processes: compared, stopped in its tracks, labelled, promoted, and replayed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from vigil.shadow.v1 import shadow_pb2
from vigil_cli.demo_shadow import inverted
from vigil_cli.shadow_client import ShadowClient
from vigil_client import Frame, HumanLabel, ServiceError, VigilClient
from vigil_common.streams.ports import Candidate, Live

from tests.support.cells import load_cells
from tests.support.platform import MODEL, Platform, platform, trained_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vigil_client import Model, Verdict

DEADLINE_S = 60.0
COUNT = 40


async def begin(vigil: Platform) -> Model:
    """Publish a candidate that says the opposite, and compare it."""
    candidate = await vigil.storage.models_publish(inverted(trained_bundle()), name=MODEL)
    await vigil.stack.add_worker(MODEL, candidate.version)
    live = await vigil.streams.routing.get(MODEL)
    assert live is not None
    await vigil.streams.routing.write(MODEL, live=live.live, candidate=Candidate(candidate.version, candidate.digest))
    return candidate


async def stream(vigil: Platform, count: int = COUNT) -> dict[str, Verdict]:
    frames = [Frame(image, MODEL, camera="line-1") for image in load_cells().test_images[:count]]
    async with VigilClient(vigil.stack.ingest_address) as client:
        found = {result.frame_id: result.verdict async for result in client.stream(frames)}
    assert len(found) == count
    return {name: verdict for name, verdict in found.items() if verdict is not None}


async def reported(
    shadow: ShadowClient, condition: Callable[[shadow_pb2.Report], bool], run: str = ""
) -> shadow_pb2.GetReportResponse:
    """The report once it is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition((found := await shadow.report(MODEL, run=run)).report):
        if time.monotonic() > deadline:
            raise TimeoutError(str(found))
        await asyncio.sleep(0.1)
    return found


async def test_a_candidate_is_compared_on_live_s_frames_and_whatever_becomes_of_it_live_goes_on(tmp_path: Path) -> None:
    async with platform(tmp_path) as vigil, ShadowClient(vigil.stack.shadow_address) as shadow:
        candidate = await begin(vigil)
        live = await stream(vigil)
        assert {verdict.version for verdict in live.values()} == {1}
        found = await reported(shadow, lambda report: report.frames == COUNT)
        report = found.report
        assert report.new_alarms + report.new_misses > COUNT / 2
        assert (report.pictures.maps, report.pictures.resized) == (COUNT, 0)
        assert report.latency.HasField("ratio")
        assert report.kendall_tau < -0.9
        assert found.decision.overall == shadow_pb2.OUTCOME_INCONCLUSIVE

        labels: dict[str, Mapping[str, str]] = {}
        async with asyncio.timeout(DEADLINE_S):
            while len(labels) < COUNT:
                stored = [frame async for frame in vigil.storage.frames_query(MODEL) if "agree" in frame.labels]
                labels = {frame.frame_id: frame.labels for frame in stored}
        assert {one["candidate_digest"] for one in labels.values()} == {candidate.digest}
        for name, verdict in live.items():
            assert float(labels[name]["candidate_score"]) == pytest.approx(1 - verdict.score, abs=1e-5)
            assert (
                labels[name]["agree"]
                == str((float(labels[name]["candidate_score"]) >= 0.5) == verdict.anomalous).lower()
            )

        flipped = [name for name, one in labels.items() if one["agree"] == "false"]
        for name, right in zip(flipped[:3], (True, True, False), strict=True):
            said = live[name].anomalous == right
            human = HumanLabel.ANOMALOUS if said else HumanLabel.NORMAL
            await vigil.storage.frames_annotate(MODEL, name, human, author="ada")
        found = await reported(shadow, lambda report: report.reviews.live_right + report.reviews.candidate_right == 3)
        assert (found.report.reviews.live_right, found.report.reviews.candidate_right) == (2, 1)
        assert found.decision.gates[-1].gate == "people"

        stopped = [vigil.stack.pid("shadow"), vigil.stack.pid(f"worker-{MODEL}-{candidate.version}")]
        for pid in stopped:
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        live = await stream(vigil)
        await vigil.settled()
        assert len(live) == COUNT
        for pid in stopped:
            assert pid is not None
            os.kill(pid, signal.SIGCONT)
        await reported(shadow, lambda report: report.frames == 2 * COUNT)

        await vigil.streams.routing.write(MODEL, live=Live(candidate.version, candidate.digest))
        deadline = time.monotonic() + DEADLINE_S
        while {verdict.version for verdict in (await stream(vigil, 2)).values()} != {candidate.version}:
            assert time.monotonic() < deadline
        await vigil.settled()
        assert set((await vigil.stored()).values()) == {1}


async def test_a_replay_goes_on_where_it_broke_off_and_compares_what_live_said(tmp_path: Path) -> None:
    async with platform(tmp_path) as vigil, ShadowClient(vigil.stack.shadow_address) as shadow:
        live = await stream(vigil)
        await vigil.settled()
        candidate = await vigil.storage.models_publish(inverted(trained_bundle()), name=MODEL)
        worker = await vigil.stack.add_worker(MODEL, candidate.version)
        request = shadow_pb2.ReplayRequest(
            model=MODEL,
            replay_id="week",
            worker=vigil.stack.worker_addresses[worker],
            version=candidate.version,
            rate=200,
        )
        async for answer in shadow.replay(request):
            assert 0 < answer.frames < COUNT
            assert not answer.done
            break
        vigil.stack.kill("shadow")
        await vigil.stack.start("shadow")
        answers = [answer async for answer in shadow.replay(request)]
        assert (answers[-1].frames, answers[-1].done) == (COUNT, True)
        assert [answer.done async for answer in shadow.replay(request)] == [True]
        found = await reported(shadow, lambda report: report.frames == COUNT, run="replay-week")
        flips = sum(verdict.anomalous != (1 - verdict.score >= 0.5) for verdict in live.values())
        assert found.report.new_alarms + found.report.new_misses == flips
        assert {gate.gate for gate in found.decision.gates}.isdisjoint({"maxLatencyRatio"})
        assert len(await shadow.disagreements(MODEL, run="replay-week", limit=100)) == flips
        request.camera = "another"
        with pytest.raises(ServiceError, match="REPLAY_EXISTS"):
            [answer async for answer in shadow.replay(request)]
        request.replay_id, request.version = "other", 7
        with pytest.raises(ServiceError, match="UNKNOWN_VERSION"):
            [answer async for answer in shadow.replay(request)]
