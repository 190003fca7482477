"""`vigil model optimise`: which stored frames it learns from and measures by."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import pytest
from vigil.storage.v1 import storage_pb2_grpc
from vigil_cli import optimise as module
from vigil_cli.optimise import gather_images
from vigil_client import StorageClient, StoredFrame
from vigil_common.config import SecuritySettings
from vigil_common.grpc.server import create_server
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.ports import Record
from vigil_common.streams.memory import MemoryStreams
from vigil_storage.annotations import Heard
from vigil_storage.app import Storage
from vigil_storage.bootstrap import ACCESS
from vigil_storage.reviews import Reviews
from vigil_storage.servicer import FrameServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

M = "cells"
T0 = 1_750_000_000_000_000


class Bench:
    """A store behind its service, and a client of it."""

    def __init__(self, frames: EmbeddedFrameStore, client: StorageClient) -> None:
        self.client = client
        self._frames = frames
        self._count = 0

    async def keep(self, image: str, *, judged: str = "normal", human: str = "") -> None:
        """A frame as it stands once it was judged, and reviewed where a person says something."""
        self._count += 1
        body = image.encode()
        labels = {
            "frame_id": f"f{self._count}",
            "sha256": hashlib.sha256(body).hexdigest(),
            "model": M,
            "camera": "cam1",
            "captured_at_us": str(T0 + self._count),
            "width": "8",
            "height": "6",
            "outcome": "judged",
            "score": "0.1" if judged == "normal" else "0.9",
            "threshold": "0.5",
            "label": judged,
            "version": "1",
            **({"human": human} if human else {}),
        }
        await self._frames.write([Record(f"{M}/cam1", T0 + self._count * 100_000, labels, body, "image/png")])

    async def drop(self, frame_id: str) -> None:
        """As retention does."""
        await self._frames._db.execute("DELETE FROM frames WHERE frame_id = ?", (frame_id,))

    async def images(self, normal: Path | None = None) -> tuple[list[str], list[str]]:
        good, bad = await gather_images(self.client, M, normal, None)
        return [image.decode() for image in good], [image.decode() for image in bad]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    frames = await EmbeddedFrameStore.open(tmp_path / "frames")
    annotations = await EmbeddedFrameStore.open(tmp_path / "annotations")
    log = MemoryStreams().reviews
    reviews = Reviews(frames, annotations, log, heard=Heard(), now_us=lambda: T0 + 10**9, chance=random.Random(1))
    handle = create_server("127.0.0.1:0", access=ACCESS, security=SecuritySettings())
    storage_pb2_grpc.add_FrameServiceServicer_to_server(FrameServicer(Storage(frames, None), reviews), handle.server)  # type: ignore[arg-type]
    await handle.start()
    async with StorageClient(f"127.0.0.1:{handle.port}") as client:
        yield Bench(frames, client)
    await handle.drain(0)
    await frames.close()
    await annotations.close()


async def test_reviewed_frames_come_first_and_those_judged_normal_fill_up(bench: Bench) -> None:
    await bench.keep("judged 1")
    await bench.keep("reviewed 1", human="normal")
    await bench.keep("judged 2")
    await bench.keep("reviewed 2", judged="anomalous", human="normal")
    await bench.keep("alarm", judged="anomalous")
    assert await bench.images() == (["reviewed 1", "reviewed 2", "judged 1", "judged 2"], [])


async def test_no_more_are_taken_than_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEASURED_IMAGES", 3)
    for number in range(2):
        await bench.keep(f"judged {number}")
        await bench.keep(f"reviewed {number}", human="normal")
    assert await bench.images() == (["reviewed 0", "reviewed 1", "judged 0"], [])


async def test_what_people_called_otherwise_is_not_normal_though_it_was_judged_so(bench: Bench) -> None:
    await bench.keep("judged")
    await bench.keep("missed", human="anomalous")
    await bench.keep("unclear", human="unsure")
    assert await bench.images() == (["judged"], ["missed"])


async def test_what_retention_drops_meanwhile_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        await bench.keep(f"judged {number}")
    get = bench.client.frames_get

    async def dropped_first(model: str, frame_id: str, *, camera: str | None = None) -> tuple[StoredFrame, bytes]:
        if frame_id == "f1":
            await bench.drop(frame_id)
        return await get(model, frame_id, camera=camera)

    monkeypatch.setattr(bench.client, "frames_get", dropped_first)
    assert await bench.images() == (["judged 1", "judged 2"], [])


async def test_no_image_is_of_both_kinds(bench: Bench, tmp_path: Path) -> None:
    await bench.keep("scratch", human="anomalous")
    await bench.keep("scratch")
    await bench.keep("scratch", human="normal")
    await bench.keep("smooth")
    assert await bench.images() == (["smooth"], ["scratch"])
    folder = tmp_path / "normal"
    folder.mkdir()
    for image in ("scratch", "clean"):
        (folder / f"{image}.png").write_text(image)
    assert await bench.images(folder) == (["clean"], ["scratch"])
