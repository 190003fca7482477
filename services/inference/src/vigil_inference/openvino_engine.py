"""OpenVINO on CPU."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import openvino
from vigil_common.errors import InvalidBundle

from vigil_inference.onnx_engine import shaped

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_common.bundle import Manifest
    from vigil_common.pixels import Tensor

    from vigil_inference.engine import Outputs


class OpenVinoEngine:
    """A graph in OpenVINO.

    Args:
        path: The .xml; its .bin lies beside it.
        manifest: Names of its outputs.
        threads: For one run.
        runs: How many may go on at a time.
        precision: "f32", or "bf16" where the specification says so: on its own OpenVINO may take it, and flip labels.
            "int8" for a quantised graph, whose other nodes are f32.
        cache: Writable folder for compiled graphs.

    Raises:
        InvalidBundle: MODEL_UNLOADABLE or BUNDLE_OUTPUT_MISSING.
    """

    name = "openvino"
    version = openvino.__version__

    def __init__(self, path: Path, manifest: Manifest, *, threads: int, runs: int, precision: str, cache: Path) -> None:
        self.precision = precision
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if precision == "int8" else precision,
            "INFERENCE_NUM_THREADS": threads * runs,
            "NUM_STREAMS": runs,
            "CACHE_DIR": str(cache),
        }
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # the runtime raises plain RuntimeError and its own
            raise InvalidBundle("MODEL_UNLOADABLE", f"OpenVINO can't load {path.name}: {error}") from error
        wanted = manifest.outputs
        given = {name for output in self._compiled.outputs for name in output.get_names()}
        if wanted.score not in given:
            raise InvalidBundle("BUNDLE_OUTPUT_MISSING", f"{path.name} has no output {wanted.score}")
        self._requests = threading.local()  # one for each thread that judges
        self._score = wanted.score
        self._map = wanted.map if wanted.map in given else None
        self._mask = wanted.mask if wanted.mask in given else None

    def run(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """Judge a batch; outputs are copied, the request's buffers are used again."""
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        # Shared: without it every output would be copied, wanted or not.
        request.infer([batch], share_inputs=True, share_outputs=True)

        def fetch(name: str | None) -> np.typing.NDArray[np.float32] | None:
            return np.array(request.get_tensor(name).data) if name and pictures else None

        score = np.array(request.get_tensor(self._score).data)
        mask = fetch(self._mask)
        return shaped(score, fetch(self._map), None if mask is None else mask.astype(np.bool_))
