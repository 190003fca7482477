"""Clients that mean no good against a real ingest: its memory stays bounded, and others are served as before."""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vigil_client import Frame, VigilClient, WaitFor
from vigil_common.streams.redis import RedisStreams

from tests.fuzz.seeds import images
from tests.support.abuse import KINDS
from tests.support.valkey import ValkeyProcess, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GROWTH_BYTES = 256 << 20
SUBMISSIONS = 50
TOKENS = {"polite": "p" * 40, "hostile": "h" * 40}
# Two cores are shared with the attacker: what a busy neighbour costs in any case.
NOISE_S = 0.010


@pytest.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[tuple[str, int]]:
    """Address and process id."""
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await streams.routing.promote("cells", version=1, digest="sha256:1", threshold=None)
    await streams.close()
    address, tokens = f"127.0.0.1:{free_port()}", tmp_path / "tokens.yaml"
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()}
    entries = [{"name": name, "sha256": digest, "roles": ["stream"]} for name, digest in digests.items()]
    tokens.write_text(yaml.safe_dump({"tokens": entries}))
    settings = {"INGEST_BIND": address, "REDIS_URL": server.url, "METRICS_PORT": "0", "TOKENS_FILE": str(tokens)}
    env = {**os.environ, **{f"VIGIL_{name}": value for name, value in settings.items()}}
    with (tmp_path / "ingest.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - it is waited for by its health
            [sys.executable, "-m", "vigil_ingest"], env=env, stdout=log, stderr=log
        )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            await check(health_pb2.HealthCheckRequest(), timeout=90, wait_for_ready=True)
        yield address, process.pid
    finally:
        process.kill()
        process.wait()
        server.stop()


async def median_s(client: VigilClient) -> float:
    """Of a polite client's frames, from sending to acceptance."""
    found = []
    for _ in range(SUBMISSIONS):
        began = time.perf_counter()
        result = await client.submit(Frame(images()[1], "cells"), wait_for=WaitFor.ACCEPTED)
        found.append(time.perf_counter() - began)
        assert result.error is None
        await asyncio.sleep(0.01)  # its pace
    return statistics.median(found)


def memory_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
async def test_others_are_served_as_before_and_memory_stays_bounded_under(kind: str, ingest: tuple[str, int]) -> None:
    address, pid = ingest
    async with VigilClient(address, token=TOKENS["polite"], max_retry_s=10) as client:
        await median_s(client)
        quiet_s, before = await median_s(client), memory_bytes(pid)
        command = [sys.executable, "-m", "tests.support.abuse", kind, address]
        attacker = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "VIGIL_TOKEN": TOKENS["hostile"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert attacker.stdout is not None
            assert await asyncio.wait_for(attacker.stdout.readline(), 120) == b"at it\n"
            highest = before
            for _ in range(2):
                attacked_s = await median_s(client)
                highest = max(highest, memory_bytes(pid))
            assert attacker.returncode is None
        finally:
            attacker.kill()
            await attacker.wait()
    print(
        f"{kind}: {quiet_s * 1e3:.1f} ms quiet, {attacked_s * 1e3:.1f} ms attacked, {(highest - before) >> 20} MiB more"
    )
    assert attacked_s <= 2 * quiet_s + NOISE_S
    assert highest - before < GROWTH_BYTES
