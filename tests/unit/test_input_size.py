"""Graphs that look at a smaller image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from vigil_common.bundle import open_bundle
from vigil_common.errors import InvalidBundle
from vigil_trainer import import_export
from vigil_trainer.input_size import with_input_size
from vigil_trainer.variants import Source

from tests.support.export import like_an_export, node

if TYPE_CHECKING:
    from pathlib import Path


def run(model: onnx.ModelProto, image: np.ndarray, *names: str) -> list[np.ndarray]:
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "anomaly_map")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(list(names), {"input": image})]


def test_all_up_to_the_map_becomes_smaller_and_the_map_stays() -> None:
    made = with_input_size(like_an_export(), 32)
    onnx.checker.check_model(made, full_check=True)
    found = run(made, np.ones((2, 3, 100, 80), dtype=np.float32), "image", "normalised", "anomaly_map")
    assert [value.shape for value in found] == [(2, 3, 32, 32), (2, 2, 8, 8), (2, 1, 64, 64)]


def test_the_size_is_of_the_shorter_side() -> None:
    made = with_input_size(like_an_export(size=(64, 128)), 48)
    (image,) = run(made, np.ones((1, 3, 100, 80), dtype=np.float32), "image")
    assert image.shape == (1, 3, 48, 96)


def test_of_the_same_picture_it_says_much_the_same() -> None:
    wave = 0.5 + 0.4 * np.sin(np.linspace(0, 6, 64, dtype=np.float32))
    smooth = np.broadcast_to(wave, (1, 3, 64, 64))
    (expected,) = run(like_an_export(), smooth, "anomaly_map")
    (found,) = run(with_input_size(like_an_export(), 48), smooth, "anomaly_map")
    assert np.ptp(expected) > 0.1
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("model", "size", "why"),
    [
        (like_an_export(), 64, "looks at 64 x 64 pixels"),
        (like_an_export(padded=True), 32, "does not bring its input to a size"),
    ],
)
def test_others_are_refused(model: onnx.ModelProto, size: int, why: str) -> None:
    with pytest.raises(InvalidBundle, match=why):
        with_input_size(model, size)


def source(folder: Path, model: onnx.ModelProto) -> Source:
    onnx.save(model, folder / "model.onnx")
    manifest = open_bundle(import_export(folder, name="cells")).manifest
    return Source(folder / "model.onnx", folder / "made", manifest, [np.ones((1, 3, 100, 80), dtype=np.float32)])


def test_variants_are_made_of_it_under_names_of_their_own(tmp_path: Path) -> None:
    made = source(tmp_path, like_an_export()).of_size(32)
    assert made.target("offline").name == "offline-32"
    assert made.output_shapes() == [(1, 1), (1, 1, 64, 64)]


def test_a_size_that_is_written_down_further_on_is_told(tmp_path: Path) -> None:
    model = like_an_export()
    # What torch makes of a view: so many features, whatever comes.
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2, 256]), "flat"))
    model.graph.node.append(node("Reshape", ["normalised", "flat"], "viewed"))
    model.graph.output.append(helper.make_tensor_value_info("viewed", TensorProto.FLOAT, None))
    with pytest.raises(InvalidBundle, match="at 40 pixels the graph fails: it has sizes written down"):
        source(tmp_path, model).of_size(40)
