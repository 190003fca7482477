"""Variants of a trained model: kept where they say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from vigil_common.bundle import open_bundle
from vigil_common.errors import InvalidInput
from vigil_common.scores import moved
from vigil_inference.model import LoadedModel
from vigil_trainer import import_export, train
from vigil_trainer import optimise as module
from vigil_trainer.optimise import optimise
from vigil_trainer.variants import BUILDS

from tests.support.export import like_an_export
from tests.support.shadow import png

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_common.bundle import Bundle


def picture(seed: int, *, scratch: bool = False) -> bytes:
    source = np.random.default_rng(seed)
    pixels = source.normal(120, 6, (64, 64)).clip(0, 255).astype(np.uint8)
    if scratch:
        pixels[20:44, 30:34] = 255
    return png(pixels)


def of_graph(folder: Path, graph: onnx.ModelProto) -> Bundle:
    onnx.save(graph, folder / "model.onnx")
    image = folder / "parity.png"
    image.write_bytes(picture(0))
    return open_bundle(import_export(folder, name="cells", parity_images=[image]))


NORMAL = [picture(seed) for seed in range(16)]
ANOMALOUS = [picture(seed, scratch=True) for seed in range(100, 106)]


@pytest.fixture(scope="module")
def trained() -> Bundle:
    return open_bundle(train(NORMAL[:8], ANOMALOUS[:2], name="cells").bundle)


@pytest.fixture(autouse=True)
def onnx_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenVINO's tools take longer to import than all else here.
    for name, (runtime, *_) in list(BUILDS.items()):
        if runtime != "onnxruntime":
            monkeypatch.delitem(BUILDS, name)


def test_a_variant_of_full_precision_says_the_same_and_a_worker_may_take_it(trained: Bundle, tmp_path: Path) -> None:
    made = optimise(trained, calibration=NORMAL[:8], normal=NORMAL[8:], anomalous=ANOMALOUS)
    opened = open_bundle(made.bundle)
    assert opened.manifest.variants["onnxruntime-offline"].precision == "f32"
    assert opened.manifest.parity == trained.manifest.parity
    assert opened.manifest.lineage["optimised_from"] == trained.digest
    model = LoadedModel(made.bundle, tmp_path)
    assert "onnxruntime-offline" in model.choice
    assert all(sample.passed for sample in model.parity)


def test_what_ranks_worse_is_measured_but_no_variant(trained: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._judged

    def at_random(*arguments: object, **more: object) -> tuple[object, float]:
        scores, run_ms = real(*arguments, **more)  # type: ignore[arg-type]
        if arguments[3] == "int8":
            scores = np.linspace(0.9, 0.1, len(scores))
        return scores, run_ms

    monkeypatch.setattr(module, "_judged", at_random)
    made = optimise(trained, calibration=NORMAL[:8], normal=NORMAL[8:], anomalous=ANOMALOUS)
    found = next(one for one in made.measured if one.name == "onnxruntime-int8")
    assert found.refused.startswith("AUROC 0.000 instead of")
    assert set(open_bundle(made.bundle).manifest.variants) == {"onnxruntime-offline"}


def test_without_anomalous_images_nothing_less_precise_is_kept(trained: Bundle) -> None:
    made = optimise(trained, calibration=NORMAL[:8])
    refused = {one.name: one.refused for one in made.measured}
    assert refused["onnxruntime-int8"] == "no images of both kinds to compare AUROC on"


def test_variants_are_made_anew_and_not_of_variants(trained: Bundle) -> None:
    once = open_bundle(optimise(trained, calibration=NORMAL[:8]).bundle)
    again = open_bundle(optimise(once, calibration=NORMAL[:8]).bundle)
    assert set(again.files) == set(once.files)


def test_too_few_images_to_calibrate_with_are_refused(trained: Bundle) -> None:
    with pytest.raises(InvalidInput, match="8 normal images, there are 3"):
        optimise(trained, calibration=NORMAL[:3])


def test_the_threshold_is_put_where_the_fewest_labels_flip() -> None:
    reference = np.array([0.1, 0.2, 0.45, 0.55, 0.8, 0.9])
    scores = reference * 0.5 + 0.3
    threshold = module._recalibrated(scores, reference, 0.5)
    assert ((scores >= threshold) == (reference >= 0.5)).all()
    assert threshold == pytest.approx(0.55)


def test_moved_scores_keep_their_order_and_put_the_threshold_where_it_belongs() -> None:
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    found = moved(scores, 0.3, 0.5)
    assert (np.diff(found) > 0).all()
    assert found[[0, 30, 100]] == pytest.approx([0, 0.5, 1], abs=1e-6)
    assert found.dtype == np.float32


def test_what_looks_at_a_smaller_image_is_judged_by_how_it_ranks(tmp_path: Path) -> None:
    bundle = of_graph(tmp_path, like_an_export())
    made = optimise(bundle, calibration=NORMAL[:8], normal=NORMAL[8:], anomalous=ANOMALOUS, input_sizes=(48, 48, 96))
    found = {one.name: one for one in made.measured}
    assert [name for name in found if name[-2:].isdigit()] == [
        *("onnxruntime-offline-96", "onnxruntime-int8-96"),
        *("onnxruntime-offline-48", "onnxruntime-int8-48"),
    ]
    assert found["onnxruntime-offline-96"].refused == "the graph looks at 64 x 64 pixels already"
    smaller = found["onnxruntime-offline-48"]
    assert (smaller.refused, smaller.auroc, smaller.flips) == ("", 1.0, 0)
    assert smaller.furthest > module.TOLERANCE
    variant = open_bundle(made.bundle).manifest.variants["onnxruntime-offline-48"]
    assert variant.threshold == smaller.threshold
    # A worker proves each on samples of its own, and their scores stand on the bundle's scale.
    model = LoadedModel(made.bundle, tmp_path / "worker")
    assert "onnxruntime-offline-48" in model.choice
