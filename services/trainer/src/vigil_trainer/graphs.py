"""A bundle's graph, run here: for parity samples, and to measure what was trained."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from vigil_common.errors import InvalidBundle
from vigil_common.pixels import decode, to_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray
    from vigil_common.bundle import Manifest, Precision, Runtime
    from vigil_common.pixels import Tensor

    Run = Callable[[Tensor], Mapping[str, NDArray[Any]]]

MAX_PIXELS = 50_000_000
# What a graph is run with, here and by workers.
GIVEN = "an image tensor [N, 3, height, width] of 32-bit floats, RGB from 0 to 1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a graph says of an image: its score, and its map [H, W] where it gives one."""

    score: float
    map: NDArray[np.float32] | None


def run_graphs(
    manifest: Manifest, files: Mapping[str, bytes], runtime: Runtime, images: Iterable[bytes]
) -> Iterator[Outcome]:
    """Judge encoded images one after another.

    Raises:
        InvalidBundle: ENGINE_MISSING, or MODEL_UNLOADABLE.
        InvalidInput: As `vigil_common.pixels.decode`.
    """
    outputs = manifest.outputs
    with tempfile.TemporaryDirectory() as folder:
        for name in manifest.artefacts[runtime].files:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files[name])
        main = Path(folder) / manifest.artefacts[runtime].path
        run = open_graph(main, manifest, runtime)
        for image in images:
            tensor = to_tensor(decode(image, max_pixels=MAX_PIXELS), manifest.input)
            try:
                found = run(np.repeat(tensor, manifest.fixed_batch or 1, axis=0))
            except Exception as error:  # the runtime's own exceptions share no base
                why = " ".join(str(error).split())
                raise InvalidBundle("MODEL_UNLOADABLE", f"{runtime} can't run {main.name} on {GIVEN}: {why}") from error
            score = float(np.asarray(found[outputs.score]).reshape(-1)[0])
            plane = None
            if outputs.map is not None:
                value = np.asarray(found[outputs.map], dtype=np.float32)
                plane = value.reshape(-1, *value.shape[-2:])[0]
            yield Outcome(score, plane)


def open_graph(
    path: Path, manifest: Manifest, runtime: Runtime, *, threads: int = 0, precision: Precision = "f32"
) -> Run:
    """A graph, ready to run; 0 threads: as many as the runtime likes.

    Raises:
        InvalidBundle: ENGINE_MISSING, or MODEL_UNLOADABLE.
    """
    if runtime == "onnxruntime":
        return _open_onnx(path, manifest, threads)
    return _open_openvino(path, manifest, threads, "bf16" if precision == "bf16" else "f32")


def _wanted(manifest: Manifest) -> list[str]:
    return [name for name in (manifest.outputs.score, manifest.outputs.map) if name]


def _open_onnx(path: Path, manifest: Manifest, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no base
        raise InvalidBundle("MODEL_UNLOADABLE", f"ONNX Runtime can't load {path.name}: {error}") from error
    names = _wanted(manifest)
    return lambda tensor: dict(zip(names, session.run(names, {manifest.input.name: tensor}), strict=True))


def _open_openvino(path: Path, manifest: Manifest, threads: int, precision: str) -> Run:
    openvino = load_openvino()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise InvalidBundle("MODEL_UNLOADABLE", f"OpenVINO can't load {path.name}: {error}") from error

    def run(tensor: Tensor) -> Mapping[str, NDArray[Any]]:
        found = compiled(tensor)
        return {name: found[name] for name in _wanted(manifest)}

    return run


def load_openvino() -> Any:
    """OpenVINO; heavy, and only needed for exports made for it."""
    try:
        import openvino  # noqa: PLC0415 - see above
    except ImportError as error:
        raise InvalidBundle("ENGINE_MISSING", "this export needs OpenVINO: pip install openvino") from error
    return openvino
