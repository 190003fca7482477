"""A published model made over for speed: measured here, and kept only where it says the same.

What keeps f32 must hold the bundle's parity samples and agree on every image within a thousandth. What is less precise,
or looks at a smaller image, gets its threshold anew (where it flips the fewest labels of the images given) and must
rank normal and anomalous images as well as the original: AUROC at most 0.005 lower. A worker then takes whichever is
the fastest on its node.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vigil_common.bundle import Artefact, Bundle, Variant, pack
from vigil_common.errors import InvalidBundle, InvalidInput
from vigil_common.pixels import decode, to_tensor
from vigil_common.scores import moved

from vigil_trainer import metrics
from vigil_trainer.graphs import MAX_PIXELS, open_graph
from vigil_trainer.variants import BUILDS, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from vigil_common.bundle import Manifest, Precision, Runtime
    from vigil_common.pixels import Tensor

    from vigil_trainer.variants import Build

    Scores = NDArray[np.float64]

AUROC_SLACK = 0.005
TOLERANCE = 1e-3
# A quantised graph's kernels differ from processor to processor by more than f32 ones.
INT8_TOLERANCE = 0.02
TIMED_RUNS = 15
FEWEST_CALIBRATION = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one artefact.

    Attributes:
        name: The runtime's for the original, else the variant's.
        precision: Of its arithmetic.
        run_ms: The least of several runs, one thread.
        size_bytes: Its files.
        auroc: Of the images given; None where they are of one kind.
        flips: Labels that differ from the original's, once the threshold is moved.
        furthest: Largest difference of a score from the original's, once moved.
        threshold: Where its own scores part both kinds.
        refused: Why it is no variant; empty where it is.
    """

    name: str
    precision: str
    run_ms: float
    size_bytes: int
    auroc: float | None
    flips: int
    furthest: float
    threshold: float
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Optimised:
    """The new bundle, and all that was measured; the originals stand first."""

    bundle: bytes
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class _Tried:
    """A variant to be made; without a size it looks at what the original looks at."""

    name: str
    runtime: Runtime
    precision: Precision
    build: Build
    size: int | None

    @property
    def exact(self) -> bool:
        """Whether it has to say what the original says."""
        return self.precision == "f32" and self.size is None


def _to_try(input_sizes: Sequence[int]) -> list[_Tried]:
    return [
        _Tried(name if size is None else f"{name}-{size}", *about, size)
        for size in (None, *sorted(set(input_sizes), reverse=True))
        for name, about in BUILDS.items()
    ]


@dataclass(frozen=True, slots=True)
class _Images:
    normal: Sequence[Tensor]
    anomalous: Sequence[Tensor]
    parity: Sequence[Tensor]

    @property
    def all(self) -> Sequence[Tensor]:
        return [*self.normal, *self.anomalous]


def optimise(
    bundle: Bundle,
    *,
    calibration: Sequence[bytes],
    normal: Sequence[bytes] = (),
    anomalous: Sequence[bytes] = (),
    input_sizes: Sequence[int] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Optimised:
    """Make, measure and keep what is worth it.

    Args:
        bundle: The published one; variants that it has are made anew.
        calibration: Encoded normal images that quantisation learns ranges from; at least 8.
        normal: Others, to measure by; where there are none, those of the calibration.
        anomalous: To measure AUROC by; without them nothing is kept that says anything else.
        input_sizes: Pixels of the image's shorter side, for variants that look at a smaller image than the original
            does; only of graphs that resize their input themselves.
        progress: Told what is being made.

    Raises:
        InvalidInput: TOO_FEW_IMAGES.
        InvalidBundle: ENGINE_MISSING: the bundle has no artefact for ONNX Runtime.
    """
    if len(calibration) < FEWEST_CALIBRATION:
        what = f"calibration needs {FEWEST_CALIBRATION} normal images, there are {len(calibration)}"
        raise InvalidInput("TOO_FEW_IMAGES", f"{what}; stream more, or give a folder")
    manifest = bundle.manifest.model_copy(update={"variants": {}})
    if "onnxruntime" not in manifest.artefacts:
        raise InvalidBundle("ENGINE_MISSING", "variants are made of the ONNX graph, and this bundle has none")

    def tensors(images: Sequence[bytes]) -> list[Tensor]:
        return [to_tensor(decode(image, max_pixels=MAX_PIXELS), manifest.input) for image in images]

    ranges = tensors(calibration)
    images = _Images(
        tensors(normal) or ranges, tensors(anomalous), tensors([bundle.files[one.image] for one in manifest.parity])
    )
    dropped = {name for variant in bundle.manifest.variants.values() for name in variant.artefact.files}
    kept = {name for artefact in manifest.artefacts.values() for name in artefact.files}
    files = {name: content for name, content in bundle.files.items() if name not in dropped - kept}
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle.extract(folder)
        progress("measuring the original")
        measured = []
        reference: Scores | None = None
        for runtime, artefact in sorted(manifest.artefacts.items()):
            scores, run_ms = _judged(manifest, folder / artefact.path, runtime, "f32", images.all)
            reference = scores if reference is None else reference
            size = sum(len(files[one]) for one in artefact.files)
            area = _auroc(scores, images)
            furthest = float(np.abs(scores - reference).max())
            measured.append(Measured(runtime, "f32", run_ms, size, area, 0, furthest, manifest.threshold))
        assert reference is not None  # noqa: S101 - there is one for ONNX Runtime
        graph = folder / manifest.artefacts["onnxruntime"].path
        sources = _sources(Source(graph, folder / "made", manifest, ranges), input_sizes)
        for tried in _to_try(input_sizes):
            progress(f"making {tried.name}")
            source = sources[tried.size]
            if isinstance(source, Exception):
                measured.append(_not_made(tried, source))
                continue
            try:
                made = tried.build(source)
                found, entry = _measure(tried, made, manifest, images, reference)
            except Exception as error:  # noqa: BLE001 - the tools raise anything for a graph that they can't do
                found = _not_made(tried, error)
            else:
                if entry is not None:
                    paths = tuple(f"variants/{path.parent.name}/{path.name}" for path in made)
                    files |= {name: path.read_bytes() for name, path in zip(paths, made, strict=True)}
                    artefact = Artefact(path=paths[0], files=paths)
                    variants[tried.name] = entry.model_copy(update={"artefact": artefact})
            measured.append(found)
    lineage = {
        **manifest.lineage,
        "optimised_from": bundle.digest,
        "optimised": {
            one.name: {"run_ms": round(one.run_ms, 3), "auroc": one.auroc, "flips": one.flips, "refused": one.refused}
            for one in measured
        },
    }
    new = manifest.model_copy(update={"variants": variants, "lineage": lineage})
    return Optimised(pack(new, files), tuple(measured))


def _sources(original: Source, input_sizes: Sequence[int]) -> dict[int | None, Source | Exception]:
    """What variants of each size are made of, or why there are none."""
    sources: dict[int | None, Source | Exception] = {None: original}
    for size in input_sizes:
        try:
            sources[size] = original.of_size(size)
        except Exception as error:  # noqa: BLE001 - the tools raise anything for a graph that they can't do
            sources[size] = error
    return sources


def _not_made(tried: _Tried, error: Exception) -> Measured:
    """What came of a variant whose making failed, and why."""
    if isinstance(error, ImportError):
        why = f"needs {error.name}, not installed"
    elif isinstance(error, InvalidBundle):
        why = error.message
    else:
        first = str(error).strip().partition("\n")[0]
        why = f"{type(error).__name__}: {first[:120]}"
    return Measured(tried.name, tried.precision, 0.0, 0, None, 0, 0.0, 0.0, why)


def _measure(
    tried: _Tried, made: Sequence[Path], manifest: Manifest, images: _Images, reference: Scores
) -> tuple[Measured, Variant | None]:
    """What a variant is worth, and its entry for the manifest where that is enough."""
    plain, run_ms = _judged(manifest, made[0], tried.runtime, tried.precision, images.all)
    area, before = _auroc(plain, images), _auroc(reference, images)
    threshold = manifest.threshold
    if not tried.exact:
        threshold = _recalibrated(plain, reference, manifest.threshold)
    scores = moved(plain, threshold, manifest.threshold)
    flips = int(((scores >= manifest.threshold) != (reference >= manifest.threshold)).sum())
    furthest = float(np.abs(scores - reference).max())
    refused = ""
    parity, _ = _judged(manifest, made[0], tried.runtime, tried.precision, images.parity)
    parity = moved(parity, threshold, manifest.threshold)
    if not np.isfinite(plain).all():
        refused = "scores that are no numbers"
    elif tried.exact:
        pairs = zip(parity, manifest.parity, strict=True)
        if furthest > TOLERANCE or any(abs(score - sample.score) > sample.tolerance for score, sample in pairs):
            refused = f"a score is {furthest:.4f} off"
    elif area is None or before is None:
        refused = "no images of both kinds to compare AUROC on"
    elif area < before - AUROC_SLACK:
        refused = f"AUROC {area:.3f} instead of {before:.3f}"
    size = sum(path.stat().st_size for path in made)
    measured = Measured(tried.name, tried.precision, run_ms, size, area, flips, furthest, threshold, refused)
    if refused:
        return measured, None
    tolerance = TOLERANCE if tried.precision == "f32" else INT8_TOLERANCE
    placeholder = Artefact(path=made[0].name, files=())
    entry = Variant(
        runtime=tried.runtime,
        artefact=placeholder,
        precision=tried.precision,
        threshold=threshold,
        scores=tuple(float(score) for score in parity),
        tolerance=tolerance,
    )
    return measured, entry


def _judged(
    manifest: Manifest, path: Path, runtime: Runtime, precision: Precision, images: Sequence[Tensor]
) -> tuple[Scores, float]:
    """Scores, and the least milliseconds of one run."""
    run = open_graph(path, manifest, runtime, threads=1, precision=precision)
    batch = manifest.fixed_batch or 1

    def judge(tensor: Tensor) -> float:
        found: Mapping[str, NDArray[Any]] = run(np.repeat(tensor, batch, axis=0))
        return float(np.asarray(found[manifest.outputs.score]).reshape(-1)[0])

    scores = np.array([judge(tensor) for tensor in images], dtype=np.float64)
    taken = []
    for _ in range(TIMED_RUNS if len(images) else 0):
        began = time.perf_counter()
        judge(images[0])
        taken.append(time.perf_counter() - began)
    return scores, min(taken, default=0.0) * 1000


def _auroc(scores: Scores, images: _Images) -> float | None:
    good, bad = scores[: len(images.normal)], scores[len(images.normal) :]
    return metrics.auroc(good, bad) if len(good) and len(bad) else None


def _recalibrated(scores: Scores, reference: Scores, threshold: float) -> float:
    """The threshold that flips the fewest labels; of several, the nearest to where the scores' own line crosses it."""
    slope, offset = np.polyfit(reference, scores, 1) if np.ptp(reference) > 0 else (1.0, 0.0)
    line = float(slope * threshold + offset)
    order = np.sort(np.unique(scores))
    candidates = np.append((order[1:] + order[:-1]) / 2, line)
    candidates = candidates[(candidates > 0) & (candidates < 1)]
    wanted = reference >= threshold
    flips = [int(((scores >= candidate) != wanted).sum()) for candidate in candidates]
    fewest = candidates[np.array(flips) == min(flips)] if len(candidates) else np.array([threshold])
    return float(fewest[np.argmin(np.abs(fewest - line))])
