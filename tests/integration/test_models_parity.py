"""Real Anomalib exports: what the service says is what a direct run of the same runtime says."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
from PIL import Image
from vigil_common.bundle import open_bundle, pack
from vigil_common.errors import InvalidBundle
from vigil_inference.model import LoadedModel
from vigil_inference.pipeline import Pipeline
from vigil_trainer.importer import import_export

from tests.support.cells import load_cells

MODELS = Path(os.environ.get("VIGIL_TEST_MODELS", "absent"))
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="VIGIL_TEST_MODELS names no folder of exports")
TOLERANCE = 1e-4
BATCH = 2
NAMES = {"elpv-stfpm": "cells-stfpm", "elpv-patchcore": "cells-patchcore"}


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return load_cells().test_images[:12]


@pytest.fixture(scope="module", params=list(NAMES))
def export(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


@pytest.fixture(scope="module")
def bundle(export: Path, images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    samples = []
    for index, image in enumerate(images[:2]):
        samples.append(tmp_path_factory.mktemp("parity") / f"{index}.png")
        samples[-1].write_bytes(image)
    return import_export(export, name=NAMES[export.name], parity_images=samples)


def direct_onnx(export: Path) -> Any:
    session = onnxruntime.InferenceSession(str(export / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(names, {"input": batch}), strict=True))


def direct_openvino(export: Path) -> Any:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(export / "openvino" / "model.xml"), "CPU", settings)
    return lambda batch: {output.get_any_name(): value for output, value in compiled([batch]).items()}


DIRECT = {"onnxruntime": direct_onnx, "openvino": direct_openvino}


def plain_tensor(image: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=np.float32) / 255
    return np.repeat(pixels.transpose(2, 0, 1)[None], BATCH, axis=0)


@pytest.mark.parametrize("engine", list(DIRECT))
async def test_the_pipeline_scores_as_a_direct_run_does(
    export: Path, bundle: bytes, engine: str, images: list[bytes], tmp_path: Path
) -> None:
    run = DIRECT[engine](export)
    model = LoadedModel(bundle, tmp_path, engine=engine, runs=2)
    assert model.engine.name == engine
    assert model.parity
    assert all(sample.passed for sample in model.parity)
    pipeline = Pipeline(model, max_pixels=1_000_000, batch_size=model.manifest.fixed_batch or 1, runs=2)
    pipeline.start()
    try:
        found = await asyncio.gather(*(pipeline.judge(image, pictures=True) for image in images))
    finally:
        await pipeline.close()
    expected = [run(plain_tensor(image)) for image in images]
    scores = [float(one["pred_score"].reshape(-1)[0]) for one in expected]
    assert [one.score for one in found] == pytest.approx(scores, abs=TOLERANCE)
    assert np.ptp(scores) > 0.1
    for judged, one in zip(found, expected, strict=True):
        assert judged.map is not None
        assert judged.mask is not None
        assert np.allclose(judged.map, one["anomaly_map"][0, 0], atol=1e-3)
        assert (judged.mask != one["pred_mask"][0, 0].astype(bool)).mean() < 1e-3


def test_both_runtimes_say_the_same(bundle: bytes, images: list[bytes], tmp_path: Path) -> None:
    batch = plain_tensor(images[1])
    scores = [
        LoadedModel(bundle, tmp_path / engine, engine=engine).judge(batch, pictures=False).score for engine in DIRECT
    ]
    assert np.allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize("engine", list(DIRECT))
def test_a_recorded_score_that_does_not_come_out_again_refuses_the_bundle(
    bundle: bytes, engine: str, tmp_path: Path
) -> None:
    opened = open_bundle(bundle)
    first, *rest = opened.manifest.parity
    wrong = first.model_copy(update={"score": first.score + 2 * first.tolerance})
    other = pack(opened.manifest.model_copy(update={"parity": (wrong, *rest)}), opened.files)
    with pytest.raises(InvalidBundle) as caught:
        LoadedModel(other, tmp_path, engine=engine)
    assert caught.value.reason == "PARITY_FAILED"
