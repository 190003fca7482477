"""A token of one model reads and changes nothing of another's, and what it changes is written down under its name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from vigil.inference.v1 import inference_pb2
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.access import ANYBODY, Principal, Role, enter
from vigil_common.bundle import Artefact, Manifest, ModelOutputs, digest, pack
from vigil_common.errors import Forbidden, InvalidInput
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_inference.servicer import InferenceServicer
from vigil_storage.app import Storage
from vigil_storage.servicer import FrameServicer, ModelServicer, RouteServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

NUTS_ONLY = Principal("nuts-publisher", frozenset({Role.PUBLISH, Role.REVIEW}), frozenset({"nuts"}))


def a_bundle(name: str) -> bytes:
    artefact = Artefact(path="model.onnx", files=())
    manifest = Manifest(name=name, artefacts={"onnxruntime": artefact}, outputs=ModelOutputs(score="pred_score"))
    return pack(manifest, {"model.onnx": b"x"})


async def parts(name: str) -> AsyncIterator[storage_pb2.PublishRequest]:
    bundle = a_bundle(name)
    header = storage_pb2.PublishHeader(name=name, digest=digest(bundle), size_bytes=len(bundle))
    yield storage_pb2.PublishRequest(header=header)
    yield storage_pb2.PublishRequest(chunk=bundle)


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[Storage]:
    frames, models = await EmbeddedFrameStore.open(tmp_path), await EmbeddedModelStore.open(tmp_path)
    app = Storage(frames, models)
    for name in ("cells", "nuts"):
        await ModelServicer(app).Publish(parts(name), None)
    yield app
    await frames.close()
    await models.close()


@pytest.fixture(autouse=True)
def _anybody_again() -> Iterator[None]:
    yield
    enter(ANYBODY)


CALLS: dict[str, Any] = {
    "Query": lambda model: storage_pb2.QueryRequest(model=model),
    "Get": lambda model: storage_pb2.GetRequest(model=model, frame_id="f"),
    "Annotate": lambda model: storage_pb2.AnnotateRequest(model=model),
    "ReviewQueue": lambda model: storage_pb2.ReviewQueueRequest(model=model),
    "Export": lambda model: storage_pb2.ExportRequest(model=model),
    "GetModel": lambda name: storage_pb2.GetModelRequest(name=name),
    "Download": lambda name: storage_pb2.DownloadRequest(name=name),
    "Deprecate": lambda name: storage_pb2.DeprecateRequest(name=name, version=1, reason="worn out"),
    "Publish": parts,
    "Promote": lambda model: storage_pb2.PromoteRequest(model=model),
    "StartComparison": lambda model: storage_pb2.StartComparisonRequest(model=model),
    "StopComparison": lambda model: storage_pb2.StopComparisonRequest(model=model),
    "ListRoutes": lambda model: storage_pb2.ListRoutesRequest(model=model),
}
SERVICES = storage_pb2.DESCRIPTOR.services_by_name
METHODS = [(name, method.name) for name, service in SERVICES.items() for method in service.methods]


@pytest.mark.parametrize(("service", "method"), [found for found in METHODS if found[1] != "List"])
async def test_every_call_of_storage_refuses_a_token_of_another_model(
    storage: Storage, service: str, method: str
) -> None:
    nobody: Any = None
    servicers = {
        "FrameService": FrameServicer(storage, nobody),
        "ModelService": ModelServicer(storage),
        "RouteService": RouteServicer(nobody),
    }
    enter(NUTS_ONLY)
    with pytest.raises(Forbidden) as caught:
        await answered(getattr(servicers[service], method)(CALLS[method]("cells"), None))
    assert caught.value.reason == "MODEL_NOT_ALLOWED"


async def answered(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def test_a_list_of_models_holds_only_those_that_the_token_has(storage: Storage) -> None:
    rpc = ModelServicer(storage)
    assert [found.version.name for found in (await rpc.List(storage_pb2.ListRequest(), None)).models] == [
        "cells",
        "nuts",
    ]
    enter(NUTS_ONLY)
    assert [found.version.name for found in (await rpc.List(storage_pb2.ListRequest(), None)).models] == ["nuts"]


async def test_a_worker_asked_directly_holds_its_model_against_the_token() -> None:
    nobody: Any = None
    rpc = InferenceServicer(nobody, nobody, types_pb2.ModelVersion(name="cells", version=1), threads=1)
    enter(NUTS_ONLY)
    with pytest.raises(Forbidden):
        await rpc.Predict(inference_pb2.PredictRequest(frame_id="f"), nobody)


async def test_a_worker_takes_no_threshold_that_no_score_reaches() -> None:
    nobody: Any = None
    rpc = InferenceServicer(nobody, nobody, types_pb2.ModelVersion(name="cells", version=1), threads=1)
    with pytest.raises(InvalidInput) as refused:
        await rpc.Predict(inference_pb2.PredictRequest(frame_id="f", threshold=math.nan), nobody)
    assert refused.value.reason == "THRESHOLD_INVALID"


async def test_publication_and_deprecation_are_written_down_with_who_did_it(tmp_path: Path) -> None:
    models = await EmbeddedModelStore.open(tmp_path)
    rpc = ModelServicer(Storage(None, models))  # type: ignore[arg-type]
    enter(NUTS_ONLY)
    with structlog.testing.capture_logs() as lines:
        await rpc.Publish(parts("nuts"), None)
        await rpc.Deprecate(storage_pb2.DeprecateRequest(name="nuts", version=1, reason="worn out"), None)
    await models.close()
    said = [(line["action"], line["by"], line["model"], line["version"]) for line in lines if line["event"] == "audit"]
    assert said == [("published", "nuts-publisher", "nuts", 1), ("deprecated", "nuts-publisher", "nuts", 1)]
