"""A small ONNX graph of the shape of Anomalib's exports, for those that change such graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def node(kind: str, inputs: list[str], output: str, **said: Any) -> onnx.NodeProto:
    """A node called as its output."""
    return helper.make_node(kind, inputs, [output], name=output, **said)


def like_an_export(*, size: tuple[int, int] = (64, 64), padded: bool = False) -> onnx.ModelProto:
    """Resize, convolve, divide by the norm over channels as torch writes it down, back to the size of the image.

    The map says how much of what is there is an edge.

    Args:
        size: Height and width of the image that it looks at, multiples of 4.
        padded: Whether it pads its input first.
    """
    rows, columns = size
    kernel = np.zeros((2, 3, 4, 4), dtype=np.float32)
    kernel[0] = 1
    kernel[1, :, :, :2], kernel[1, :, :, 2:] = 1, -1
    constants: dict[str, Any] = {
        "sizes": np.array([rows, columns], dtype=np.int64),
        "features": np.array([2, rows // 4, columns // 4], dtype=np.int64),
        "kernel": kernel,
        "second": np.array([[[[0]], [[1]]]], dtype=np.float32),
        "channels": np.array([1], dtype=np.int64),
        "plane": np.array([2, 3], dtype=np.int64),
    }
    if padded:
        constants["pads"] = np.zeros(8, dtype=np.int64)
    taken = "padded" if padded else "input"
    nodes = [
        *([node("Pad", ["input", "pads"], "padded")] if padded else []),
        node("Shape", [taken], "leading", start=0, end=2),
        node("Concat", ["leading", "sizes"], "whole", axis=0),
        node("Resize", [taken, "", "", "whole"], "image", mode="linear"),
        node("Conv", ["image", "kernel"], "convolved", strides=[4, 4]),
        node("ReduceL2", ["convolved", "channels"], "norm"),
        node("Shape", ["input"], "batch", start=0, end=1),
        node("Concat", ["batch", "features"], "stretch", axis=0),
        node("Expand", ["norm", "stretch"], "stretched"),
        node("Div", ["convolved", "stretched"], "normalised"),
        node("Conv", ["normalised", "second"], "found"),
        node("Shape", ["found"], "leading_found", start=0, end=2),
        node("Concat", ["leading_found", "sizes"], "whole_found", axis=0),
        node("Resize", ["found", "", "", "whole_found"], "anomaly_map", mode="linear"),
        node("ReduceMax", ["anomaly_map", "plane"], "most", keepdims=0),
        node("Abs", ["most"], "pred_score"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [
            helper.make_tensor_value_info("pred_score", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", 1, rows, columns]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
