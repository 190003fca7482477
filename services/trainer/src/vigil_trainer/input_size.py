"""A graph that looks at a smaller image: what it resizes its input to, made less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import helper
from vigil_common.errors import InvalidBundle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# These work element by element, and stretch what is smaller.
STRETCHING = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"})
# Where the image's height and width stand in a shape.
PLANE = slice(2, 4)


def with_input_size(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """The graph as it would be with a smaller input; maps keep the size they are brought to at the end.

    Args:
        model: Resizes its input itself, as Anomalib's exports do, before it computes anything of it; is changed.
        size: Pixels of the shorter side; the longer one keeps its share.

    Raises:
        InvalidBundle: MODEL_UNLOADABLE: it does not resize its input, or to nothing larger than that.
    """
    shapes = shapes_of(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    planes = {name: shape[PLANE] for name, shape in shapes.items()}
    resize = _resize_of_input(model.graph)
    before = planes.get(resize.output[0], []) if resize else []
    if resize is None or not all(before):
        raise InvalidBundle("MODEL_UNLOADABLE", "the graph does not bring its input to a size of its own")
    if size >= min(before):
        raise InvalidBundle("MODEL_UNLOADABLE", f"the graph looks at {before[0]} x {before[1]} pixels already")
    after = [round(side * size / min(before)) for side in before]
    _set_size(model.graph, resize, after)
    _stretch_later(model.graph, planes)
    # They say what was.
    del model.graph.value_info[:]
    return model


def shapes_of(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Shapes by name, as far as shape inference has written them down; what is not known is 0."""
    known = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: [one.dim_value for one in value.type.tensor_type.shape.dim] for value in known}


def readers_of_the_image(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes with no convolution between them and the image."""
    pixels = {one.name for one in graph.input} - {one.name for one in graph.initializer}
    for node in graph.node:
        # A shape is no pixels: what is made of it is not followed.
        if node.op_type == "Shape" or pixels.isdisjoint(node.input):
            continue
        yield node
        if node.op_type != "Conv":
            pixels.update(node.output)


def _resize_of_input(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """The one that everything of the input goes through, with no cropping before or behind it."""
    framing = [node for node in readers_of_the_image(graph) if node.op_type in {"Resize", "Slice", "Crop", "Pad"}]
    return framing[0] if [node.op_type for node in framing] == ["Resize"] else None


def _set_size(graph: onnx.GraphProto, resize: onnx.NodeProto, plane: Sequence[int]) -> None:
    """Have it resize to this height and width, and leave batch and channels as they come."""
    wanted, shape, whole = (f"{resize.output[0]}_{part}" for part in ("plane", "shape", "whole"))
    graph.initializer.append(helper.make_tensor(wanted, onnx.TensorProto.INT64, [len(plane)], list(plane)))
    nodes = [
        helper.make_node("Shape", [resize.input[0]], [shape], name=shape, start=0, end=PLANE.start),
        helper.make_node("Concat", [shape, wanted], [whole], name=whole, axis=0),
    ]
    place = list(graph.node).index(resize)
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)
    del resize.input[1:]
    resize.input.extend(["", "", whole])


def _stretch_later(graph: onnx.GraphProto, planes: Mapping[str, Sequence[int]]) -> None:
    """Leave out what stretches a value to a size that the graph has written down, where its reader does so anyway."""
    for node in [one for one in graph.node if one.op_type == "Expand"]:
        (stretched,) = node.output
        readers = [one for one in graph.node if stretched in one.input]
        others = [name for one in readers for name in one.input if name != stretched]
        plane = planes.get(stretched)
        if (
            plane
            and all(one.op_type in STRETCHING for one in readers)
            and all(planes.get(name) == plane for name in others)
        ):
            for reader in readers:
                for index, name in enumerate(reader.input):
                    if name == stretched:
                        reader.input[index] = node.input[0]
            graph.node.remove(node)
