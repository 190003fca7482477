"""`make faults SECONDS=… SEED=…`: the platform under a steady stream of real images while everything goes wrong.

A seed decides what fails and when (`schedule`). Two clients, one asking for acceptance and one for verdicts, send
through the same broken ways. In the end everything is healed, the queue runs empty, and what the clients were promised
is held against ReductStore, read directly (`promises`). Not told apart from a failure of ours: a Valkey that fails over
without its replica being up to date; here it always is, as `FAILOVER` sees to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vigil_client import Frame, StorageClient, VigilClient, WaitFor
from vigil_common.errors import VigilError
from vigil_common.store.open import open_stores
from vigil_common.store.ports import FrameFilter
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import train

from tests.faults.link import Mode
from tests.faults.promises import Promise, compare
from tests.faults.schedule import Fault, Kind, Places, schedule
from tests.faults.stack import FAKETIME, REDUCT, VALKEY, Disk, FaultyStack
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_client import Model

MODEL = "cells"
OUT = Path("out/faults")
RATE = 5.0  # frames a second and client
BROKEN_FRACTION = 0.02
LIVE_VERSIONS = 2
SETTLE_S = 240.0
ENV = {"VIGIL_CLAIM_IDLE_MS": "3000", "VIGIL_QUEUE_BUDGET_BYTES": str(128 << 20)}


class Run:
    """One run."""

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        self.seconds = seconds
        self.seed = seed
        self.stack = FaultyStack(folder / "stack", env=ENV, maxmemory="1gb")
        self.disks: dict[str, Disk] = {}
        self.promises: dict[str, Promise] = {}
        self.promotions: list[tuple[float, int]] = []
        self.injected: Counter[str] = Counter()
        self.exits: list[str] = []
        self._models: list[Model] = []
        self._busy: set[str] = set()
        self._mounts = contextlib.ExitStack()
        self._began = 0.0
        self._ended = asyncio.Event()

    async def go(self) -> int:
        """Everything; returns the process's exit code."""
        self._mount()
        try:
            async with self.stack:
                await self._set_up()
                await self._play()
                return await self._judge()
        finally:
            self._mounts.close()

    def _mount(self) -> None:
        for name in (REDUCT, VALKEY):
            try:
                self.disks[name] = Disk(self.stack.folder / name)
                # Not by what `disks` has in the end: a failover leaves one behind.
                self._mounts.callback(self.disks[name].close)
            except OSError as error:
                print(f"faults: no full disk for {name}: {error} (root can mount)")
        if FAKETIME is None:
            print("faults: no clock that jumps: libfaketime is not installed")

    async def _set_up(self) -> None:
        stack, cells = self.stack, load_cells()
        await stack.add_storage("storage-b")
        stack.link("client>ingest", stack.ingest_address)
        async with StorageClient(stack.storage_address) as storage:
            for count in (60, 70, 80):
                trained = await asyncio.to_thread(train, cells.train[:count], name=MODEL)
                self._models.append(await storage.models_publish(trained.bundle, name=MODEL))
        await self._promote(1)
        for model in self._models:  # the third is never live: its worker must judge nothing
            await stack.add_worker(MODEL, model.version)

    async def _promote(self, version: int) -> None:
        model = self._models[version - 1]
        at_s = time.monotonic()
        while True:
            try:
                streams = await RedisStreams.connect(self.stack.redis_url)
                try:
                    await streams.routing.promote(MODEL, version=version, digest=model.digest, threshold=None)
                finally:
                    await streams.close()
            except VigilError:
                await asyncio.sleep(0.3)
            else:
                # In doubt it was live from the first try on.
                self.promotions.append((at_s, version))
                return

    async def _play(self) -> None:
        self._began = time.monotonic()
        clients = [
            asyncio.create_task(self._client(name, wait))
            for name, wait in (("a", WaitFor.ACCEPTED), ("v", WaitFor.VERDICT))
        ]
        watching = asyncio.create_task(self._watch())
        under_way: set[asyncio.Task[None]] = set()
        places = Places(
            parts=sorted(self.stack.parts),
            links=sorted(self.stack.links),
            disks=sorted(self.disks),
            clocks=sorted(self.stack.clocks),
            versions=LIVE_VERSIONS,
        )
        plan = schedule(self.seed, self.seconds, places)
        for fault in plan:
            await asyncio.sleep(fault.after_s)
            # One thing at a time per part: what two faults of one part would mean is not said by their names.
            if fault.where not in self._busy:
                self._busy.add(fault.where)
                task = asyncio.create_task(self._inject(fault))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
        await asyncio.sleep(max(0.0, self._began + self.seconds - time.monotonic()))
        self._ended.set()
        await asyncio.gather(*under_way)
        self._say("healed; waiting for the clients")
        await asyncio.wait_for(asyncio.gather(*clients), SETTLE_S)
        self._say(f"{len(self.promises)} answers; waiting for the queue")
        streams = await RedisStreams.connect(self.stack.redis_url)
        async with asyncio.timeout(SETTLE_S):
            while True:
                with contextlib.suppress(VigilError):
                    depth = await streams.queue.depth(MODEL)
                    if not depth.unjudged and not depth.unstored:
                        break
                await asyncio.sleep(0.2)
        await streams.close()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    async def _inject(self, fault: Fault) -> None:
        if fault.kind is Kind.DISK_FULL and fault.where not in self.disks:
            self._busy.discard(fault.where)  # it failed over to another disk
            return
        self._say(str(fault))
        self.injected[fault.kind.value] += 1
        try:
            await self._carry_out(fault)
        finally:
            self._busy.discard(fault.where)

    async def _carry_out(self, fault: Fault) -> None:
        stack = self.stack
        match fault.kind:
            case Kind.KILL | Kind.AWAY:
                stack.kill(fault.where)
                await asyncio.sleep(fault.for_s)
                await stack.revive(fault.where)
            case Kind.RESTART:
                await stack.stop(fault.where)
                await asyncio.sleep(fault.for_s)
                await stack.revive(fault.where)
            case Kind.FREEZE:
                with stack.frozen(fault.where):
                    await asyncio.sleep(fault.for_s)
            case Kind.CUT | Kind.STALL | Kind.DELAY:
                mode = {Kind.CUT: Mode.CUT, Kind.STALL: Mode.STALLED, Kind.DELAY: Mode.SLOW}[fault.kind]
                stack.links[fault.where].set(mode, fault.amount)
                await asyncio.sleep(fault.for_s)
                stack.links[fault.where].set(Mode.OPEN)
            case Kind.DISK_FULL:
                with self.disks[fault.where].full():
                    await asyncio.sleep(fault.for_s)
                if stack.ended(fault.where) is not None:
                    await stack.revive(fault.where)
            case Kind.CLOCK:
                with stack.clock_off(fault.where, fault.amount):
                    await asyncio.sleep(fault.for_s)
            case Kind.FAILOVER:
                await stack.failover()
                self.disks.pop(VALKEY, None)
            case Kind.PROMOTE:
                await self._promote(int(fault.amount))

    async def _watch(self) -> None:
        """Start what ended by itself, as an orchestrator does, and remember that it did."""
        while True:
            await asyncio.sleep(0.3)
            for name in self.stack.parts:
                code = self.stack.ended(name)
                if code is not None and name not in self._busy:
                    self._busy.add(name)
                    last = self.stack.log_file(name).read_text(errors="replace").splitlines()[-1:]
                    self.exits.append(f"{name} ended by itself with {code}: {' '.join(last)[:300]}")
                    self._say(self.exits[-1])
                    await self.stack.revive(name)
                    self._busy.discard(name)

    async def _client(self, name: str, wait_for: WaitFor) -> None:
        images, chance = load_cells().test_images, random.Random(f"{self.seed} {name}")
        sent: dict[str, tuple[Frame, bool, float]] = {}

        async def frames() -> AsyncIterator[Frame]:
            while not self._ended.is_set():
                image, broken = chance.choice(images), chance.random() < BROKEN_FRACTION
                image = image[: len(image) // 2] if broken else image
                frame = Frame(image, MODEL, camera=f"{name}-{chance.randrange(3)}")
                sent[frame.frame_id] = (frame, broken, time.monotonic())
                yield frame
                await asyncio.sleep(1 / RATE)

        address = self.stack.links["client>ingest"].address
        async with VigilClient(address, max_retry_s=600, silence_s=15) as client:
            async for result in client.stream(frames(), wait_for=wait_for):
                frame, broken, sent_s = sent.pop(result.frame_id)
                sha256 = hashlib.sha256(frame.image).hexdigest()
                now_s = time.monotonic()
                promise = Promise(sha256, frame.camera or "", broken, sent_s, now_s, result)
                self.promises[frame.frame_id] = promise

    async def _judge(self) -> int:
        frames, models = await open_stores(f"http://{self.stack._bind(REDUCT)}", None)
        try:
            stored = [one async for one in frames.query(FrameFilter([f"{MODEL}/*"]), limit=1_000_000)]
        finally:
            await frames.close()
            await models.close()
        found = compare(self.promises, stored, self.promotions)
        for what, ids in (("lost", found.lost), ("duplicated", found.duplicated)):
            for frame_id in ids[:20]:
                print(f"  {what}: {frame_id} {self.promises.get(frame_id)}")
        for frame_id, what in list(found.wrong.items())[:20]:
            print(f"  wrong: {frame_id}: {what}")
        refused = Counter(p.result.error.reason for p in self.promises.values() if p.result.error is not None)
        dead = Counter(one.labels["reason"] for one in stored if one.labels["outcome"] == "failed")
        print(f"faults: kinds {dict(self.injected)}")
        print(f"faults: errors heard {dict(refused)}, stored as failed {dict(dead)}, wrong {len(found.wrong)}")
        print(f"faults: parts that ended by themselves {len(self.exits)}, seed {self.seed}")
        print(
            f"faults: injected={self.injected.total()} accepted={found.accepted} stored={found.stored} "
            f"lost={len(found.lost)} duplicated={len(found.duplicated)}"
        )
        return 0 if found.kept else 1

    def _say(self, what: str) -> None:
        at = time.monotonic() - self._began if self._began else 0.0
        print(f"  {at:7.1f} s  {what}", flush=True)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    asked = parser.parse_args()
    if not os.environ.get("VIGIL_REDUCT_BINARY"):
        parser.error("VIGIL_REDUCT_BINARY names no ReductStore; `make faults` builds one")
    folder = OUT / f"{asked.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"faults: {asked.seconds:g} s, seed {asked.seed}, logs in {folder}", flush=True)
    return asyncio.run(Run(asked.seconds, asked.seed, folder).go())


if __name__ == "__main__":
    sys.exit(main())
