"""How much a worker takes on at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.access import Role
from vigil_common.bundle import digest
from vigil_common.config import SecuritySettings
from vigil_common.errors import NotFound, Unauthenticated, VigilError
from vigil_common.grpc import security
from vigil_common.grpc.errors import from_call
from vigil_common.grpc.server import create_server
from vigil_inference import bootstrap
from vigil_inference.config import Settings

from tests.support.link import Link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BUNDLE = b"a bundle"


@pytest.mark.parametrize(
    ("share", "expected"),
    [("max 100000", 4), ("100000 100000", 1), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_worker_counts_the_cpus_it_may_use_and_no_others(
    share: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(share)
    monkeypatch.setattr(bootstrap, "CPU_SHARE", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    assert bootstrap.cpus() == expected


def test_without_control_groups_all_it_may_run_on_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CPU_SHARE", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert bootstrap.cpus() == 1


@pytest.mark.parametrize(
    ("engine", "run_s", "expected"),
    [("onnxruntime", 0.0001, 8), ("onnxruntime", 0.005, 6), ("onnxruntime", 0.02, 1), ("openvino", 0.0001, 1)],
)
def test_only_a_quick_model_takes_several_images_in_one_run(engine: str, run_s: float, expected: int) -> None:
    model: Any = SimpleNamespace(engine=SimpleNamespace(name=engine), proven=SimpleNamespace(run_s=run_s))
    assert bootstrap.usual_batch_size(model) == expected


@pytest.mark.parametrize(
    ("frozen", "asked", "takes", "expected"),
    [
        (None, 0, True, 8),
        (None, 4, True, 4),
        (None, 4, False, 1),
        (None, 0, False, 1),
        (2, 4, False, 2),
        (1, 0, True, 1),
    ],
)
def test_no_run_has_more_images_than_the_graph_takes(
    frozen: int | None,
    asked: int,
    takes: bool,  # noqa: FBT001
    expected: int,
) -> None:
    model: Any = SimpleNamespace(
        engine=SimpleNamespace(name="onnxruntime"),
        proven=SimpleNamespace(run_s=0.0001),
        manifest=SimpleNamespace(fixed_batch=frozen),
        takes=lambda _: takes,
    )
    assert bootstrap.batch_size_of(model, asked) == expected


async def test_a_worker_that_waits_for_storage_ends_when_it_is_asked_to() -> None:
    settings = Settings(model="cells", storage_address="127.0.0.1:1", inference_bind="127.0.0.1:0")
    stop = asyncio.Event()
    serving = asyncio.create_task(bootstrap.serve(settings, stop))
    await asyncio.sleep(0.1)
    assert not serving.done()
    stop.set()
    await asyncio.wait_for(serving, 5)


class FakeModels:
    """Storage's side: calls are counted, and the first may stop half-way, or the model be none."""

    def __init__(self) -> None:
        self.calls = 0
        self.there = True
        self.half = asyncio.Event()
        self.stops = False

    async def download(self, request: storage_pb2.DownloadRequest, _: Any) -> AsyncIterator[Any]:
        self.calls += 1
        if not self.there:
            raise NotFound("MODEL_UNKNOWN", f"no model {request.name}")
        version = types_pb2.ModelVersion(name=request.name, version=1, digest=digest(BUNDLE))
        yield storage_pb2.DownloadResponse(model=storage_pb2.Model(version=version))
        if self.stops and self.calls == 1:
            self.half.set()
            await asyncio.Event().wait()
        yield storage_pb2.DownloadResponse(chunk=BUNDLE)


@asynccontextmanager
async def storage(models: FakeModels, tokens: Path | None = None) -> AsyncIterator[int]:
    service = "vigil.storage.v1.ModelService"
    settings = SecuritySettings(tokens_file=tokens)
    handle = create_server("127.0.0.1:0", access={service: {"*": frozenset({Role.SERVE})}}, security=settings)
    download = grpc.unary_stream_rpc_method_handler(
        models.download, storage_pb2.DownloadRequest.FromString, storage_pb2.DownloadResponse.SerializeToString
    )
    handle.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Download": download}),))
    await handle.start()
    yield handle.port
    await handle.server.stop(0)


async def test_a_download_whose_server_vanishes_without_a_word_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(security, "PING_TIMEOUT_MS", 200)
    models = FakeModels()
    models.stops = True
    async with storage(models) as port, Link(port) as link:
        settings = Settings(model="cells", storage_address=f"127.0.0.1:{link.port}")
        fetching = asyncio.create_task(bootstrap.fetch(settings))
        await asyncio.wait_for(models.half.wait(), 5)
        link.lose()
        _, bundle = await asyncio.wait_for(fetching, 10)
    assert (bundle, models.calls) == (BUNDLE, 2)


async def test_what_storage_refuses_for_good_ends_a_worker_with_its_reason() -> None:
    models = FakeModels()
    models.there = False
    async with storage(models) as port:
        with pytest.raises(NotFound, match="no model cells") as raised:
            await bootstrap.fetch(Settings(model="cells", storage_address=f"127.0.0.1:{port}"))
    assert raised.value.reason == "MODEL_UNKNOWN"


async def test_a_token_that_is_not_known_yet_is_waited_for_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, token, models = tmp_path / "tokens", tmp_path / "token", FakeModels()
    monkeypatch.setattr(bootstrap, "RETRY_S", 0.01)

    def known(secret: str) -> None:
        entry = {"name": "worker", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "roles": ["serve"]}
        tokens.write_text(json.dumps({"tokens": [entry]}))

    known("old")
    token.write_text("new")
    refused = asyncio.Event()

    def said(error: grpc.aio.AioRpcError) -> VigilError:
        refused.set()
        return from_call(error)

    monkeypatch.setattr(bootstrap, "from_call", said)
    async with storage(models, tokens) as port:
        settings = Settings(model="cells", storage_address=f"127.0.0.1:{port}", token_file=token)
        fetching = asyncio.create_task(bootstrap.fetch(settings))
        await asyncio.wait_for(refused.wait(), 5)
        known("new")
        _, bundle = await asyncio.wait_for(fetching, 5)
        assert bundle == BUNDLE
        token.write_text("another")
        monkeypatch.setattr(bootstrap, "TOKEN_S", 0.0)
        with pytest.raises(Unauthenticated) as raised:
            await bootstrap.fetch(settings)
    assert raised.value.reason == "TOKEN_UNKNOWN"
