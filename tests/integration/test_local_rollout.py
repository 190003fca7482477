"""`vigil local`: the operator's plan on this machine, with real workers under a running stream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_cli import rollout
from vigil_cli.local.operator import look_after
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.local.stack import LocalStack
from vigil_cli.main import app
from vigil_client import Frame, Result, StorageClient, VigilClient
from vigil_client.channel import connect
from vigil_common.errors import InvalidInput
from vigil_common.grpc.workers import worker_address
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import train

from tests.support.cells import load_cells
from tests.support.platform import MODEL, trained_bundle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

DEADLINE_S = 90.0
RATE = 15.0


@lru_cache(maxsize=1)
def _second_bundle() -> bytes:
    return train(load_cells().train[80:160], name=MODEL).bundle


def _yaml(version: int, **rollout_spec: Any) -> str:
    spec = {"source": {"model": MODEL, "version": str(version)}, "rollout": rollout_spec}
    body = {"apiVersion": "vigil.dev/v1alpha1", "kind": "AnomalyModel", "metadata": {"name": "line"}, "spec": spec}
    return json.dumps(body)


async def _until(files: ResourceFiles, phase: str, live: int) -> dict[str, Any]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        status: dict[str, Any] = files.get("line")["status"]
        if status.get("phase") == phase and status.get("live", {}).get("version") == live:
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {phase} with {live}: {json.dumps(status)}")
        await asyncio.sleep(0.05)


async def _pictures_are_of(stack: LocalStack, version: int) -> None:
    """Wait until the worker that pictures are asked of is of this version."""
    found = 0
    async with asyncio.timeout(DEADLINE_S):
        while found != version:
            async with connect(worker_address(stack.inference_address, MODEL)) as channel:
                stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
                said = await stub.Predict(inference_pb2.PredictRequest(image=load_cells().test_images[0]), timeout=10)
            found = said.verdict.model.version


@dataclass
class _Stream:
    """A camera that never waits, and what comes back."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[str] = field(default_factory=list)
    results: list[tuple[float, Result]] = field(default_factory=list)

    async def _source(self) -> AsyncIterator[Frame]:
        images = load_cells().test_images
        while not self.done.is_set():
            frame = Frame(images[len(self.sent) % len(images)], MODEL, camera="line-1")
            self.sent.append(frame.frame_id)
            yield frame
            await asyncio.sleep(1 / RATE)

    async def run(self, address: str) -> None:
        async with VigilClient(address, window=64) as client:
            async for result in client.stream(self._source()):
                self.results += [(time.monotonic(), result)]

    async def frames(self, count: int) -> None:
        """Wait for so many more."""
        goal = len(self.results) + count
        await _holds(lambda: len(self.results) >= goal)

    def p99_ms(self, chosen: list[Result]) -> float:
        return 1000 * statistics.quantiles([result.latency_s for result in chosen], n=100)[98]


async def _holds(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def _settled(redis_url: str) -> None:
    streams = await RedisStreams.connect(redis_url)
    deadline = time.monotonic() + DEADLINE_S
    while (depth := await streams.queue.depth(MODEL)).unjudged or depth.unstored:
        assert time.monotonic() < deadline, depth
        await asyncio.sleep(0.1)
    await streams.close()


async def test_promotion_and_rollback_under_a_stream_lose_no_frame_and_answer_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, stream = asyncio.Event(), _Stream()
    env = {"VIGIL_CLAIM_IDLE_MS": "5000"}
    async with LocalStack(tmp_path / "stack", env=env) as stack, StorageClient(stack.storage_address) as storage:
        await storage.models_publish(trained_bundle(), name=MODEL)
        await storage.models_publish(_second_bundle(), name=MODEL)
        files = ResourceFiles(stack.folder)
        monkeypatch.setattr(rollout, "_where", files)
        operating = asyncio.create_task(look_after(stack, stop))
        files.apply(_yaml(1))
        await _until(files, "Live", 1)
        streaming = asyncio.create_task(stream.run(stack.ingest_address))
        await stream.frames(40)
        files.apply(_yaml(2, strategy="Immediate"))
        await _until(files, "Live", 2)
        await _pictures_are_of(stack, 2)
        promoted_at = time.monotonic()
        await stream.frames(40)
        answer = await asyncio.to_thread(CliRunner().invoke, app, ["rollback", "line"])
        assert answer.exit_code == 0, answer.output
        assert "line: Held, version 1 is live" in answer.output
        await stream.frames(40)
        await _pictures_are_of(stack, 1)
        stream.done.set()
        await streaming
        await _settled(stack.redis_url)
        stored = [frame.frame_id async for frame in storage.frames_query(MODEL)]
        files.delete("line")
        await _holds(lambda: not stack.worker_addresses)
        await _holds(lambda: not [*stack.live_workers.iterdir()])
        stop.set()
        await operating

    assert sorted(result.frame_id for _, result in stream.results) == sorted(stream.sent)
    assert sorted(stored) == sorted(stream.sent)
    versions = [result.verdict.version if result.verdict else None for _, result in stream.results]
    assert set(versions) == {1, 2}
    assert versions[-1] == 1
    before = stream.p99_ms([result for _, result in stream.results[10:40]])
    around = stream.p99_ms([result for at, result in stream.results if abs(at - promoted_at) < 3])
    print(f"frames={len(stream.sent)} p99 before {before:.0f} ms, around the promotion {around:.0f} ms")


async def test_a_model_says_itself_what_is_kept_of_its_normal_frames_and_a_threshold_can_be_tried_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, images = asyncio.Event(), load_cells().test_images
    async with LocalStack(tmp_path / "stack") as stack, StorageClient(stack.storage_address) as storage:
        await storage.models_publish(trained_bundle(), name=MODEL)
        files = ResourceFiles(stack.folder)
        operating = asyncio.create_task(look_after(stack, stop))
        files.apply(_yaml(1))
        files.patch("line", {"spec": {"retention": {"normal": {"keepFraction": 0.0}}}})
        await _until(files, "Live", 1)
        streams = await RedisStreams.connect(stack.redis_url)
        expected: list[str] = []
        async with VigilClient(stack.ingest_address) as client:
            for fraction in (0.0, 1.0):
                files.patch("line", {"spec": {"retention": {"normal": {"keepFraction": fraction}}}})
                deadline = time.monotonic() + DEADLINE_S
                while await streams.routing.kept_fraction(MODEL) != fraction:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
                results = [result async for result in client.stream(Frame(image, MODEL) for image in images[:40])]
                verdicts = {result.frame_id: result.verdict for result in results if result.verdict is not None}
                assert len(verdicts) == 40
                anomalous = [frame for frame, verdict in verdicts.items() if verdict.anomalous]
                assert 0 < len(anomalous) < 40
                expected += verdicts if fraction else anomalous
                await _settled(stack.redis_url)
        frames = [frame async for frame in storage.frames_query(MODEL)]
        stored = [frame.frame_id for frame in frames]
        monkeypatch.setattr(rollout, "_where", files)
        command = ["threshold", "line", "0", "--preview", "--storage-address", stack.storage_address]
        answer = await asyncio.to_thread(CliRunner().invoke, app, command)
        normal = sum(frame.verdict is not None and not frame.verdict.anomalous for frame in frames)
        said = (
            f"at 0: {normal} of the {len(frames)} newest stored frames of version 1 would flip, "
            f"{normal} to anomalous, 0 to normal"
        )
        assert said in " ".join(answer.output.split()), answer.output
        assert "threshold" not in files.get("line")["spec"]
        await streams.close()
        stop.set()
        await operating
    assert sorted(stored) == sorted(expected)


async def test_a_service_that_was_killed_is_started_again_and_clients_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    stop = asyncio.Event()
    async with LocalStack(tmp_path, log=said.append, log_level="WARNING") as stack:
        async with StorageClient(stack.storage_address) as storage:
            await storage.models_publish(trained_bundle(), name=MODEL)
        ResourceFiles(tmp_path).apply(_yaml(1))
        running = asyncio.gather(look_after(stack, stop), stack.keep_up(stop))
        await _until(ResourceFiles(tmp_path), "Live", 1)
        for name in ("ingest", "storage", "valkey"):
            pid = stack.pid(name)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await _holds(lambda: any(line.startswith(f"{name} ended with code -9") for line in said))  # noqa: B023
        async with VigilClient(stack.ingest_address) as client:
            result = await client.submit(Frame(load_cells().test_images[0], MODEL))
        assert result.error is None
        stop.set()
        await running


def test_what_makes_no_sense_is_refused_with_the_field(tmp_path: Path) -> None:
    files = ResourceFiles(tmp_path)
    for text, says in (
        (_yaml(0), "spec.source.version"),
        ("kind: Pod\napiVersion: v1", "only vigil.dev/v1alpha1 AnomalyModel"),
        ("{}", "missing"),
        ("# nothing\n", "no AnomalyModel in it"),
        (_yaml(1).replace('"line"', '"Line_1"'), "metadata.name 'Line_1'"),
        (_yaml(1, minFrame=3), "spec.rollout.minFrame: there is no such field"),
    ):
        with pytest.raises(InvalidInput, match=says):
            files.apply(text)
    assert files.names() == []


def test_a_patch_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    files = ResourceFiles(tmp_path)
    files.apply(_yaml(1, approval="Manual"))
    files.patch("line", {"spec": {"threshold": 0.6}})
    files.patch("line", {"metadata": {"annotations": {"a": "b"}}})
    body = files.get("line")
    assert body["spec"]["rollout"] == {"approval": "Manual"}
    assert (body["spec"]["threshold"], body["metadata"]["generation"]) == (0.6, 2)
    assert body["metadata"]["annotations"]["a"] == "b"
    files.patch("line", {"spec": {"threshold": None}})
    assert "threshold" not in files.get("line")["spec"]
