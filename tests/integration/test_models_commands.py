"""`vigil model` and `vigil frames replay` against the running platform, as an operator types them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, StorageClient, VigilClient

from tests.support.cells import load_cells
from tests.support.platform import MODEL, trained_bundle

if TYPE_CHECKING:
    from pathlib import Path


class Commands:
    def __init__(self, stack: LocalStack) -> None:
        self._env = {
            **os.environ,
            "VIGIL_ADDRESS": stack.ingest_address,
            "VIGIL_STORAGE_ADDRESS": stack.storage_address,
            "COLUMNS": "200",
        }

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vigil_cli", *words),
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    async def run(self, *words: str, fails: bool = False) -> str:
        process = await self.start(*words)
        output = (await process.communicate())[0].decode()
        assert (process.returncode != 0) == fails, output
        return output


async def test_a_version_is_published_shown_fetched_verified_promoted_and_deprecated(tmp_path: Path) -> None:
    bundle, fetched = tmp_path / "cells.tar", tmp_path / "fetched.tar"
    bundle.write_bytes(trained_bundle())
    async with LocalStack(tmp_path / "stack") as stack:
        vigil = Commands(stack).run
        assert f"{MODEL} version 1 published" in await vigil("model", "publish", str(bundle))
        assert "had been published before" in await vigil("model", "publish", str(bundle))
        shown = json.loads(await vigil("model", "show", MODEL, "--json"))
        assert (shown["version"], shown["published_by"], shown["deprecated"]) == (1, "anybody", "")
        assert shown["lineage"]["algorithm"] == "padim"
        await vigil("model", "download", MODEL, "-o", str(fetched))
        assert fetched.read_bytes() == trained_bundle()
        assert shown["digest"] in await vigil("model", "verify", str(fetched), "--digest", shown["digest"])
        assert "DIGEST_MISMATCH" in await vigil("model", "verify", str(fetched), "--digest", "sha256:0", fails=True)
        assert "live" not in await vigil("model", "list")
        await vigil("model", "promote", MODEL)
        assert "live" in await vigil("model", "list")
        await vigil("model", "deprecate", MODEL, "--version", "1", "--reason", "misses cracks")
        listed = await vigil("model", "list")
        assert f"{MODEL} version 1 is deprecated: misses cracks" in listed
        assert "live" in listed
        assert "is deprecated (misses cracks)" in await vigil("model", "promote", MODEL, fails=True)


async def test_a_stream_that_is_interrupted_says_what_came_back(tmp_path: Path) -> None:
    cell = tmp_path / "Zelle 1 \u00fc.png"
    cell.write_bytes(load_cells().defective[0])
    async with LocalStack(tmp_path / "stack") as stack, StorageClient(stack.storage_address) as storage:
        await storage.models_publish(trained_bundle(), name=MODEL)
        commands = Commands(stack)
        await commands.run("model", "promote", MODEL, "--threshold", "0.001")
        await stack.add_worker(MODEL, 1)
        streaming = await commands.start("stream", "-m", MODEL, *[str(cell)] * 10_000)
        async with asyncio.timeout(60):
            assert streaming.stdout is not None
            assert "anomalous" in (await streaming.stdout.readline()).decode()
        streaming.send_signal(signal.SIGINT)
        said = (await streaming.communicate())[0].decode()
        async with asyncio.timeout(30):
            while "like that" in await commands.run("frames", "query", MODEL, "--label", f"source={cell}"):
                await asyncio.sleep(0.5)
        assert "is like that" in await commands.run("frames", "query", MODEL, "--label", "source=cell.png")
        assert "NAME=VALUE" in await commands.run("frames", "query", MODEL, "--label", "source", fails=True)
    assert streaming.returncode not in (0, None)
    assert "Traceback" not in said
    assert "median latency" in said
    assert "were on their way" in said


async def test_frames_that_could_not_be_judged_are_replayed_once_what_was_wrong_is_mended(tmp_path: Path) -> None:
    async with LocalStack(tmp_path / "stack") as stack, StorageClient(stack.storage_address) as storage:
        await storage.models_publish(trained_bundle(), name=MODEL)
        vigil = Commands(stack).run
        await vigil("model", "promote", MODEL)
        # A worker that takes no image larger than a stamp.
        strict = await stack.add_worker(MODEL, 1, name="strict", MAX_IMAGE_PIXELS="100")
        frames = [Frame(image, MODEL, camera="c1") for image in load_cells().normal[:3]]
        async with VigilClient(stack.ingest_address) as client:
            refused = [result async for result in client.stream(frames)]
        assert [result.error.reason for result in refused if result.error] == ["IMAGE_TOO_LARGE"] * 3
        await stack.stop(strict)
        await stack.add_worker(MODEL, 1)
        async with asyncio.timeout(30):
            while len([one async for one in storage.frames_query(MODEL, failed=True)]) < len(frames):
                await asyncio.sleep(0.1)
        for _ in range(2):  # given twice, as after a cut: each is repeated once
            summary = await vigil("frames", "replay", MODEL, "--json", "--reason", "IMAGE_TOO_LARGE")
            assert json.loads(summary.splitlines()[-1]) == {"replayed": 3, "judged": 3, "failed": {}}
        async with asyncio.timeout(30):
            while True:
                repeats = [one async for one in storage.frames_query(MODEL) if "replay_of" in one.labels]
                if len(repeats) == len(frames):
                    break
                await asyncio.sleep(0.1)
        assert {one.labels["replay_of"] for one in repeats} == {frame.frame_id for frame in frames}
        assert all(one.verdict is not None for one in repeats)
