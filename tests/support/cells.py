"""Real images: mono-crystalline solar cells of `elpv-dataset` (PyPI, CC BY-NC-SA 4.0), in the demo's split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vigil_cli.demo import split_cells


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
    """Read the split."""
    split = split_cells()
    return Cells(
        train=[path.read_bytes() for path in split.train],
        normal=[path.read_bytes() for path, defective in split.test if not defective],
        defective=[path.read_bytes() for path, defective in split.test if defective],
    )
