"""Real images: mono-crystalline solar cells of `elpv-dataset` (PyPI, CC BY-NC-SA 4.0), in a fixed split."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import lru_cache

from elpv_dataset.utils import load_dataset
from PIL import Image


@dataclass(frozen=True)
class Cells:
    """Encoded PNGs: 350 normal ones to train on; 150 normal and 150 defective ones to test on."""

    train: list[bytes]
    normal: list[bytes]
    defective: list[bytes]

    @property
    def test_images(self) -> list[bytes]:
        """Both kinds, taking turns."""
        return [image for pair in zip(self.normal, self.defective, strict=True) for image in pair]


@lru_cache(maxsize=1)
def load_cells() -> Cells:
    """Load and encode the split."""
    images, probabilities, types = load_dataset()
    normal = [i for i in range(len(images)) if types[i] == "mono" and probabilities[i] == 0]
    defective = [i for i in range(len(images)) if types[i] == "mono" and probabilities[i] == 1]
    random.seed(0)
    random.shuffle(normal)
    random.shuffle(defective)

    def encode(indices: list[int]) -> list[bytes]:
        files = []
        for index in indices:
            file = io.BytesIO()
            Image.fromarray(images[index]).save(file, "PNG")
            files.append(file.getvalue())
        return files

    return Cells(encode(normal[:350]), encode(normal[350:500]), encode(defective[:150]))
