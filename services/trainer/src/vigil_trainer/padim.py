"""PaDiM: one Gaussian per position (Defard et al. 2021, "PaDiM: a Patch Distribution Modeling Framework").

The distance of a position is its Mahalanobis distance over the root of the number of channels; an image's raw score is
the logarithm of the mean of its twenty largest ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from vigil_trainer.features import GRID, SIZE, Graph, add_features

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOP = 20
SCORE, LABEL, MAP, MASK = "pred_score", "pred_label", "anomaly_map", "pred_mask"
# The ridge is 1 % of the mean variance at 350 images, and more where fewer images say less about the covariances.
_RIDGE_IMAGES = 3.5
# Features that never vary in training (colour in grey images) still may, by noise.
_LEAST_VARIANCE = 1e-4
_LEAST_DISTANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Gaussians:
    """What training learns.

    Attributes:
        mean: [positions, channels].
        whitening: [positions, channels, channels]; turns differences from the mean into independent unit ones.
    """

    mean: NDArray[np.float32]
    whitening: NDArray[np.float32]

    def raw_scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw image scores [images] of features [images, positions, channels]."""
        whitened = np.matmul(features.transpose(1, 0, 2) - self.mean[:, None], self.whitening)
        distances = np.sqrt(np.square(whitened).mean(axis=2)).T
        top = np.partition(distances, -TOP, axis=1)[:, -TOP:]
        scores: NDArray[np.float32] = np.log(np.maximum(top.mean(axis=1), _LEAST_DISTANCE))
        return scores


@dataclass(frozen=True, slots=True)
class Scale:
    """How raw scores become 0 to 1: clamp((raw - threshold) / (maximum - minimum) + 0.5)."""

    threshold: float
    minimum: float
    maximum: float


def fit(features: NDArray[np.float32]) -> Gaussians:
    """Fit the Gaussians to features [images, positions, channels]."""
    by_position = features.transpose(1, 0, 2)
    mean = by_position.mean(axis=1)
    difference = by_position - mean[:, None]
    images, channels = difference.shape[1:]
    covariance = np.matmul(difference.transpose(0, 2, 1), difference).astype(np.float64) / images
    variance = np.diagonal(covariance, axis1=1, axis2=2).mean(axis=0)
    covariance += np.diag(variance * _RIDGE_IMAGES / images + _LEAST_VARIANCE)
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).transpose(0, 2, 1)
    return Gaussians(mean, np.ascontiguousarray(whitening, dtype=np.float32).reshape(-1, channels, channels))


def write_graph(gaussians: Gaussians, scale: Scale) -> bytes:
    """The whole model as ONNX, with the inputs and outputs of an Anomalib export."""
    graph = Graph()
    positions, channels = gaussians.mean.shape
    flat = graph.add("Reshape", add_features(graph), graph.constant(np.array([0, channels, positions])))
    by_position = graph.add("Transpose", flat, perm=[2, 0, 1])
    difference = graph.add("Sub", by_position, graph.constant(gaussians.mean[:, None]))
    whitened = graph.add("MatMul", difference, graph.constant(gaussians.whitening))
    squares = graph.reduce("ReduceMean", graph.add("Mul", whitened, whitened), 2, keepdims=0)
    distances = graph.add("Transpose", graph.add("Sqrt", squares), perm=[1, 0])
    top = _scaled(graph, graph.reduce("ReduceMean", graph.largest(distances, TOP), 1, keepdims=0), scale)
    _add_judged(graph, top, SCORE, LABEL)
    # Scaled on the small grid: a logarithm of every pixel would take longer.
    grid = graph.add("Reshape", _scaled(graph, distances, scale), graph.constant(np.array([0, 1, GRID, GRID])))
    sizes = graph.constant(np.array([SIZE, SIZE]))
    _add_judged(graph, graph.add("Resize", grid, "", "", sizes, mode="linear", axes=[2, 3]), MAP, MASK)
    picture: list[str | int] = ["batch", 1, SIZE, SIZE]
    return graph.serialize(
        {
            SCORE: (TensorProto.FLOAT, ["batch"]),
            LABEL: (TensorProto.BOOL, ["batch"]),
            MAP: (TensorProto.FLOAT, picture),
            MASK: (TensorProto.BOOL, picture),
        }
    )


def _scaled(graph: Graph, distance: str, scale: Scale) -> str:
    """Add what makes scores of distances, 0.5 at the threshold, and not yet cut to 0 to 1."""
    raw = graph.add("Log", graph.add("Max", distance, graph.scalar(_LEAST_DISTANCE)))
    above = graph.add("Sub", raw, graph.scalar(scale.threshold))
    centred = graph.add("Div", above, graph.scalar(scale.maximum - scale.minimum))
    return graph.add("Add", centred, graph.scalar(0.5))


def _add_judged(graph: Graph, scaled: str, score: str, label: str) -> None:
    graph.add("Clip", scaled, graph.scalar(0), graph.scalar(1), output=score)
    graph.add("GreaterOrEqual", score, graph.scalar(0.5), output=label)
