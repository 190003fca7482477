"""The way of a frame as a state machine: whatever is claimed, killed, emitted twice or promoted in whatever order,
each admitted frame has one outcome, stays until it is stored, and leaves its bytes behind.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Admission, Emission
from vigil_common.streams.redis import RedisStreams

from tests.support.valkey import ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import Coroutine

    import pytest
    from vigil_common.streams.ports import QueuedFrame, QueuedOutcome

M = "cells"
IDS = [f"f{number}" for number in range(8)]
SIZE = 1000 + 1 + 512
BUDGET = 5 * SIZE
WORKERS = st.sampled_from(["a", "b"])


class Protocol(RuleBasedStateMachine):
    """Two workers, one storage that may lose what it has in hand, one route."""

    url: str | None = None

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.streams: MemoryStreams | RedisStreams = self.do(self.opened())
        # What must be true of the queue, told without it.
        self.sha: dict[str, bytes] = {}
        self.entry_of: dict[str, str] = {}
        self.id_of: dict[str, str] = {}
        self.emitted: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.sources = {name: self.streams.source(M, name) for name in "ab"}
        self.held: dict[str, list[QueuedFrame]] = {"a": [], "b": []}
        self.storage_number = 0
        self.outcomes: Any = self.streams.outcomes(M, "s0")
        self.storage_held: list[QueuedOutcome] = []
        self.version = 0

    async def opened(self) -> MemoryStreams | RedisStreams:
        if self.url is None:
            return MemoryStreams(budget_bytes=BUDGET)
        real = await RedisStreams.connect(self.url, budget_bytes=BUDGET)
        await real.queue._connection.command("FLUSHALL")
        await real.queue._connection.ensure_groups(M)
        return real

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        if not hasattr(self, "streams"):
            return
        self.drain()
        self.do(self.streams.close())
        self.loop.close()

    @rule(frame_id=st.sampled_from(IDS), sha=st.sampled_from([b"x", b"y"]))
    def admit(self, frame_id: str, sha: bytes) -> None:
        full = len(self.entry_of.keys() - self.gone()) * SIZE + SIZE > BUDGET
        found = self.do(
            self.streams.queue.admit(M, frame_id=frame_id, sha256=sha, header=b"h", image=sha * 1000, reply_to="")
        )
        if frame_id in self.sha:
            judged = frame_id in self.emitted
            expected = (
                Admission.REUSED if self.sha[frame_id] != sha else Admission.JUDGED if judged else Admission.PENDING
            )
            assert found.state is expected
            if judged and expected is Admission.JUDGED:
                assert found.reply == self.emitted[frame_id]
        elif found.state is Admission.ADMITTED:
            self.sha[frame_id] = sha
            self.entry_of[frame_id] = ""
        else:
            # Bytes come back at a trim, so full is said early at most, never late.
            assert found.state is Admission.FULL
            assert full or self.gone_untrimmed

    def gone(self) -> set[str]:
        return {frame_id for frame_id in self.entry_of if frame_id in self.stored}

    @property
    def gone_untrimmed(self) -> bool:
        return bool(self.gone())

    @rule(worker=WORKERS, count=st.integers(1, 3))
    def read(self, worker: str, count: int) -> None:
        for frame in self.do(self.sources[worker].read(count=count, block_ms=1)):
            assert frame.deliveries == 1
            self.take(worker, frame)

    @rule(worker=WORKERS)
    def claim(self, worker: str) -> None:
        for frame in self.do(self.sources[worker].claim(min_idle_ms=0, count=3)):
            assert frame.deliveries > 1
            self.take(worker, frame)

    def take(self, worker: str, frame: QueuedFrame) -> None:
        frame_id = next((name for name, entry in self.entry_of.items() if entry == frame.entry_id), None)
        if frame_id is None:  # the oldest that nobody has had: a stream is in order
            frame_id = next(name for name, entry in self.entry_of.items() if not entry)
            self.entry_of[frame_id] = frame.entry_id
            self.id_of[frame.entry_id] = frame_id
        assert frame.image == self.sha[frame_id] * 1000
        assert frame_id not in self.emitted
        self.held[worker].append(frame)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def emit(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([name for name, held in self.held.items() if held]))
        self.emit_one(worker, data.draw(st.sampled_from(self.held[worker])))

    @rule()
    def judge_the_next(self) -> None:
        """What is usual, so that the rest meets a queue in use."""
        before = len(self.held["a"])
        self.read("a", 1)
        for frame in self.held["a"][before:]:
            self.emit_one("a", frame)

    def emit_one(self, worker: str, frame: QueuedFrame) -> None:
        frame_id = self.id_of[frame.entry_id]
        outcome = f"{frame_id} by {worker} as {self.version}".encode()
        (won,) = self.do(self.sources[worker].emit([Emission(frame.entry_id, frame_id, outcome, outcome)]))
        assert won == (frame_id not in self.emitted)
        self.emitted.setdefault(frame_id, outcome)

    @rule(worker=WORKERS)
    def kill(self, worker: str) -> None:
        self.held[worker] = []

    @rule(pending=st.booleans())
    def storage_reads(self, pending: bool) -> None:  # noqa: FBT001 - drawn
        for found in self.do(self.outcomes.read(count=3, block_ms=1, pending=pending)):
            assert found.frame is not None, "trimmed before it was stored"
            frame_id = self.id_of[found.frame.entry_id]
            assert found.outcome == self.emitted[frame_id]
            assert found.frame.image == self.sha[frame_id] * 1000
            self.storage_held.append(found)

    @precondition(lambda self: self.storage_held)
    @rule(data=st.data())
    def storage_is_done(self, data: st.DataObject) -> None:
        found = self.storage_held.pop(data.draw(st.integers(0, len(self.storage_held) - 1)))
        self.do(self.outcomes.done([found]))
        assert found.frame is not None
        self.stored[self.id_of[found.frame.entry_id]] = found.outcome

    @rule()
    def storage_is_killed(self) -> None:
        self.storage_number += 1
        self.storage_held = []
        self.outcomes = self.streams.outcomes(M, f"s{self.storage_number}")

    @rule()
    def trim(self) -> None:
        self.do(self.outcomes.trim())

    @rule(version=st.integers(1, 3))
    def promote(self, version: int) -> None:
        self.do(self.streams.routing.promote(M, version=version, digest=f"sha256:{version}", threshold=None))
        self.version = version
        route = self.do(self.streams.routing.get(M))
        assert route is not None
        assert route.live.version == version

    @invariant()
    def what_is_left_is_counted(self) -> None:
        if not hasattr(self, "streams"):
            return
        depth = self.do(self.streams.queue.depth(M))
        assert depth.unjudged == len(self.sha) - len(self.emitted)
        assert depth.unstored == len(self.emitted) - len(self.stored)
        assert depth.frames >= len(self.sha) - len(self.stored), "trimmed before it was stored"
        assert depth.image_bytes <= BUDGET

    def drain(self) -> None:
        """In the end everything comes through, once."""
        self.storage_is_killed()
        while len(self.emitted) < len(self.sha):
            self.held = {"a": [], "b": []}
            self.claim("a")
            self.read("a", 3)
            for frame in self.held["a"]:
                frame_id = self.id_of[frame.entry_id]
                outcome = f"{frame_id} in the end".encode()
                assert self.do(self.sources["a"].emit([Emission(frame.entry_id, frame_id, outcome, outcome)])) == [True]
                self.emitted[frame_id] = outcome
        for pending in (True, False):
            for _ in range(len(IDS) + 1):
                self.storage_reads(pending)
                self.do(self.outcomes.done(self.storage_held))
                for found in self.storage_held:
                    assert found.frame is not None
                    self.stored[self.id_of[found.frame.entry_id]] = found.outcome
                self.storage_held = []
        assert self.stored == self.emitted
        self.trim()
        depth = self.do(self.streams.queue.depth(M))
        assert (depth.frames, depth.image_bytes, depth.unjudged, depth.unstored) == (0, 0, 0, 0)


OPTIONS = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_the_memory_fake_keeps_the_protocol() -> None:
    run_state_machine_as_test(Protocol, settings=OPTIONS)


def test_valkey_keeps_the_protocol(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = ValkeyProcess(tmp_path_factory.mktemp("valkey")).start()

    class OnValkey(Protocol):
        url = server.url

    try:
        run_state_machine_as_test(OnValkey, settings=OPTIONS)
    finally:
        server.stop()
