"""How the faster variants of a model's ONNX graph are made; `optimise` measures them and keeps what says the same."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime import quantization
from vigil_common.errors import InvalidBundle

from vigil_trainer.features import IR_VERSION, OPSET, open_session
from vigil_trainer.graphs import load_openvino
from vigil_trainer.input_size import readers_of_the_image, shapes_of, with_input_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from vigil_common.bundle import Manifest, Precision, Runtime
    from vigil_common.pixels import Tensor

    # Makes a graph's files, the graph first.
    Build = Callable[["Source"], list[Path]]

# Of a batch of maps: batch, channels, height, width.
PLANES, FEW_CHANNELS = 4, 4


@dataclass(frozen=True, slots=True)
class Source:
    """What variants are made of.

    Attributes:
        graph: The ONNX graph.
        made: Folder for what is made.
        manifest: Of its bundle.
        images: To calibrate with, each [1, 3, H, W].
        suffix: Ends the name of each variant, for those of one graph to differ from another's.
    """

    graph: Path
    made: Path
    manifest: Manifest
    images: Sequence[Tensor]
    suffix: str = ""

    def target(self, name: str) -> Path:
        """A folder for what is called so."""
        path = self.made / f"{name}{self.suffix}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def of_size(self, size: int) -> Source:
        """The same with its image smaller, see `with_input_size`.

        Raises:
            InvalidBundle: MODEL_UNLOADABLE where the graph can't be had so.
        """
        path = self.target("input") / f"{size}.onnx"
        smaller = Source(path, self.made, self.manifest, self.images, f"-{size}")
        onnx.save(with_input_size(onnx.load(self.graph), size), path)
        try:
            shapes = smaller.output_shapes()
        except Exception as error:  # the runtime's own exceptions share no base
            why = f"at {size} pixels the graph fails: it has sizes written down further on"
            raise InvalidBundle("MODEL_UNLOADABLE", why) from error
        if shapes != self.output_shapes():
            raise InvalidBundle("MODEL_UNLOADABLE", f"at {size} pixels the graph's maps have another size")
        return smaller

    def output_shapes(self) -> list[tuple[int, ...]]:
        """Of all that the graph says of the first image."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is said by the error
        session = onnxruntime.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])
        tensor = np.repeat(self.images[0], self.manifest.fixed_batch or 1, axis=0)
        return [np.shape(found) for found in session.run(None, {self.manifest.input.name: tensor})]


def offline(source: Source) -> list[Path]:
    """What ONNX Runtime makes of it at each load, done once; without the layouts of one kind of processor."""
    path = source.target("offline") / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source.graph), options, providers=["CPUExecutionProvider"])
    # It goes on pointing at weights that lie beside the source.
    made = onnx.load(path, load_external_data=False)
    onnx.load_external_data_for_model(made, str(source.graph.parent))
    onnx.save(made, path)
    return [path]


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Feeds images to the calibration."""

    def __init__(self, source: Source) -> None:
        batch, name = source.manifest.fixed_batch or 1, source.manifest.input.name
        self._left: Iterator[dict[str, Tensor]] = ({name: np.repeat(image, batch, axis=0)} for image in source.images)

    def get_next(self) -> dict[str, Tensor] | None:
        """The next image, None after the last."""
        return next(self._left, None)


@cache
def sums_saturate() -> bool:
    """Whether ONNX Runtime cuts sums of two eight-bit products at 16 bits here.

    It does on processors with AVX2 but no instructions for such products, and would say nothing; weights of seven bits
    stay below.
    """
    length, largest, most = 8, 255, 127
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["sum"])],
        "sums",
        [
            helper.make_tensor_value_info("left", TensorProto.UINT8, [1, length]),
            helper.make_tensor_value_info("right", TensorProto.INT8, [length, 1]),
        ],
        [helper.make_tensor_value_info("sum", TensorProto.INT32, [1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    left, right = np.full((1, length), largest, np.uint8), np.full((length, 1), most, np.int8)
    found = open_session(model.SerializeToString()).run(None, {"left": left, "right": right})[0]
    return int(found[0, 0]) != length * largest * most


def onnx_int8(source: Source) -> list[Path]:
    """Convolutions with eight bits in and out and per-channel weights; the first ones and the comparison stay f32.

    What reads the image takes as long in f32, and every later convolution gets what it is off: of STFPM's AUROC 0.007
    were lost with it and 0.003 without, on a processor that takes weights of seven bits. Activations between two
    convolutions go into the bounds of what the first gives. Left out, each would be turned to f32 and back, which took
    a third of STFPM's time and most of what its scores were off.
    """
    path = source.target("onnx-int8") / "model.onnx"
    if path.exists():
        return [path]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on graphs by warnings of the root logger
    try:
        quantization.quantize_static(
            str(source.graph),
            str(path),
            _Reader(source),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "Relu"],
            nodes_to_exclude=first_convolutions(source.graph),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=sums_saturate(),
        )
    finally:
        root.setLevel(level)
    return [path]


def first_convolutions(path: Path) -> list[str]:
    """Names of the graph's convolutions with no other between them and the image, where they have one."""
    graph = onnx.load(path, load_external_data=False).graph
    names = (node.name for node in readers_of_the_image(graph) if node.op_type == "Conv")
    return list(filter(None, names))


def _save_for_openvino(graph: Path, path: Path) -> list[Path]:
    """The graph as OpenVINO keeps it.

    Raises:
        InvalidBundle: MODEL_UNLOADABLE where the graph resizes with antialias, which OpenVINO 2026.4 loads and leaves
            out: pixels of the built-in model's small image come out up to 0.03 off, its scores 0.04.
    """
    openvino = load_openvino()
    model = onnx.load(graph)
    if any(_attributes(node).get("antialias") for node in model.graph.node if node.op_type == "Resize"):
        raise InvalidBundle("MODEL_UNLOADABLE", "the graph resizes with antialias, OpenVINO does without")
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "model.onnx"
        onnx.save(resized_by_products(model), changed, save_as_external_data=True)
        openvino.save_model(openvino.convert_model(changed), path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def resized_by_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its maps' bilinear resizes as two products with constant weights each.

    OpenVINO takes 0.9 ms to bring one map to 256 x 256, the products 0.05. Only where the graph knows both sizes, and
    for few channels: the weights grow with the sizes, and their work with the channels too.
    """
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    shapes = shapes_of(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        before, after = (shapes.get(name, []) for name in (node.input[0] if node.input else "", node.output[0]))
        if not _is_plain_resize(node, before, after):
            nodes.append(node)
            continue
        rows, columns, between = (f"{node.output[0]}_{part}" for part in ("rows", "columns", "between"))
        graph.initializer.append(onnx.numpy_helper.from_array(_bilinear(before[2], after[2]), rows))
        graph.initializer.append(onnx.numpy_helper.from_array(_bilinear(before[3], after[3]).T, columns))
        nodes.append(onnx.helper.make_node("MatMul", [rows, node.input[0]], [between], name=f"{node.name}_rows"))
        nodes.append(onnx.helper.make_node("MatMul", [between, columns], [node.output[0]], name=f"{node.name}_columns"))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _is_plain_resize(node: onnx.NodeProto, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether it is bilinear, without antialias, of few channels and between sizes that are known."""
    if node.op_type != "Resize" or len(before) != PLANES or len(after) != PLANES:
        return False
    said = _attributes(node)
    return (
        said.get("mode") == b"linear"
        and said.get("coordinate_transformation_mode", b"half_pixel") == b"half_pixel"
        and said.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
        and not any(said.get(name) for name in ("antialias", "exclude_outside", "axes"))
        and before[:2] == after[:2]
        and 0 < before[1] <= FEW_CHANNELS
        and all((*before[2:], *after[2:]))
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def _bilinear(size: int, wanted: int) -> NDArray[np.float32]:
    """Weights [wanted, size] that bring a row of one size to another, pixels' centres on each other."""
    place = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    weights: NDArray[np.float32] = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size))).astype(np.float32)
    return weights


def openvino_f32(source: Source) -> list[Path]:
    """OpenVINO's own files of the graph, whose weights stay f32; what its arithmetic is, is said when it is loaded."""
    path = source.target("openvino") / "model.xml"
    if path.exists():
        return [path, path.with_suffix(".bin")]
    return _save_for_openvino(source.graph, path)


def openvino_int8(source: Source) -> list[Path]:
    """The same quantised graph in OpenVINO.

    NNCF's own quantisation of STFPM was as fast, and ranked worse: by 0.008 of AUROC where it kept to convolutions, by
    0.03 where it did not.
    """
    (graph,) = onnx_int8(source)
    return _save_for_openvino(graph, source.target("openvino-int8") / "model.xml")


# Every variant that is tried, by name; OpenVINO's f32 too where the bundle has one, for its resizes.
BUILDS: dict[str, tuple[Runtime, Precision, Build]] = {
    "onnxruntime-offline": ("onnxruntime", "f32", offline),
    "onnxruntime-int8": ("onnxruntime", "int8", onnx_int8),
    "openvino-f32": ("openvino", "f32", openvino_f32),
    "openvino-bf16": ("openvino", "bf16", openvino_f32),
    "openvino-int8": ("openvino", "int8", openvino_int8),
}
