"""A published model made over for speed: measured here, and kept only where it says the same.

What keeps f32 must hold the bundle's parity samples and agree on every image within a thousandth. What is less precise
gets its threshold anew (where it flips the fewest labels of the images given) and must rank normal and anomalous images
as well as the original: AUROC at most 0.005 lower. A worker then takes whichever is the fastest on its node.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime import quantization
from vigil_common.bundle import Artefact, Bundle, Variant, pack
from vigil_common.errors import InvalidBundle, InvalidInput
from vigil_common.pixels import decode, to_tensor
from vigil_common.scores import moved

from vigil_trainer import metrics
from vigil_trainer.features import IR_VERSION, OPSET, open_session
from vigil_trainer.graphs import MAX_PIXELS, load_openvino, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from vigil_common.bundle import Manifest, Precision, Runtime
    from vigil_common.pixels import Tensor

    Scores = NDArray[np.float64]
    Build = Callable[[Path, Manifest, Sequence[Tensor]], list[Path]]

AUROC_SLACK = 0.005
TOLERANCE = 1e-3
# A quantised graph's kernels differ from processor to processor by more than f32 ones.
INT8_TOLERANCE = 0.02
TIMED_RUNS = 15
FEWEST_CALIBRATION = 8
# Of a batch of maps: batch, channels, height, width.
PLANES, FEW_CHANNELS = 4, 4


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one artefact.

    Attributes:
        name: The runtime's for the original, else the variant's.
        precision: Of its arithmetic.
        run_ms: The least of several runs, one thread.
        size_bytes: Its files.
        auroc: Of the images given; None where they are of one kind.
        flips: Labels that differ from the original's, once the threshold is moved.
        furthest: Largest difference of a score from the original's, once moved.
        threshold: Where its own scores part both kinds.
        refused: Why it is no variant; empty where it is.
    """

    name: str
    precision: str
    run_ms: float
    size_bytes: int
    auroc: float | None
    flips: int
    furthest: float
    threshold: float
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Optimised:
    """The new bundle, and all that was measured; the originals stand first."""

    bundle: bytes
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class _Images:
    normal: Sequence[Tensor]
    anomalous: Sequence[Tensor]
    parity: Sequence[Tensor]

    @property
    def all(self) -> Sequence[Tensor]:
        return [*self.normal, *self.anomalous]


def optimise(
    bundle: Bundle,
    *,
    calibration: Sequence[bytes],
    normal: Sequence[bytes] = (),
    anomalous: Sequence[bytes] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Optimised:
    """Make, measure and keep what is worth it.

    Args:
        bundle: The published one; variants that it has are made anew.
        calibration: Encoded normal images that quantisation learns ranges from; at least 8.
        normal: Others, to measure by; where there are none, those of the calibration.
        anomalous: To measure AUROC by; without them nothing less precise than f32 is kept.
        progress: Told what is being made.

    Raises:
        InvalidInput: TOO_FEW_IMAGES.
        InvalidBundle: ENGINE_MISSING: the bundle has no artefact for ONNX Runtime.
    """
    if len(calibration) < FEWEST_CALIBRATION:
        what = f"calibration needs {FEWEST_CALIBRATION} normal images, there are {len(calibration)}"
        raise InvalidInput("TOO_FEW_IMAGES", f"{what}; stream more, or give a folder")
    manifest = bundle.manifest.model_copy(update={"variants": {}})
    if "onnxruntime" not in manifest.artefacts:
        raise InvalidBundle("ENGINE_MISSING", "variants are made of the ONNX graph, and this bundle has none")

    def tensors(images: Sequence[bytes]) -> list[Tensor]:
        return [to_tensor(decode(image, max_pixels=MAX_PIXELS), manifest.input) for image in images]

    ranges = tensors(calibration)
    images = _Images(
        tensors(normal) or ranges, tensors(anomalous), tensors([bundle.files[one.image] for one in manifest.parity])
    )
    dropped = {name for variant in bundle.manifest.variants.values() for name in variant.artefact.files}
    kept = {name for artefact in manifest.artefacts.values() for name in artefact.files}
    files = {name: content for name, content in bundle.files.items() if name not in dropped - kept}
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle.extract(folder)
        progress("measuring the original")
        measured = []
        reference: Scores | None = None
        for runtime, artefact in sorted(manifest.artefacts.items()):
            scores, run_ms = _judged(manifest, folder / artefact.path, runtime, "f32", images.all)
            reference = scores if reference is None else reference
            size = sum(len(files[one]) for one in artefact.files)
            area = _auroc(scores, images)
            furthest = float(np.abs(scores - reference).max())
            measured.append(Measured(runtime, "f32", run_ms, size, area, 0, furthest, manifest.threshold))
        assert reference is not None  # noqa: S101 - there is one for ONNX Runtime
        for variant, (runtime, precision, build) in BUILDS.items():
            progress(f"making {variant}")
            try:
                made = build(folder, manifest, ranges)
                found, entry = _measure(
                    variant,
                    runtime=runtime,
                    precision=precision,
                    made=made,
                    manifest=manifest,
                    images=images,
                    reference=reference,
                )
            except ImportError as error:
                found = Measured(variant, precision, 0.0, 0, None, 0, 0.0, 0.0, f"needs {error.name}, not installed")
            except Exception as error:  # noqa: BLE001 - the tools raise anything for a graph that they can't do
                reason = str(error).strip().partition("\n")[0][:120]
                found = Measured(variant, precision, 0.0, 0, None, 0, 0.0, 0.0, f"{type(error).__name__}: {reason}")
            else:
                if entry is not None:
                    paths = tuple(f"variants/{path.parent.name}/{path.name}" for path in made)
                    files |= {name: path.read_bytes() for name, path in zip(paths, made, strict=True)}
                    artefact = Artefact(path=paths[0], files=paths)
                    variants[variant] = entry.model_copy(update={"artefact": artefact})
            measured.append(found)
    lineage = {
        **manifest.lineage,
        "optimised_from": bundle.digest,
        "optimised": {
            one.name: {"run_ms": round(one.run_ms, 3), "auroc": one.auroc, "flips": one.flips, "refused": one.refused}
            for one in measured
        },
    }
    new = manifest.model_copy(update={"variants": variants, "lineage": lineage})
    return Optimised(pack(new, files), tuple(measured))


def _measure(
    name: str,
    *,
    runtime: Runtime,
    precision: Precision,
    made: Sequence[Path],
    manifest: Manifest,
    images: _Images,
    reference: Scores,
) -> tuple[Measured, Variant | None]:
    """What a variant is worth, and its entry for the manifest where that is enough."""
    plain, run_ms = _judged(manifest, made[0], runtime, precision, images.all)
    area, before = _auroc(plain, images), _auroc(reference, images)
    threshold = manifest.threshold
    if precision != "f32":
        threshold = _recalibrated(plain, reference, manifest.threshold)
    scores = moved(plain, threshold, manifest.threshold)
    flips = int(((scores >= manifest.threshold) != (reference >= manifest.threshold)).sum())
    furthest = float(np.abs(scores - reference).max())
    refused = ""
    parity, _ = _judged(manifest, made[0], runtime, precision, images.parity)
    parity = moved(parity, threshold, manifest.threshold)
    if not np.isfinite(plain).all():
        refused = "scores that are no numbers"
    elif precision == "f32":
        pairs = zip(parity, manifest.parity, strict=True)
        if furthest > TOLERANCE or any(abs(score - sample.score) > sample.tolerance for score, sample in pairs):
            refused = f"a score is {furthest:.4f} off"
    elif area is None or before is None:
        refused = "no images of both kinds to compare AUROC on"
    elif area < before - AUROC_SLACK:
        refused = f"AUROC {area:.3f} instead of {before:.3f}"
    size = sum(path.stat().st_size for path in made)
    measured = Measured(name, precision, run_ms, size, area, flips, furthest, threshold, refused)
    if refused:
        return measured, None
    tolerance = TOLERANCE if precision == "f32" else INT8_TOLERANCE
    placeholder = Artefact(path=made[0].name, files=())
    entry = Variant(
        runtime=runtime,
        artefact=placeholder,
        precision=precision,
        threshold=threshold,
        scores=tuple(float(score) for score in parity),
        tolerance=tolerance,
    )
    return measured, entry


def _judged(
    manifest: Manifest, path: Path, runtime: Runtime, precision: Precision, images: Sequence[Tensor]
) -> tuple[Scores, float]:
    """Scores, and the least milliseconds of one run."""
    run = open_graph(path, manifest, runtime, threads=1, precision=precision)
    batch = manifest.fixed_batch or 1

    def judge(tensor: Tensor) -> float:
        found: Mapping[str, NDArray[Any]] = run(np.repeat(tensor, batch, axis=0))
        return float(np.asarray(found[manifest.outputs.score]).reshape(-1)[0])

    scores = np.array([judge(tensor) for tensor in images], dtype=np.float64)
    taken = []
    for _ in range(TIMED_RUNS if len(images) else 0):
        began = time.perf_counter()
        judge(images[0])
        taken.append(time.perf_counter() - began)
    return scores, min(taken, default=0.0) * 1000


def _auroc(scores: Scores, images: _Images) -> float | None:
    good, bad = scores[: len(images.normal)], scores[len(images.normal) :]
    return metrics.auroc(good, bad) if len(good) and len(bad) else None


def _recalibrated(scores: Scores, reference: Scores, threshold: float) -> float:
    """The threshold that flips the fewest labels; of several, the nearest to where the scores' own line crosses it."""
    slope, offset = np.polyfit(reference, scores, 1) if np.ptp(reference) > 0 else (1.0, 0.0)
    line = float(slope * threshold + offset)
    order = np.sort(np.unique(scores))
    candidates = np.append((order[1:] + order[:-1]) / 2, line)
    candidates = candidates[(candidates > 0) & (candidates < 1)]
    wanted = reference >= threshold
    flips = [int(((scores >= candidate) != wanted).sum()) for candidate in candidates]
    fewest = candidates[np.array(flips) == min(flips)] if len(candidates) else np.array([threshold])
    return float(fewest[np.argmin(np.abs(fewest - line))])


def _source(folder: Path, manifest: Manifest) -> Path:
    return folder / manifest.artefacts["onnxruntime"].path


def _target(folder: Path, name: str) -> Path:
    path = folder / "made" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _offline(folder: Path, manifest: Manifest, _: Sequence[Tensor]) -> list[Path]:
    """What ONNX Runtime makes of it at each load, done once; without the layouts of one kind of processor."""
    path = _target(folder, "offline") / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    source = _source(folder, manifest)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    # It goes on pointing at weights that lie beside the source.
    made = onnx.load(path, load_external_data=False)
    onnx.load_external_data_for_model(made, str(source.parent))
    onnx.save(made, path)
    return [path]


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Feeds images to the calibration."""

    def __init__(self, manifest: Manifest, images: Sequence[Tensor]) -> None:
        batch = manifest.fixed_batch or 1
        self._left: Iterator[dict[str, Tensor]] = (
            {manifest.input.name: np.repeat(image, batch, axis=0)} for image in images
        )

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


def _onnx_int8(folder: Path, manifest: Manifest, images: Sequence[Tensor]) -> list[Path]:
    """Convolutions with eight bits in and out and per-channel weights; the first ones and the comparison stay f32.

    What reads the image takes as long in f32, and every later convolution gets what it is off: of STFPM's AUROC 0.007
    were lost with it and 0.003 without, on a processor that takes weights of seven bits. Activations between two
    convolutions go into the bounds of what the first gives. Left out, each would be turned to f32 and back, which took
    a third of STFPM's time and most of what its scores were off.
    """
    path = _target(folder, "onnx-int8") / "model.onnx"
    if path.exists():
        return [path]
    source = _source(folder, manifest)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on graphs by warnings of the root logger
    try:
        quantization.quantize_static(
            str(source),
            str(path),
            _Reader(manifest, images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "Relu"],
            nodes_to_exclude=first_convolutions(source),
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
    pixels = {one.name for one in graph.input}
    found = []
    for node in graph.node:
        if pixels.isdisjoint(node.input):
            continue
        if node.op_type == "Conv":
            found.append(node.name)
        else:
            pixels.update(node.output)
    return list(filter(None, found))


def _save_for_openvino(source: Path, path: Path) -> list[Path]:
    """The graph as OpenVINO keeps it.

    Raises:
        InvalidBundle: MODEL_UNLOADABLE where the graph resizes with antialias, which OpenVINO 2026.4 loads and leaves
            out: pixels of the built-in model's small image come out up to 0.03 off, its scores 0.04.
    """
    openvino = load_openvino()
    graph = onnx.load(source)
    if any(_attributes(node).get("antialias") for node in graph.graph.node if node.op_type == "Resize"):
        raise InvalidBundle("MODEL_UNLOADABLE", "the graph resizes with antialias, OpenVINO does without")
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "model.onnx"
        onnx.save(resized_by_products(graph), changed, save_as_external_data=True)
        openvino.save_model(openvino.convert_model(changed), path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def resized_by_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its maps' bilinear resizes as two products with constant weights each.

    OpenVINO takes 0.9 ms to bring one map to 256 x 256, the products 0.05. Only where the graph knows both sizes, and
    for few channels: the weights grow with the sizes, and their work with the channels too.
    """
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    known = [*graph.value_info, *graph.input, *graph.output]
    shapes = {value.name: [one.dim_value for one in value.type.tensor_type.shape.dim] for value in known}
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


def _openvino_f32(folder: Path, manifest: Manifest, _: Sequence[Tensor]) -> list[Path]:
    path = _target(folder, "openvino") / "model.xml"
    if path.exists():
        return [path, path.with_suffix(".bin")]
    return _save_for_openvino(_source(folder, manifest), path)


def _openvino_int8(folder: Path, manifest: Manifest, images: Sequence[Tensor]) -> list[Path]:
    """The same quantised graph in OpenVINO.

    NNCF's own quantisation of STFPM was as fast, and ranked worse: by 0.008 of AUROC where it kept to convolutions, by
    0.03 where it did not.
    """
    (source,) = _onnx_int8(folder, manifest, images)
    return _save_for_openvino(source, _target(folder, "openvino-int8") / "model.xml")


# Every variant that is tried, by name; OpenVINO's f32 too where the bundle has one, for its resizes.
BUILDS: dict[str, tuple[Runtime, Precision, Build]] = {
    "onnxruntime-offline": ("onnxruntime", "f32", _offline),
    "onnxruntime-int8": ("onnxruntime", "int8", _onnx_int8),
    "openvino-f32": ("openvino", "f32", _openvino_f32),
    "openvino-bf16": ("openvino", "bf16", _openvino_f32),
    "openvino-int8": ("openvino", "int8", _openvino_int8),
}
