# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["bentoml==1.4.40", "onnxruntime==1.32.0", "pillow>=13", "numpy>=2"]
# ///
"""BentoML, the image as an upload: python bentoml_peer.py PORT."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import bentoml
from judge import Judge
from PIL.Image import Image


@bentoml.service(name="peer", workers=int(os.environ["PEER_WORKERS"]), traffic={"timeout": 60, "max_concurrency": 256})
class Peer:
    """One image a request, its score back."""

    def __init__(self) -> None:
        self._judge = Judge()

    @bentoml.api
    def judge(self, image: Image) -> float:
        """Judge the image."""
        return self._judge.image(image)


if __name__ == "__main__":
    print(json.dumps({"version": version("bentoml")}), flush=True)
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    os.chdir(Path(__file__).parent)
    command = ["-m", "bentoml", "serve", "bentoml_peer:Peer", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - its own command line, no shell needed
