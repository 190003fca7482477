"""Fixed image features as ONNX nodes, so that training and serving compute the very same numbers.

No weights are learned: dark and bright lines in six directions at three scales, relative to the image's own brightness
and texture, and brightness and colour, all pooled to a grid of 32 x 32 positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLOURS = 3
SIZE = 128
GRID = 32
INPUT = "input"
OPSET, IR_VERSION = 18, 9
SCALES = 3
ORIENTATIONS = 6
SIDE_BY_SIDE = 2
LINE_WIDTH, LINE_LENGTH, KERNEL = 1.2, 3.5, 9
_EPSILON = 1e-3
_DARKEST = 0.05


class Graph:
    """An ONNX graph that grows node by node; each method answers the name of what it added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Add a constant."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scalar(self, value: float) -> str:
        """Add a float constant."""
        return self.constant(np.float32(value))

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output."""
        name = output or f"node_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def reduce(self, kind: str, value: str, *axes: int, keepdims: int = 1) -> str:
        """Add a reduction over axes."""
        return self.add(kind, value, self.constant(np.array(axes)), keepdims=keepdims)

    def pool(self, kind: str, value: str, size: int) -> str:
        """Add a pooling over squares side by side."""
        return self.add(kind, value, kernel_shape=[size, size], strides=[size, size])

    def mean_of_channels(self, value: str, channels: int, side: int, *, times: float = 1.0) -> str:
        """Add the mean of the channels of [batch, channels, side, side], times a number; [batch, 1, side, side].

        As a product: runtimes take ten times as long to reduce the channels of one image alone.
        """
        rows = self.add("Reshape", value, self.constant(np.array([0, channels, side * side])))
        mean = self.add("MatMul", self.constant(np.full((1, channels), times / channels, dtype=np.float32)), rows)
        return self.add("Reshape", mean, self.constant(np.array([0, 1, side, side])))

    def across(self, kind: str, value: str, count: int, channels: int) -> str:
        """Add what is most or least over `count` parts of `channels` channels each: "Max" or "Min", at each place."""
        parts = [f"node_{len(self._nodes)}_{part}" for part in range(count)]
        sizes = self.constant(np.array([channels] * count))
        self._nodes.append(helper.make_node("Split", [value, sizes], parts, axis=1))
        return self.add(kind, *parts)

    def largest(self, value: str, count: int) -> str:
        """Add the largest values along the last axis."""
        name = f"node_{len(self._nodes)}"
        inputs = [value, self.constant(np.array([count]))]
        self._nodes.append(helper.make_node("TopK", inputs, [name, f"{name}_indices"], axis=-1))
        return name

    def serialize(self, outputs: dict[str, tuple[int, list[str | int]]]) -> bytes:
        """The model, checked; takes RGB 0-1 of any size, and gives the outputs: element type and shape by name."""
        model = helper.make_model(
            helper.make_graph(
                self._nodes,
                "vigil",
                [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, "height", "width"])],
                [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
                self._constants,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="vigil-trainer",
        )
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def add_features(graph: Graph) -> str:
    """Add everything from the image to its features, [batch, channels, GRID, GRID]."""
    sizes = graph.constant(np.array([SIZE, SIZE]))
    image = graph.add("Resize", INPUT, "", "", sizes, mode="linear", antialias=1, axes=[2, 3])
    grey = graph.mean_of_channels(image, COLOURS, SIZE)
    brightness = graph.add("Add", graph.reduce("ReduceMean", grey, 2, 3), graph.scalar(_EPSILON))
    cell = SIZE // GRID
    colour = graph.pool("AveragePool", image, cell)
    shade = graph.mean_of_channels(colour, COLOURS, GRID)
    tint = graph.add("Div", graph.add("Sub", colour, shade), brightness)
    features = [
        graph.add("Log", graph.add("Add", graph.add("Div", shade, brightness), graph.scalar(_DARKEST))),
        tint,
    ]
    level = graph.add("Div", grey, brightness)
    for scale in range(SCALES):
        if scale:
            level = graph.pool("AveragePool", level, 2)
            cell //= 2
        features += _line_features(graph, level, cell)
    return graph.add("Concat", *features, axis=1)


def _line_features(graph: Graph, level: str, cell: int) -> list[str]:
    """How dark in each direction, how bright, and how strong the lines are in each square of `cell` x `cell`."""
    border = KERNEL // 2
    pads = graph.constant(np.array([0, 0, border, border, 0, 0, border, border]))
    padded = graph.add("Pad", level, pads, mode="reflect")
    step = min(cell, SIDE_BY_SIDE)
    lines = graph.add("Conv", padded, graph.constant(shifted(line_kernels(), step)), strides=[step, step])
    side, places = GRID * cell // step, step * step

    def over_cell(kind: str, value: str) -> str:
        return graph.pool(kind, value, cell // step) if cell > step else value

    darkest = over_cell("MaxPool", lines)
    if places > 1:
        darkest = graph.across("Max", darkest, places, ORIENTATIONS)
    brightest = over_cell("MaxPool", graph.add("Neg", graph.across("Min", lines, places * ORIENTATIONS, 1)))
    strength = over_cell(
        "AveragePool",
        graph.mean_of_channels(graph.add("Abs", lines), places * ORIENTATIONS, side, times=ORIENTATIONS),
    )
    # A noisy picture answers every filter: what counts is how far a line stands out of its own picture.
    usual = graph.add("Add", graph.reduce("ReduceMean", strength, 2, 3), graph.scalar(_EPSILON))
    found = graph.add("Relu", darkest), graph.add("Relu", brightest), strength
    return [graph.add("Div", value, usual) for value in found]


def shifted(kernels: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Each kernel at each place of a square of `step` x `step`, [step * step * count, 1, size, size].

    A convolution by them with that stride computes neighbours side by side, as channels: the same numbers, but the
    runtime's lanes are full and each pixel is read less often.
    """
    size = kernels.shape[-1] + step - 1
    found = np.zeros((step, step, len(kernels), 1, size, size), dtype=np.float32)
    for y in range(step):
        for x in range(step):
            found[y, x, ..., y : y + kernels.shape[-2], x : x + kernels.shape[-1]] = kernels
    return found.reshape(-1, 1, size, size)


def line_kernels() -> NDArray[np.float32]:
    """Second derivatives across an elongated Gaussian, [ORIENTATIONS, 1, KERNEL, KERNEL]; dark lines answer above 0."""
    axis = np.arange(KERNEL) - KERNEL // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    window = np.exp(-(x**2 + y**2) / (2 * (KERNEL / 3) ** 2))
    kernels = []
    for angle in np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS:
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        envelope = window * np.exp(-(along**2) / (2 * LINE_LENGTH**2) - across**2 / (2 * LINE_WIDTH**2))
        kernel = (across**2 / LINE_WIDTH**2 - 1) * envelope
        kernel -= window * kernel.sum() / window.sum()
        kernels.append(kernel / np.abs(kernel).sum())
    return np.array(kernels, dtype=np.float32)[:, None]


class FeatureExtractor:
    """Runs the feature part of the graph alone."""

    def __init__(self) -> None:
        graph = Graph()
        name = add_features(graph)
        self._session = open_session(graph.serialize({name: (TensorProto.FLOAT, ["batch", "channels", GRID, GRID])}))

    def __call__(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features of [batch, 3, height, width] as [batch, GRID * GRID, channels]."""
        found: NDArray[np.float32] = self._session.run(None, {INPUT: tensor})[0]
        return found.reshape(*found.shape[:2], -1).transpose(0, 2, 1)


def open_session(model: bytes) -> Any:
    """An onnxruntime session of one thread on the CPU; several threads may run it at once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
