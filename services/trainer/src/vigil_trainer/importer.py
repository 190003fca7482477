"""Anomalib's exports as bundles: reads from the graph what the graph says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from vigil_common.bundle import Artefact, Manifest, ModelInput, ModelOutputs, ParitySample, Runtime, pack
from vigil_common.errors import InvalidBundle
from vigil_common.pixels import decode, to_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

SCORE, LABEL, MAP, MASK = "pred_score", "pred_label", "anomaly_map", "pred_mask"
PARITY_TOLERANCE = 1e-3
RANK = 4
MAX_PIXELS = 50_000_000


def import_export(path: Path, *, name: str, parity_images: Sequence[Path] = ()) -> bytes:
    """Make a bundle of an Anomalib export.

    Args:
        path: A folder with model.onnx (and its .data) or model.xml and model.bin, also in subfolders; or one such file.
        name: The model's name.
        parity_images: Images whose scores are recorded now and must come out again wherever the bundle is loaded.

    Raises:
        InvalidBundle: EXPORT_NOT_FOUND, EXPORT_UNREADABLE or BUNDLE_OUTPUT_MISSING.
    """
    found = _find(path)
    files: dict[str, bytes] = {}
    artefacts: dict[Runtime, Artefact] = {}
    described: tuple[ModelInput, ModelOutputs, int | None] | None = None
    if onnx_path := found.get(".onnx"):
        # The external data's name is fixed inside the graph, so both keep theirs.
        model = _read_onnx(onnx_path)
        described = _describe(
            {value.name: _onnx_shape(value) for value in model.graph.input},
            {value.name for value in model.graph.output},
            onnx_path,
        )
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
        name=name,
        artefacts=artefacts,
        input=spec,
        outputs=outputs,
        fixed_batch=fixed_batch,
        lineage={"trainer": "anomalib", "imported_from": path.name},
    )
    samples = []
    for index, image in enumerate(parity_images):
        inside = f"parity/{index}{image.suffix.lower()}"
        files[inside] = image.read_bytes()
        score = _score(manifest, files, files[inside])
        samples.append(ParitySample(image=inside, score=score, tolerance=PARITY_TOLERANCE))
    return pack(manifest.model_copy(update={"parity": tuple(samples)}), files)


def _find(path: Path) -> dict[str, Path]:
    """The newest-looking export: the first file of each kind, by name."""
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[str, Path] = {}
    for candidate in candidates:
        if candidate.suffix in {".onnx", ".xml"} and candidate.is_file():
            found.setdefault(candidate.suffix, candidate)
    return found


def _add(files: dict[str, bytes], folder: str, main: Path, names: list[str]) -> Artefact:
    for name in names:
        source = main.with_name(name)
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
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(names)


def _onnx_shape(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _describe(
    inputs: dict[str, list[int | None]], outputs: set[str], path: Path
) -> tuple[ModelInput, ModelOutputs, int | None]:
    if SCORE not in outputs:
        raise InvalidBundle(
            "BUNDLE_OUTPUT_MISSING", f"{path} gives {', '.join(sorted(outputs))} but no {SCORE}; export with Anomalib 2"
        )
    images = {name: shape for name, shape in inputs.items() if len(shape) == RANK}
    if len(images) != 1:
        raise InvalidBundle("EXPORT_UNREADABLE", f"{path} must take exactly one image tensor, it takes {len(images)}")
    ((name, (batch, _, height, width)),) = images.items()
    given = {kind: kind if kind in outputs else None for kind in (LABEL, MAP, MASK)}
    return (
        ModelInput(name=name, width=width, height=height),
        ModelOutputs(score=SCORE, label=given[LABEL], map=given[MAP], mask=given[MASK]),
        # A frozen batch of one is what everybody sends anyway.
        batch if batch and batch > 1 else None,
    )


def _describe_openvino(path: Path) -> tuple[ModelInput, ModelOutputs, int | None]:
    import openvino  # noqa: PLC0415 - heavy, and only for exports without ONNX

    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise InvalidBundle("EXPORT_UNREADABLE", f"{path} is no OpenVINO model: {error}") from error
    inputs = {
        item.get_any_name(): [dim.get_length() if dim.is_static else None for dim in item.partial_shape]
        for item in model.inputs
    }
    return _describe(inputs, {name for item in model.outputs for name in item.get_names()}, path)


def _score(manifest: Manifest, files: dict[str, bytes], image: bytes) -> float:
    """The score as the runtime gives it now."""
    tensor = to_tensor(decode(image, max_pixels=MAX_PIXELS), manifest.input)
    tensor = np.repeat(tensor, manifest.fixed_batch or 1, axis=0)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if "onnxruntime" in manifest.artefacts:
            import onnxruntime  # noqa: PLC0415 - heavy

            path = Path(folder) / manifest.artefacts["onnxruntime"].path
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = session.run([manifest.outputs.score], {manifest.input.name: tensor})[0]
        else:
            import openvino  # noqa: PLC0415 - heavy

            path = Path(folder) / manifest.artefacts["openvino"].path
            compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found = compiled(tensor)[manifest.outputs.score]
    return float(np.asarray(found).reshape(-1)[0])
