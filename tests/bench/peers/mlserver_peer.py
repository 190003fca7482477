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
"""MLServer with a runtime of a few lines, by gRPC, with adaptive batching where PEER_TOGETHER is over 1.

python mlserver_peer.py PORT
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from judge import Judge
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from PIL import Image

# How long a request waits for others.
BATCH_TIME_S = 0.005


class Runtime(MLModel):
    """One image a request, its score back; with adaptive batching several requests at once."""

    async def load(self) -> bool:
        """Open the graph."""
        self._judge = Judge()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Judge what came."""
        scores = self._judge.several([Image.open(io.BytesIO(image)) for image in payload.inputs[0].data])
        output = ResponseOutput(name="score", shape=[len(scores)], datatype="FP32", data=scores)
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    port = int(sys.argv[1])
    folder = Path(tempfile.mkdtemp())
    server = {"host": "127.0.0.1", "http_port": port + 1, "grpc_port": port, "metrics_port": port + 2}
    workers, together = int(os.environ["PEER_WORKERS"]), int(os.environ["PEER_TOGETHER"])
    (folder / "settings.json").write_text(json.dumps({**server, "parallel_workers": workers, "debug": False}))
    batching = {"max_batch_size": together, "max_batch_time": BATCH_TIME_S} if together > 1 else {}
    model = {"name": "peer", "implementation": "mlserver_peer.Runtime", **batching}
    (folder / "model-settings.json").write_text(json.dumps(model))
    print(json.dumps({"version": version("mlserver")}), flush=True)
    os.execv(sys.executable, [sys.executable, "-c", "from mlserver.cli import main; main()", "start", str(folder)])  # noqa: S606 - its own command line, no shell needed
