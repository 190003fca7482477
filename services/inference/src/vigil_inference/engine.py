"""What Vigil needs of a runtime; `onnx_engine` and `openvino_engine` provide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from vigil_common.pixels import Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """One run's outputs for N images: score [N]; map and mask [N, H, W], None where not asked for or not given."""

    score: NDArray[np.float32]
    map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None


class Engine(Protocol):
    """One loaded graph.

    Attributes:
        name: "onnxruntime" or "openvino".
        version: The runtime's.
        precision: "f32" unless asked otherwise; "int8" where the graph is quantised.
    """

    name: str
    version: str
    precision: str

    def run(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """Judge a batch [N, 3, H, W]; map and mask only with `pictures`."""
        ...
