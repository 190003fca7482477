"""Graphs made over for speed: they say what the original says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from vigil_common.bundle import open_bundle
from vigil_common.errors import InvalidBundle
from vigil_trainer import train, variants
from vigil_trainer.graphs import open_graph
from vigil_trainer.variants import Source

from tests.support.shadow import png

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_common.bundle import Bundle


@pytest.fixture(scope="module")
def trained() -> Bundle:
    source = np.random.default_rng(0)
    normal = [png(source.normal(120, 6, (64, 64)).clip(0, 255).astype(np.uint8)) for _ in range(8)]
    return open_bundle(train(normal, name="cells").bundle)


def source_in(folder: Path, bundle: Bundle) -> Source:
    return Source(folder / bundle.manifest.artefacts["onnxruntime"].path, folder / "made", bundle.manifest, [])


def test_a_graph_that_resizes_with_antialias_is_not_made_for_openvino(trained: Bundle, tmp_path: Path) -> None:
    # OpenVINO loads it, and leaves the antialias out.
    pytest.importorskip("openvino")
    trained.extract(tmp_path)
    with pytest.raises(InvalidBundle, match="resizes with antialias"):
        variants.openvino_f32(source_in(tmp_path, trained))


def test_weights_beside_the_graph_are_taken_into_the_variant(trained: Bundle, tmp_path: Path) -> None:
    source = tmp_path / trained.manifest.artefacts["onnxruntime"].path
    trained.extract(tmp_path)
    graph = onnx.load(source)
    onnx.save(graph, source, save_as_external_data=True, location="weights.data", size_threshold=4096)
    (path,) = variants.offline(source_in(tmp_path, trained))
    blank = np.zeros((1, 3, 64, 64), dtype=np.float32)
    found, expected = (open_graph(one, trained.manifest, "onnxruntime")(blank)["pred_score"] for one in (path, source))
    assert found == pytest.approx(expected, abs=1e-4)


def graph_of(
    *nodes: onnx.NodeProto, shape: list[int | str], wanted: list[int | str], **constants: object
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, wanted)]
    known = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, value: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": value})[0])


@pytest.mark.parametrize("size", [(16, 16), (64, 40), (256, 256), (300, 299)])
def test_a_maps_resize_is_two_products_that_say_the_same(size: tuple[int, int]) -> None:
    resize = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")
    wanted = np.array([2, 1, 256, 256], dtype=np.int64)
    model = graph_of(resize, shape=[2, 1, *size], wanted=[2, 1, 256, 256], sizes=wanted)
    made = variants.resized_by_products(model)
    assert [node.op_type for node in made.graph.node] == ["MatMul", "MatMul"]
    value = np.random.default_rng(1).normal(size=(2, 1, *size)).astype(np.float32)
    assert run(made, value) == pytest.approx(run(model, value), abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ([1, 1, "h", "w"], {}),
        ([1, 64, 16, 16], {}),
        ([1, 1, 16, 16], {"mode": "nearest"}),
        ([1, 1, 16, 16], {"coordinate_transformation_mode": "align_corners"}),
        ([1, 1, 300, 300], {"antialias": 1}),
    ],
)
def test_other_resizes_stay(shape: list[int | str], how: dict[str, Any]) -> None:
    resize = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **{"mode": "linear", **how})
    sizes = np.array([1, shape[1], 256, 256], dtype=np.int64)
    model = graph_of(resize, shape=shape, wanted=[1, shape[1], 256, 256], sizes=sizes)
    assert [node.op_type for node in variants.resized_by_products(model).graph.node] == ["Resize"]


def test_where_sums_saturate_weights_have_seven_bits(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = np.random.default_rng(2)
    weights = source.normal(size=(8, 3, 3, 3)).astype(np.float32)
    model = graph_of(
        helper.make_node("Conv", ["x", "weights"], ["y"], pads=[1, 1, 1, 1]),
        shape=[1, 3, 16, 16], wanted=[1, 8, 16, 16], weights=weights,
    )  # fmt: skip
    manifest = trained.manifest.model_copy(update={"input": trained.manifest.input.model_copy(update={"name": "x"})})
    images = [source.normal(size=(1, 3, 16, 16)).astype(np.float32) for _ in range(8)]
    most = {}
    for saturate in (True, False):
        monkeypatch.setattr(variants, "sums_saturate", lambda: saturate)  # noqa: B023 - called in this round
        path = tmp_path / f"{saturate}.onnx"
        onnx.save(model, path)
        (made,) = variants.onnx_int8(Source(path, tmp_path / str(saturate), manifest, images))
        known = [numpy_helper.to_array(one) for one in onnx.load(made).graph.initializer]
        most[saturate] = max(np.abs(one.astype(int)).max() for one in known if one.shape == weights.shape)
    assert most == {True: 64, False: 127}


def test_between_two_quantised_convolutions_nothing_is_turned_to_f32_and_back(trained: Bundle, tmp_path: Path) -> None:
    source = np.random.default_rng(2)
    nodes = [
        helper.make_node("Conv", ["x", "zeroth"], ["x0"], name="reads-the-image", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x0", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "third"], ["y"], pads=[1, 1, 1, 1]),
    ]
    names = ("zeroth", "first", "second", "third")
    weights = {name: source.normal(size=(3, 3, 3, 3)).astype(np.float32) for name in names}
    bounds = {"low": np.float32(0), "high": np.float32(6)}
    model = graph_of(*nodes, shape=[1, 3, 64, 64], wanted=[1, 3, 64, 64], **weights, **bounds)
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    manifest = trained.manifest.model_copy(update={"input": trained.manifest.input.model_copy(update={"name": "x"})})
    images = [source.normal(size=(1, 3, 64, 64)).astype(np.float32) for _ in range(8)]
    (made,) = variants.onnx_int8(Source(path, tmp_path, manifest, images))
    nodes = list(onnx.load(made).graph.node)
    assert not {"Clip", "Relu"} & {node.op_type for node in nodes}
    assert next(node for node in nodes if node.name == "reads-the-image").input[:2] == ["x", "zeroth"]
    told, expected = run(onnx.load(made), images[0]), run(model, images[0])
    assert np.corrcoef(told.ravel(), expected.ravel())[0, 1] > 0.995


def test_what_reads_the_image_stays_f32(tmp_path: Path) -> None:
    weights = np.ones((3, 3, 1, 1), dtype=np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weights"], ["taught"], name="teacher"),
        helper.make_node("Conv", ["scaled", "weights"], ["learned"], name="student"),
        helper.make_node("Conv", ["scaled", "weights"], ["unnamed"]),
        helper.make_node("Relu", ["taught"], ["kept"]),
        helper.make_node("Conv", ["kept", "weights"], ["deeper"], name="deeper"),
        helper.make_node("Sum", ["deeper", "learned", "unnamed"], ["y"]),
    ]
    size: list[int | str] = [1, 3, 8, 8]
    onnx.save(graph_of(*nodes, shape=size, wanted=size, weights=weights, factor=np.float32(2)), tmp_path / "graph.onnx")
    assert variants.first_convolutions(tmp_path / "graph.onnx") == ["teacher", "student"]
