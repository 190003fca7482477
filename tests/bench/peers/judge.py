"""What every peer does for an image: decode, prepare, ONNX Runtime on one thread. Knows nothing of Vigil.

PEER_MODEL, PEER_INPUT, PEER_SCORE and PEER_BATCH say which graph and which of its names.
"""

from __future__ import annotations

import io
import os

import numpy as np
import onnxruntime
from PIL import Image


class Judge:
    """A graph, ready to run."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self._input, self._score = os.environ["PEER_INPUT"], os.environ["PEER_SCORE"]
        self._batch = int(os.environ["PEER_BATCH"])

    def encoded(self, data: bytes) -> float:
        """The score of an encoded image."""
        return self.image(Image.open(io.BytesIO(data)))

    def image(self, image: Image.Image) -> float:
        """The score of an opened image."""
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        if self._batch > 1:
            tensor = np.repeat(tensor, self._batch, axis=0)
        return float(self._session.run([self._score], {self._input: tensor})[0].reshape(-1)[0])
