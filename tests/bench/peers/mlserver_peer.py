# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "mlserver==1.7.1",
#     "uvloop<0.22",           # later ones make no loop by themselves, which MLServer counts on
#     "onnxruntime==1.32.0",
#     "pillow>=13",
#     "numpy>=2",
# ]
# ///
"""MLServer with a runtime of a few lines, by gRPC, its inference pool of one worker: python mlserver_peer.py PORT."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from judge import Judge
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Runtime(MLModel):
    """One image a request, its score back."""

    async def load(self) -> bool:
        """Open the graph."""
        self._judge = Judge()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Judge the image."""
        (image,) = list(payload.inputs[0].data)
        score = self._judge.encoded(image)
        output = ResponseOutput(name="score", shape=[1], datatype="FP32", data=[score])
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    port = int(sys.argv[1])
    folder = Path(tempfile.mkdtemp())
    server = {"host": "127.0.0.1", "http_port": port + 1, "grpc_port": port, "metrics_port": port + 2}
    (folder / "settings.json").write_text(json.dumps({**server, "parallel_workers": 1, "debug": False}))
    model = {"name": "peer", "implementation": "mlserver_peer.Runtime"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    print(json.dumps({"version": version("mlserver")}), flush=True)
    os.execv(sys.executable, [sys.executable, "-c", "from mlserver.cli import main; main()", "start", str(folder)])  # noqa: S606 - its own command line, no shell needed
