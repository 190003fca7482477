"""Training: images in, a bundle out."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from vigil_common.bundle import Artefact, Manifest, ModelInput, ModelOutputs, ParitySample, pack
from vigil_common.errors import InvalidInput
from vigil_common.pixels import decode, flat, to_tensor

from vigil_trainer import metrics, padim
from vigil_trainer.features import INPUT, FeatureExtractor, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Progress = Callable[[int, int], None]

FEWEST_IMAGES = 4
MODEL_PATH = "onnx/model.onnx"
SPEC = ModelInput(name=INPUT)
MAX_PIXELS = 50_000_000
_FOLDS = 4
_NORMAL_QUANTILE = 0.95
# Without abnormal images: how far these go above normal ones is unknown, and a score must not stop at 1 too early.
_HEADROOM = 1.0
_LEAST_RANGE = 1e-3


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training gives.

    Attributes:
        bundle: Ready to publish.
        auroc: Of abnormal images against held-out normal ones; None without abnormal ones.
        f1: At the threshold, of the same; None likewise.
        pixel_auroc: Of the maps of abnormal images with a mask; None without masks.
        pro: Their per-region overlap; None likewise.
        threshold: The raw score that becomes 0.5.
        fit_s: Seconds from the first image read to the graph written.
    """

    bundle: bytes
    auroc: float | None
    f1: float | None
    pixel_auroc: float | None
    pro: float | None
    threshold: float
    fit_s: float


def train(
    normal: Sequence[Path | bytes],
    abnormal: Sequence[Path | bytes] = (),
    *,
    name: str,
    masks: Mapping[int, Path | bytes] | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    parity: int = 4,
) -> TrainResult:
    """Fit PaDiM to normal images.

    Args:
        normal: Images without anomalies, as files or encoded; at least 4.
        abnormal: Anomalous ones; only the threshold and the score's range are taken from them.
        name: The model's name.
        masks: Where abnormal images are anomalous, by their place among them; only measured by, not learned from.
        source: Where the images come from, for the lineage; plain values.
        progress: Called with the number of images read so far, and of all.
        parity: How many images go into the bundle with their scores.

    Raises:
        InvalidInput: TOO_FEW_IMAGES, MASK_SIZE_MISMATCH, or as `vigil_common.pixels.decode`.
    """
    if len(normal) < FEWEST_IMAGES:
        few = f"training needs {FEWEST_IMAGES} normal images, there are {len(normal)}"
        raise InvalidInput("TOO_FEW_IMAGES", f"{few}; name their folder as the normal one, or call it good/")
    began = time.perf_counter()
    extract = FeatureExtractor()
    total = len(normal) + len(abnormal)
    features = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda image: extract(to_tensor(_pixels(image), SPEC))[0], [*normal, *abnormal]):
            features.append(found)
            if progress:
                progress(len(features), total)
    good, bad = np.stack(features[: len(normal)]), features[len(normal) :]
    gaussians = padim.fit(good)
    held_out = _held_out_scores(good)
    anomalous = gaussians.raw_scores(np.stack(bad)) if bad else None
    scale = _scale(held_out, anomalous)
    graph = padim.write_graph(gaussians, scale)
    fit_s = time.perf_counter() - began
    area, f1 = None, None
    if anomalous is not None:
        area = metrics.auroc(held_out, anomalous)
        f1 = metrics.confusion(held_out, anomalous, scale.threshold).f1
    pixels = _measured(graph, abnormal, masks or {})
    counts = {"normal": len(normal), "abnormal": len(abnormal), "masks": len(masks or {})}
    measured = {"auroc": area, "f1": f1, "pixel_auroc": pixels.auroc, "pro": pixels.pro}
    lineage = {
        "trainer": "vigil-trainer",
        "trainer_version": version("vigil-trainer"),
        "algorithm": "padim",
        "images": counts,
        **({"source": dict(source)} if source else {}),
        "metrics": {key: value for key, value in measured.items() if value is not None},
    }
    bundle = _bundle(name, graph, _samples(normal, abnormal, parity), lineage)
    return TrainResult(bundle, area, f1, pixels.auroc, pixels.pro, scale.threshold, fit_s)


def _measured(
    graph: bytes, abnormal: Sequence[Path | bytes], masks: Mapping[int, Path | bytes]
) -> metrics.PixelMetrics:
    """What the graph's maps are worth against the masks."""
    found = metrics.PixelMetrics()
    session = open_session(graph) if masks else None
    for place, mask in masks.items():
        pixels = _pixels(abnormal[place])
        truth = flat(_pixels(mask)) > 0
        check_mask(truth, pixels, place)
        if session is not None:
            found.add(np.squeeze(session.run([padim.MAP], {INPUT: to_tensor(pixels, SPEC)})[0]), truth)
    return found


def check_mask(truth: NDArray[np.bool_], pixels: NDArray[np.uint8], place: int) -> None:
    """Raise `InvalidInput` for a mask that is not of its image's size."""
    if truth.shape != pixels.shape[:2]:
        sizes = f"{truth.shape[1]}x{truth.shape[0]}, its image {pixels.shape[1]}x{pixels.shape[0]}"
        raise InvalidInput("MASK_SIZE_MISMATCH", f"the mask of abnormal image {place} is {sizes}")


def numbered(images: Iterable[bytes]) -> list[int]:
    """The images' numbers in their order, one for all that are alike: what is held out must not be learned beside it.

    Raises:
        InvalidInput: TOO_FEW_IMAGES: fewer than 4 differ.
    """
    known: dict[bytes, int] = {}
    numbers = [known.setdefault(hashlib.sha256(image).digest(), len(known)) for image in images]
    if len(known) < FEWEST_IMAGES:
        few = f"training needs {FEWEST_IMAGES} normal images that differ, of {len(numbers)} only {len(known)} do"
        raise InvalidInput("TOO_FEW_IMAGES", few)
    return numbers


def _held_out_scores(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each image's raw score by Gaussians that were fitted without it, and without any other like it."""
    scores = np.empty(len(features), dtype=np.float32)
    fold = np.array(numbered(one.tobytes() for one in features)) % _FOLDS
    for number in range(_FOLDS):
        held = fold == number
        scores[held] = padim.fit(features[~held]).raw_scores(features[held])
    return scores


def _scale(normal: NDArray[np.float32], abnormal: NDArray[np.float32] | None) -> padim.Scale:
    """The threshold of the best F1 where abnormal images are known, else a quantile of the normal ones."""
    low, high = float(normal.min()), float(normal.max())
    if abnormal is None:
        threshold = float(np.quantile(normal, _NORMAL_QUANTILE))
        high += _HEADROOM * (high - low)
    else:
        threshold, _ = metrics.best_f1(normal, abnormal)
        high = max(high, float(abnormal.max()))
    # 0.5 is the middle: the range has to reach as far on either side.
    reach = max(high - threshold, threshold - low, _LEAST_RANGE)
    return padim.Scale(threshold, threshold - reach, threshold + reach)


def _samples(normal: Sequence[Path | bytes], abnormal: Sequence[Path | bytes], count: int) -> list[NDArray[np.uint8]]:
    """Images of both kinds where there are both."""
    bad = abnormal[: count // 2]
    return [_pixels(image) for image in (*normal[: count - len(bad)], *bad)]


def _bundle(name: str, graph: bytes, samples: list[NDArray[np.uint8]], lineage: dict[str, Any]) -> bytes:
    session = open_session(graph)
    files = {MODEL_PATH: graph}
    parity = []
    for index, pixels in enumerate(samples):
        path = f"parity/{index}.png"
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        files[path] = encoded.getvalue()
        score = session.run([padim.SCORE], {INPUT: to_tensor(pixels, SPEC)})[0][0]
        parity.append(ParitySample(image=path, score=float(score)))
    manifest = Manifest(
        name=name,
        artefacts={"onnxruntime": Artefact(path=MODEL_PATH, files=(MODEL_PATH,))},
        input=SPEC,
        outputs=ModelOutputs(score=padim.SCORE, label=padim.LABEL, map=padim.MAP, mask=padim.MASK),
        parity=tuple(parity),
        lineage=lineage,
    )
    return pack(manifest, files)


def _pixels(image: Path | bytes) -> NDArray[np.uint8]:
    try:
        return decode(image if isinstance(image, bytes) else image.read_bytes(), max_pixels=MAX_PIXELS)
    except InvalidInput as error:
        if isinstance(image, bytes):
            raise
        raise InvalidInput(error.reason, f"{image}: {error.message}") from error
