# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["litserve==0.2.19", "onnxruntime==1.32.0", "pillow>=13", "numpy>=2", "python-multipart"]
# ///
"""LitServe, the image as an upload: python litserve_peer.py PORT."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version

import litserve
from judge import Judge


class Api(litserve.LitAPI):
    """One image a request, its score back."""

    def setup(self, device: str) -> None:
        """Open the graph."""
        del device
        self._judge = Judge()

    def decode_request(self, request) -> bytes:  # noqa: ANN001 - LitServe takes an annotation for a schema
        """The uploaded file."""
        data: bytes = request["image"].file.read()
        return data

    def predict(self, image: bytes) -> float:
        """Judge the image."""
        return self._judge.encoded(image)

    def encode_response(self, score: float) -> dict[str, float]:
        """The score."""
        return {"score": score}


if __name__ == "__main__":
    print(json.dumps({"version": version("litserve")}), flush=True)
    workers = int(os.environ["PEER_WORKERS"])
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=workers, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
