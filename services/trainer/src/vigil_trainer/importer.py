"""Anomalib's exports as bundles: reads from the graph what the graph says, so that nobody has to be asked.

Torch is not needed: names, shapes, a frozen batch, the algorithm and how images are resized stand in the graph.
"""

from __future__ import annotations

import io
import math
import re
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from PIL import Image
from vigil_common.bundle import Artefact, Manifest, ModelInput, ModelOutputs, ParitySample, Runtime, pack
from vigil_common.errors import InvalidBundle

from vigil_trainer.graphs import GIVEN, load_openvino, run_graphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    # A tensor's type as its runtime calls it, and its shape: None where it is any.
    Takes = tuple[str, list[int | None]]

SCORE, LABEL, MAP, MASK = "pred_score", "pred_label", "anomaly_map", "pred_mask"
PARITY_TOLERANCE = 1e-3
# Scores are sums of 32-bit floats: so far outside of 0 to 1 is still within.
ROUNDING = 1e-6
RANK, CHANNELS = 4, 3
# OpenVINO turns what it is given to 16 bits by itself, ONNX Runtime (float16) does not.
FLOATS = {"float", "f32", "f16"}
# Folders of Anomalib's results that say nothing of the model.
_NAMELESS = re.compile(r"onnx|openvino|torch|weights|latest|v[0-9]+|results|models?")
# Folders of one training in which Anomalib puts its exports.
_KINDS = {"onnx", "openvino", "torch", "weights"}
_ALGORITHM = re.compile(r"anomalib\.models\.(?:image|video)\.([a-z0-9_]+)\.")
_SYNTHETIC_SIZE = 256


def import_export(
    path: Path,
    *,
    name: str | None = None,
    parity_images: Sequence[Path] = (),
    tolerance: float = PARITY_TOLERANCE,
    lineage: Mapping[str, Any] | None = None,
) -> bytes:
    """Make a bundle of an Anomalib export.

    Args:
        path: A folder with model.onnx (and its .data) or model.xml and model.bin, also in subfolders; or one such file.
            Of one model's several trainings the newest, which `imported_from` in the lineage names.
        name: The model's name; None takes the nearest folder's that says something.
        parity_images: Images whose scores are recorded now and must come out again wherever the bundle is loaded;
            without any, two that are drawn here.
        tolerance: How far a score may be off there, and between ONNX Runtime and OpenVINO here.
        lineage: More to say of where it comes from.

    Raises:
        InvalidBundle: EXPORT_NOT_FOUND, EXPORT_AMBIGUOUS, EXPORT_UNREADABLE, MODEL_UNLOADABLE, BUNDLE_OUTPUT_MISSING,
            BUNDLE_FILE_MISSING, BUNDLE_PATH_OUTSIDE, ENGINE_MISSING, NAME_UNKNOWN, SCORE_NOT_FINITE, SCORE_OUT_OF_RANGE
            or PARITY_FAILED.
        InvalidInput: As `vigil_common.pixels.decode`.
    """
    taken, found = _find(path)
    files: dict[str, bytes] = {}
    artefacts: dict[Runtime, Artefact] = {}
    described: tuple[ModelInput, ModelOutputs, int | None] | None = None
    said: dict[str, Any] = {
        "trainer": "anomalib",
        "imported_from": (path.resolve().name / taken.relative_to(path)).as_posix(),
    }
    if onnx_path := found.get(".onnx"):
        # The external data's name is fixed inside the graph, so both keep theirs.
        model = _read_onnx(onnx_path)
        described = _describe(
            _onnx_inputs(model.graph),
            {value.name for value in model.graph.output},
            onnx_path,
        )
        said |= _said_by(model)
        names = [onnx_path.name, *_external(model)]
        artefacts["onnxruntime"] = _add(files, "onnx", onnx_path, names)
    if xml_path := found.get(".xml"):
        artefacts["openvino"] = _add(files, "openvino", xml_path, [xml_path.name, xml_path.with_suffix(".bin").name])
        if described is None:
            described = _describe_openvino(xml_path)
    if described is None:
        raise InvalidBundle("EXPORT_NOT_FOUND", f"{path} holds neither a .onnx nor an .xml of an Anomalib export")
    spec, outputs, fixed_batch = described
    manifest = Manifest(
        name=name or _name_of(next(iter(found.values()))),
        artefacts=artefacts,
        input=spec,
        outputs=outputs,
        fixed_batch=fixed_batch,
        lineage={**said, **(lineage or {})},
    )
    images = {f"parity/{place}{one.suffix.lower()}": one.read_bytes() for place, one in enumerate(parity_images)}
    images = images or {f"parity/{place}.png": _png(pixels) for place, pixels in enumerate(_drawn(spec))}
    samples = _parity(manifest, files, images, tolerance)
    return pack(manifest.model_copy(update={"parity": samples}), {**files, **images})


def _parity(
    manifest: Manifest, files: Mapping[str, bytes], images: Mapping[str, bytes], tolerance: float
) -> tuple[ParitySample, ...]:
    """What each image scores, alike on every runtime that the export is for."""
    scores = {
        runtime: [outcome.score for outcome in run_graphs(manifest, files, runtime, images.values())]
        for runtime in manifest.artefacts
        if runtime == "onnxruntime" or find_spec("openvino") or len(manifest.artefacts) == 1
    }
    for runtime, found in scores.items():
        for place, score in enumerate(found):
            _check_score(score, f"image {place} on {runtime}")
    first, *others = scores.values()
    for other in others:
        for place, (one, another) in enumerate(zip(first, other, strict=True)):
            if not abs(one - another) <= tolerance:
                text = f"image {place} scores {one:.6f} on ONNX Runtime and {another:.6f} on OpenVINO"
                advice = f"over the tolerance of {tolerance:g}: export again, or import one of both, or tolerate more"
                raise InvalidBundle("PARITY_FAILED", f"{text}, {advice}")
    return tuple(
        ParitySample(image=name, score=score, tolerance=tolerance) for name, score in zip(images, first, strict=True)
    )


def _check_score(score: float, what: str) -> None:
    if not math.isfinite(score):
        raise InvalidBundle("SCORE_NOT_FINITE", f"the export gives {score} as the score of {what}: its graph is broken")
    if not -ROUNDING <= score <= 1 + ROUNDING:
        raise InvalidBundle(
            "SCORE_OUT_OF_RANGE",
            f"the export gives {score:g} as the score of {what}, which must lie between 0 and 1; "
            "export it with Anomalib's post-processor, which normalises scores",
        )


def _drawn(spec: ModelInput) -> tuple[NDArray[np.uint8], ...]:
    """A gradient and noise, the same each time."""
    height, width = spec.height or _SYNTHETIC_SIZE, spec.width or _SYNTHETIC_SIZE
    down, across = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    gradient = np.stack(np.broadcast_arrays(down, across, (down + across) / 2), axis=2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return gradient, noise


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _said_by(model: onnx.ModelProto) -> dict[str, Any]:
    """What the graph says of how it was made, as torch's exporter writes it."""
    said: dict[str, Any] = {"exporter": f"{model.producer_name} {model.producer_version}".strip()}
    said["opset"] = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
    for node in model.graph.node:
        where = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
        if found := _ALGORITHM.search(where):
            said.setdefault("algorithm", found[1])
        if node.op_type == "Resize" and "pre_processor" in where:
            facts = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            mode = facts.get("mode", b"nearest")
            said["resize"] = {"mode": mode.decode(), "antialias": bool(facts.get("antialias", 0))}
    return said


def _name_of(path: Path) -> str:
    """The nearest folder's name that says something, as a model's name."""
    for folder in path.absolute().parents:
        slug = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
        if slug[:1].isalpha() and not _NAMELESS.fullmatch(slug):
            return slug[:63].rstrip("-")
    raise InvalidBundle("NAME_UNKNOWN", f"no folder of {path} names the model; give it a name")


def _find(path: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the newest training that was exported, and its file of each kind; no file where there is none.

    Beside each other, as Anomalib keeps them, it is what `latest` is or leads to, or else the highest of v0, v1 and so
    on. Several models are refused: the newest may be none that was meant.
    """
    trainings: dict[Path, dict[str, Path]] = {}
    for candidate in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if candidate.suffix in {".onnx", ".xml"} and candidate.is_file():
            trainings.setdefault(_training_of(candidate, path), {}).setdefault(candidate.suffix, candidate)
    newest = [one for one in trainings if all(_rank(one) >= _rank(o) for o in trainings if o.parent == one.parent)]
    if not newest:
        return path, {}
    if len(newest) > 1:
        raise InvalidBundle(
            "EXPORT_AMBIGUOUS", f"{path} holds several models: name one of {', '.join(map(str, newest))}"
        )
    return newest[0], trainings[newest[0]]


def _training_of(file: Path, root: Path) -> Path:
    """The folder below which Anomalib sorts exports by their kind."""
    folder = file if file == root else file.parent
    while folder != root and folder.name in _KINDS:
        folder = folder.parent
    return folder


def _rank(training: Path) -> tuple[bool, int]:
    """How new a training looks beside others."""
    number = re.fullmatch(r"v([0-9]+)", training.name)
    latest = (training.parent / "latest").resolve() == training.resolve()
    return latest, int(number[1]) if number else -1


def _add(files: dict[str, bytes], folder: str, main: Path, names: list[str]) -> Artefact:
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise InvalidBundle("BUNDLE_PATH_OUTSIDE", f"{main} needs {name}, outside its folder; keep both in one")
        source = main.parent / name
        if not source.is_file():
            raise InvalidBundle("BUNDLE_FILE_MISSING", f"{main} needs {name} beside it; export again or copy it there")
        files[f"{folder}/{name}"] = source.read_bytes()
    return Artefact(path=f"{folder}/{main.name}", files=tuple(f"{folder}/{name}" for name in names))


def _read_onnx(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own
        raise InvalidBundle("EXPORT_UNREADABLE", f"{path} is no ONNX model: {error}") from error


def _external(model: onnx.ModelProto) -> list[str]:
    """Files beside the graph that hold its weights."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    names = {
        PurePosixPath(entry.value).as_posix()
        for tensor in (*model.graph.initializer, *_tensors_in(nodes))
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(names)


def _tensors_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """What nodes have as attributes, such as Constant, and what the graphs in them have."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _tensors_in(graph.node)


def _onnx_inputs(graph: onnx.GraphProto) -> dict[str, Takes]:
    """What the graph has to be given; weights that it lists among its inputs it has itself."""
    known = {one.name for one in graph.initializer} | {one.values.name for one in graph.sparse_initializer}
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            [dim.dim_value or None for dim in value.type.tensor_type.shape.dim],
        )
        for value in graph.input
        if value.name not in known
    }


def _describe(inputs: dict[str, Takes], outputs: set[str], path: Path) -> tuple[ModelInput, ModelOutputs, int | None]:
    if SCORE not in outputs:
        raise InvalidBundle(
            "BUNDLE_OUTPUT_MISSING", f"{path} gives {', '.join(sorted(outputs))} but no {SCORE}; export with Anomalib 2"
        )
    if len(inputs) != 1 or not all(map(_fits, inputs.values())):
        said = ", ".join(
            f"{name}: {kind} [{', '.join(str(side or '?') for side in shape)}]"
            for name, (kind, shape) in inputs.items()
        )
        raise InvalidBundle("EXPORT_UNREADABLE", f"{path} takes {said or 'nothing'}; it must take {GIVEN}, alone")
    ((name, (_, (batch, _, height, width))),) = inputs.items()
    given = {kind: kind if kind in outputs else None for kind in (LABEL, MAP, MASK)}
    return (
        ModelInput(name=name, width=width, height=height),
        ModelOutputs(score=SCORE, label=given[LABEL], map=given[MAP], mask=given[MASK]),
        batch,
    )


def _fits(takes: Takes) -> bool:
    kind, shape = takes
    return kind in FLOATS and len(shape) == RANK and shape[1] in {CHANNELS, None}


def _describe_openvino(path: Path) -> tuple[ModelInput, ModelOutputs, int | None]:
    openvino = load_openvino()
    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise InvalidBundle("EXPORT_UNREADABLE", f"{path} is no OpenVINO model: {error}") from error
    inputs = {
        item.get_any_name(): (
            item.element_type.get_type_name(),
            [dim.get_length() if dim.is_static else None for dim in item.partial_shape],
        )
        for item in model.inputs
    }
    return _describe(inputs, {name for item in model.outputs for name in item.get_names()}, path)
