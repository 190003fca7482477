"""ONNX Runtime on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from vigil_common.errors import InvalidBundle

from vigil_inference.engine import Outputs

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_common.bundle import Manifest
    from vigil_common.pixels import Tensor


class OnnxEngine:
    """A graph in ONNX Runtime.

    Args:
        path: The graph; external data lies beside it.
        manifest: Names of its input and outputs.
        threads: For one run.
        precision: What the graph's arithmetic is; only told on.

    Raises:
        InvalidBundle: MODEL_UNLOADABLE or BUNDLE_OUTPUT_MISSING.
    """

    name = "onnxruntime"
    version = onnxruntime.__version__

    def __init__(self, path: Path, manifest: Manifest, *, threads: int, precision: str = "f32") -> None:
        self.precision = precision
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions share no base
            raise InvalidBundle("MODEL_UNLOADABLE", f"ONNX Runtime can't load {path.name}: {error}") from error
        wanted = manifest.outputs
        given = {output.name for output in self._session.get_outputs()}
        if wanted.score not in given:
            raise InvalidBundle("BUNDLE_OUTPUT_MISSING", f"{path.name} has no output {wanted.score}")
        self._input = manifest.input.name
        self._score = wanted.score
        self._map = wanted.map if wanted.map in given else None
        self._mask = wanted.mask if wanted.mask in given else None

    def run(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """Judge a batch."""
        names = [self._score, *(name for name in (self._map, self._mask) if pictures and name)]
        found = dict(zip(names, self._session.run(names, {self._input: batch}), strict=True))
        return shaped(found[self._score], found.get(self._map or ""), found.get(self._mask or ""))


def shaped(
    score: np.typing.NDArray[np.float32],
    anomaly_map: np.typing.NDArray[np.float32] | None,
    mask: np.typing.NDArray[np.bool_] | None,
) -> Outputs:
    """Scores as [N] from [N] or [N, 1]; maps and masks as [N, H, W] from [N, 1, H, W]."""

    def planes(value: np.typing.NDArray[np.generic]) -> np.typing.NDArray[np.generic]:
        return value.reshape(value.shape[0], *value.shape[-2:])

    return Outputs(
        np.asarray(score, dtype=np.float32).reshape(-1),
        None if anomaly_map is None else planes(anomaly_map).astype(np.float32, copy=False),
        None if mask is None else planes(mask).astype(np.bool_, copy=False),
    )
