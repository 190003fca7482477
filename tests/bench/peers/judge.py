"""What every peer does for an image: decode, prepare, ONNX Runtime on one thread. Knows nothing of Vigil.

PEER_MODEL, PEER_INPUT, PEER_SCORE and PEER_BATCH say which graph and which of its names; PEER_WORKERS how many
processes of a server judge, PEER_TOGETHER how many requests a server may bring to one call.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        return self.several([image])[0]

    def several(self, images: Sequence[Image.Image]) -> list[float]:
        """The scores of opened images of one size, in one run, or in runs of a frozen batch."""
        tensors = [self._tensor(image) for image in images]
        size = self._batch if self._batch > 1 else len(tensors)
        scores: list[float] = []
        for start in range(0, len(tensors), size):
            part = tensors[start : start + size]
            batch = np.stack([*part, *part[-1:] * (size - len(part))])
            scores += self._session.run([self._score], {self._input: batch})[0].reshape(-1)[: len(part)].tolist()
        return scores

    def _tensor(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
