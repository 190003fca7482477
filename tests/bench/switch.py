"""Promotion and rollback under a stream: what is lost, what is answered twice, and how long answers take meanwhile.

    python -m tests.bench.switch [--rate 100] [--seconds 60]

Everything is as `vigil local` has it, with the built-in model. The frames go through one bare call of ingest's Stream,
not through the client library, which would hide a second answer. They come at their rate whatever the answers do, and
latencies count from when each was due. The candidate gets a tenth of the frames until a person promotes it. Images are
made small, so that two cores have something left at this rate: where they have not, the queue grows, every latency is
its length, and the ratios say nothing. The line is for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from vigil.ingest.v1 import ingest_pb2
from vigil_cli.local.operator import look_after
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, StorageClient, VigilClient, convert
from vigil_common.streams.redis import RedisStreams
from vigil_operator.observed import REQUEST_ANNOTATION
from vigil_trainer import train

from tests.bench.bench import MODEL, arrivals, drained
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "line"
# Parts of the measured time at which the promotion and the rollback are asked for.
PROMOTED_AT, ROLLED_BACK_AT = 0.3, 0.65
# Frames that were due so long before are "before", and so long after the route has changed still "during".
BEFORE_S, AFTER_S = 10.0, 2.0
WARM_UP_S = 8.0
CAMERAS = 4
SIDE = 96
DEADLINE_S = 60.0


@dataclass
class Cameras:
    """Frames sent over one call, and every answer to them."""

    client: VigilClient
    images: list[bytes]
    due: dict[str, float] = field(default_factory=dict)
    answers: list[tuple[str, float]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    async def run(self, rate: float, seconds: float) -> None:
        """Send for so long, and take answers until the server ends the call."""
        call = self.client.stub.Stream(metadata=self.client.metadata)
        reading = asyncio.create_task(self._read(call))
        began = time.monotonic()
        for index, at in enumerate(arrivals(seconds, rate)):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            frame = Frame(self.images[index % len(self.images)], MODEL, camera=f"camera-{index % CAMERAS}")
            self.due[frame.frame_id] = began + at
            message = convert.frame_message(frame)
            await call.write(ingest_pb2.StreamRequest(frame=message, wait_for=ingest_pb2.WAIT_FOR_VERDICT))
        await call.done_writing()
        await asyncio.wait_for(reading, DEADLINE_S)

    async def _read(self, call: Any) -> None:
        while isinstance(response := await call.read(), ingest_pb2.StreamResponse):
            if response.HasField("verdict"):
                self.answers.append((response.frame_id, time.monotonic()))
            else:
                self.refused[response.error.message] += 1

    def p99_ms(self, start: float, end: float) -> float:
        """Of the frames that were due then."""
        taken = [at - self.due[frame] for frame, at in self.answers if start <= self.due[frame] < end]
        return float(np.percentile(taken, 99) * 1000)


def small(image: bytes) -> bytes:
    """The image at SIDE by SIDE pixels."""
    with Image.open(io.BytesIO(image)) as large:
        buffer = io.BytesIO()
        large.resize((SIDE, SIDE)).save(buffer, "PNG")
    return buffer.getvalue()


def resource(version: int) -> str:
    """The AnomalyModel; what the gates say is not what is measured here, so they ask for little."""
    gates = {"minFrames": 20, "minAnomalous": 0, "minDuration": "1s", "maxErrorFraction": None}
    gates |= {"maxFlipFraction": None, "maxLatencyRatio": None}
    rollout = {"approval": "Manual", "sampleFraction": 0.1, "gates": gates}
    spec = {"source": {"model": MODEL, "version": str(version)}, "rollout": rollout}
    body = {"apiVersion": "vigil.dev/v1alpha1", "kind": "AnomalyModel", "metadata": {"name": NAME}, "spec": spec}
    return json.dumps(body)


async def until(holds: Callable[[], Any], what: str) -> None:
    """Wait for it."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {what} within {DEADLINE_S:.0f} s")
        await asyncio.sleep(0.05)


async def switch(files: ResourceFiles, streams: RedisStreams, verb: str, version: int) -> tuple[float, float]:
    """Ask for it as `vigil promote` and `vigil rollback` do; when it was asked for, and when the route had changed."""
    asked = time.monotonic()
    files.patch(NAME, {"metadata": {"annotations": {REQUEST_ANNOTATION: f"{verb} - {asked}"}}})
    while (route := await streams.routing.get(MODEL)) is None or route.live.version != version:
        if time.monotonic() > asked + DEADLINE_S:
            raise TimeoutError(f"{verb}: not within {DEADLINE_S:.0f} s: {files.get(NAME)['status']}")
        await asyncio.sleep(0.02)
    return asked, time.monotonic()


async def run(rate: float, seconds: float, folder: Path) -> bool:
    """Measure, and print one line."""
    cells, stop = load_cells(), asyncio.Event()
    normal, images = [small(image) for image in cells.train[:200]], [small(image) for image in cells.test_images]
    async with LocalStack(folder / "stack", log_level="WARNING") as stack:
        async with StorageClient(stack.storage_address) as storage:
            for start in (0, 100):
                await storage.models_publish(train(normal[start : start + 100], name=MODEL).bundle, name=MODEL)
        streams, files = await RedisStreams.connect(stack.redis_url), ResourceFiles(stack.folder)
        operating = asyncio.create_task(look_after(stack, stop))

        def phase(name: str) -> bool:
            return bool(files.get(NAME)["status"].get("phase") == name)

        files.apply(resource(1))
        await until(lambda: phase("Live"), "live")
        files.apply(resource(2))
        await until(lambda: phase("Shadowing"), "in shadow")
        async with VigilClient(stack.ingest_address) as client:
            cameras = Cameras(client, images)
            sending = asyncio.create_task(cameras.run(rate, WARM_UP_S + seconds))
            began = time.monotonic() + WARM_UP_S
            await until(lambda: phase("AwaitingApproval"), "through its gates")
            moments = []
            for verb, version, at in (("promote", 2, PROMOTED_AT), ("rollback", 1, ROLLED_BACK_AT)):
                await asyncio.sleep(began + at * seconds - time.monotonic())
                moments.append(await switch(files, streams, verb, version))
            await sending
        await drained(stack, streams)
        async with StorageClient(stack.storage_address) as storage:
            stored = Counter([frame.frame_id async for frame in storage.frames_query(MODEL)])
        stop.set()
        await operating
        await streams.close()
    answered = Counter(frame for frame, _ in cameras.answers)
    lost = sum(not answered[frame] for frame in cameras.due) + sum(not stored[frame] for frame in cameras.due)
    twice = sum(count > 1 for count in [*answered.values(), *stored.values()])
    ratios, told = [], []
    for asked, switched in moments:
        before, during = cameras.p99_ms(asked - BEFORE_S, asked), cameras.p99_ms(asked, switched + AFTER_S)
        ratios.append(during / before)
        told.append(f"{switched - asked:.2f} s, p99 {before:.0f} ms before and {during:.0f} ms during")
    print(f"promotion {told[0]}; rollback {told[1]}; refused {dict(cameras.refused)}")
    print(
        f"switch: rate={rate:.0f} seconds={seconds:.0f} frames={len(cameras.due)} answered={len(answered)} "
        f"stored={len(stored)} lost={lost} twice={twice} "
        f"promotion_p99_ratio={ratios[0]:.2f} rollback_p99_ratio={ratios[1]:.2f}"
    )
    return not lost and not twice


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(not asyncio.run(run(options.rate, options.seconds, Path(name))))


if __name__ == "__main__":
    main()
