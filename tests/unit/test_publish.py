"""Publishing through the service's RPCs into the embedded store: whole, once, for good, or not at all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from vigil.storage.v1 import storage_pb2
from vigil_common.access import ANYBODY, Principal, Role, enter
from vigil_common.bundle import Artefact, Manifest, ModelOutputs, digest, pack
from vigil_common.errors import Conflict, InvalidBundle, InvalidInput, NotFound
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_storage.app import Storage
from vigil_storage.servicer import ModelServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHUNK = 1000


def a_bundle(content: bytes, name: str = "cells") -> bytes:
    artefact = Artefact(path="model.onnx", files=())
    manifest = Manifest(name=name, artefacts={"onnxruntime": artefact}, outputs=ModelOutputs(score="pred_score"))
    return pack(manifest, {"model.onnx": content})


class Publisher:
    def __init__(self, models: EmbeddedModelStore) -> None:
        self.models = models
        self.rpc = ModelServicer(Storage(None, models))  # type: ignore[arg-type]

    async def publish(self, bundle: bytes, *, stop_at: int | None = None, **header: Any) -> storage_pb2.PublishResponse:
        fields: dict[str, Any] = {"name": "cells", "digest": digest(bundle), "size_bytes": len(bundle)} | header

        async def parts() -> AsyncIterator[storage_pb2.PublishRequest]:
            yield storage_pb2.PublishRequest(header=storage_pb2.PublishHeader(**fields))
            for offset in range(0, len(bundle) if stop_at is None else stop_at, CHUNK):
                yield storage_pb2.PublishRequest(chunk=bundle[offset : offset + CHUNK])

        return await self.rpc.Publish(parts(), None)

    async def versions(self) -> list[int]:
        return [info.version for info in await self.models.list("cells")]


@pytest.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    models = await EmbeddedModelStore.open(tmp_path)
    yield Publisher(models)
    await models.close()


async def test_the_same_bundle_is_one_version_and_comes_back_byte_for_byte(publisher: Publisher) -> None:
    one, two = a_bundle(b"a" * 5000), a_bundle(b"b" * 3_000_000)
    answers = [await publisher.publish(bundle) for bundle in (one, one, two)]
    assert [(a.model.version.version, a.created) for a in answers] == [(1, True), (1, False), (2, True)]
    parts = [part async for part in publisher.rpc.Download(storage_pb2.DownloadRequest(name="cells"), None)]
    assert parts[0].model == answers[2].model
    assert b"".join(part.chunk for part in parts[1:]) == two
    found = await publisher.rpc.GetModel(storage_pb2.GetModelRequest(name="cells", version=1), None)
    assert found.model == answers[0].model
    assert found.model.formats == ["onnxruntime"]


async def test_a_version_that_is_taken_by_another_bundle_is_refused(publisher: Publisher) -> None:
    await publisher.publish(a_bundle(b"a"))
    with pytest.raises(Conflict) as taken:
        await publisher.publish(a_bundle(b"b"), version=1)
    assert taken.value.reason == "VERSION_EXISTS"
    assert await publisher.versions() == [1]
    assert (await publisher.publish(a_bundle(b"a"), version=7)).model.version.version == 7
    assert (await publisher.publish(a_bundle(b"b"), version=2**31 - 1)).created


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "sha256:" + "0" * 64}, "DIGEST_MISMATCH"),
        ({"digest": ""}, "HEADER_INVALID"),
        ({"name": "other"}, "NAME_MISMATCH"),
        ({"name": "../x"}, "HEADER_INVALID"),
        ({"version": 2**31}, "VERSION_INVALID"),
        ({"version": 2**64 - 1}, "VERSION_INVALID"),
        ({"size_bytes": 0}, "BUNDLE_TOO_LARGE"),
        ({"size_bytes": 2**40}, "BUNDLE_TOO_LARGE"),
        ({"size_bytes": 100}, "BUNDLE_TOO_LARGE"),
        ({"stop_at": 3000}, "BUNDLE_CORRUPT"),
        ({"stop_at": 0}, "BUNDLE_CORRUPT"),
    ],
)
async def test_what_is_not_as_the_header_says_leaves_nothing(
    publisher: Publisher, change: dict[str, Any], reason: str
) -> None:
    bundle = a_bundle(b"a" * 5000)
    with pytest.raises((InvalidBundle, InvalidInput)) as refused:
        await publisher.publish(bundle, **change)
    assert refused.value.reason == reason
    assert await publisher.versions() == []
    assert (await publisher.publish(bundle)).created


async def test_a_client_that_vanishes_leaves_nothing(publisher: Publisher, tmp_path: Path) -> None:
    bundle = a_bundle(b"a" * 5000)

    async def parts() -> AsyncIterator[storage_pb2.PublishRequest]:
        header = storage_pb2.PublishHeader(name="cells", digest=digest(bundle), size_bytes=len(bundle))
        yield storage_pb2.PublishRequest(header=header)
        yield storage_pb2.PublishRequest(chunk=bundle[:CHUNK])
        raise asyncio.CancelledError  # as gRPC ends the handler

    with pytest.raises(asyncio.CancelledError):
        await publisher.rpc.Publish(parts(), None)
    assert await publisher.versions() == []
    assert list((tmp_path / "models").iterdir()) == []


class CountingModels(EmbeddedModelStore):
    """Counts uploads that run at once; each waits until it is let go, and the first fails."""

    def count(self) -> None:
        self.now = self.most = self.begun = 0
        self.go = asyncio.Semaphore(0)

    async def upload(self, name: str, digest: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        self.now, self.begun = self.now + 1, self.begun + 1
        self.most = max(self.most, self.now)
        try:
            first = self.begun == 1
            await self.go.acquire()
            if first:
                raise ConnectionResetError
            await super().upload(name, digest, size_bytes, chunks)
        finally:
            self.now -= 1


async def test_a_bundle_is_uploaded_by_one_at_a_time_however_many_wait_and_whoever_gives_up(tmp_path: Path) -> None:
    models = await CountingModels.open(tmp_path)
    models.count()
    publisher, bundle = Publisher(models), a_bundle(b"a" * 5000)
    calls = [asyncio.create_task(publisher.publish(bundle)) for _ in range(2)]

    async def begun(count: int) -> None:
        async with asyncio.timeout(10):
            while models.begun < count:
                await asyncio.sleep(0)

    await begun(1)
    models.go.release()
    await begun(2)  # the second, who waited, while a third comes
    calls.append(asyncio.create_task(publisher.publish(bundle)))
    for _ in range(100):
        await asyncio.sleep(0)
    for _ in range(3):
        models.go.release()
    results = await asyncio.gather(*calls, return_exceptions=True)
    await models.close()
    assert isinstance(results[0], ConnectionResetError)
    assert [answer.created for answer in results[1:]] == [True, False]  # type: ignore[union-attr]
    assert models.most == 1


async def test_who_published_is_kept_and_a_deprecation_needs_a_reason(publisher: Publisher) -> None:
    enter(Principal("trainer-7", frozenset({Role.PUBLISH}), None))
    try:
        assert (await publisher.publish(a_bundle(b"a"))).model.published_by == "trainer-7"
    finally:
        enter(ANYBODY)

    async def deprecate(version: int, reason: str) -> storage_pb2.Model:
        request = storage_pb2.DeprecateRequest(name="cells", version=version, reason=reason)
        return (await publisher.rpc.Deprecate(request, None)).model

    for bad in ("", "  ", "x" * 1001):
        with pytest.raises(InvalidInput):
            await deprecate(1, bad)
    with pytest.raises(NotFound):
        await deprecate(2, "why")
    assert (await deprecate(1, " misses cracks ")).deprecated == "misses cracks"
