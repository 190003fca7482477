"""Training by Anomalib, where it is installed (the extra `anomalib`): its models, the same bundle and metrics.

Anomalib sees a folder in its own layout. Every fifth normal image is held out: with the abnormal ones they choose the
threshold inside the graph, and the exported graph is measured on them here, by the same definitions as the built-in
trainer. Without abnormal images Anomalib makes some up by itself.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vigil_common.bundle import open_bundle
from vigil_common.errors import InvalidInput
from vigil_common.pixels import as_shown, decode, flat

from vigil_trainer import metrics
from vigil_trainer.graphs import MAX_PIXELS, run_graphs
from vigil_trainer.importer import import_export
from vigil_trainer.train import FEWEST_IMAGES, TrainResult, check_mask, numbered

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HELD_OUT = 5
_BATCH = 8
_PARITY_IMAGES = 2


def train_anomalib(
    normal: Sequence[Path],
    abnormal: Sequence[Path] = (),
    *,
    name: str,
    masks: Mapping[int, Path] | None = None,
    algorithm: str = "Patchcore",
    settings: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Fit one of Anomalib's models and make a bundle of its ONNX export.

    Args:
        normal: Images without anomalies; at least 5.
        abnormal: Anomalous ones: for the threshold, and to measure.
        name: The model's name.
        masks: Where abnormal images are anomalous, by their place among them; only measured by.
        algorithm: A class of `anomalib.models`.
        settings: Of that class.
        source: Where the images come from, for the lineage; plain values.

    Raises:
        InvalidInput: TRAINER_MISSING, ALGORITHM_UNKNOWN, TOO_FEW_IMAGES or MASK_SIZE_MISMATCH.
    """
    try:
        # Heavy (torch), and an extra.
        from anomalib.data import Folder  # noqa: PLC0415
        from anomalib.data.utils import ValSplitMode  # noqa: PLC0415
        from anomalib.deploy import ExportType  # noqa: PLC0415
        from anomalib.engine import Engine  # noqa: PLC0415
        from anomalib.models import UnknownModelError, get_model  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput("TRAINER_MISSING", f"Anomalib is not installed ({error}): vigil-cli[anomalib]") from error
    if len(normal) < max(FEWEST_IMAGES, HELD_OUT):
        raise InvalidInput("TOO_FEW_IMAGES", f"training needs {HELD_OUT} normal images, there are {len(normal)}")
    try:
        model = get_model(algorithm, **(settings or {}))
    except (UnknownModelError, TypeError) as error:
        raise InvalidInput("ALGORITHM_UNKNOWN", f"Anomalib takes no {algorithm}: {error}") from error
    began = time.perf_counter()
    numbers = numbered(path.read_bytes() for path in normal)
    held_out = [path for path, number in zip(normal, numbers, strict=True) if number % HELD_OUT == 0]
    learned = [path for path, number in zip(normal, numbers, strict=True) if number % HELD_OUT]
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "images"
        _link(root / "normal", learned)
        _link(root / "held_out", held_out)
        if abnormal:
            _link(root / "abnormal", abnormal)
        data = Folder(
            name=name,
            root=root,
            normal_dir="normal",
            normal_test_dir="held_out",
            abnormal_dir="abnormal" if abnormal else None,
            train_batch_size=_BATCH,
            eval_batch_size=_BATCH,
            num_workers=0,
            val_split_mode=ValSplitMode.SAME_AS_TEST if abnormal else ValSplitMode.SYNTHETIC,
            seed=0,
        )
        engine = Engine(default_root_dir=Path(work) / "results", logger=False)
        engine.fit(model=model, datamodule=data)
        engine.export(model=model, export_type=ExportType.ONNX, export_root=Path(work) / "export")
        fit_s = time.perf_counter() - began
        lineage: dict[str, Any] = {
            "trainer_version": version("anomalib"),
            "imported_from": "training",
            "images": {"normal": len(normal), "abnormal": len(abnormal), "masks": len(masks or {})},
            **({"source": dict(source)} if source else {}),
        }
        parity = [*held_out[:_PARITY_IMAGES], *abnormal[:_PARITY_IMAGES]]
        bundle = import_export(Path(work) / "export", name=name, parity_images=parity, lineage=lineage)
        measured = _measure(bundle, held_out, abnormal, masks or {})
        lineage["metrics"] = {key: value for key, value in measured.items() if value is not None}
        bundle = import_export(Path(work) / "export", name=name, parity_images=parity, lineage=lineage)
    return TrainResult(bundle, **measured, threshold=open_bundle(bundle).manifest.threshold, fit_s=fit_s)


def _link(folder: Path, images: Sequence[Path]) -> None:
    """Images as Anomalib reads them rightly: it knows neither EXIF data nor sixteen bits."""
    folder.mkdir(parents=True)
    for place, image in enumerate(images):
        shown = as_shown(image.read_bytes(), max_pixels=MAX_PIXELS)
        if shown is None:
            (folder / f"{place:06d}{image.suffix.lower()}").symlink_to(image.absolute())
        else:
            (folder / f"{place:06d}.png").write_bytes(shown)


def _measure(
    bundle: bytes, normal: Sequence[Path], abnormal: Sequence[Path], masks: Mapping[int, Path]
) -> dict[str, float | None]:
    opened = open_bundle(bundle)
    images = (path.read_bytes() for path in (*normal, *abnormal))
    outcomes = list(run_graphs(opened.manifest, opened.files, "onnxruntime", images)) if abnormal else []
    if not outcomes:
        return dict.fromkeys(("auroc", "f1", "pixel_auroc", "pro"))
    scores = np.array([outcome.score for outcome in outcomes])
    good, bad = scores[: len(normal)], scores[len(normal) :]
    pixels = metrics.PixelMetrics()
    for place, mask in masks.items():
        found = outcomes[len(normal) + place].map
        truth = flat(decode(mask.read_bytes(), max_pixels=MAX_PIXELS)) > 0
        check_mask(truth, decode(abnormal[place].read_bytes(), max_pixels=MAX_PIXELS), place)
        if found is not None:
            pixels.add(found, truth)
    return {
        "auroc": metrics.auroc(good, bad),
        "f1": metrics.confusion(good, bad, opened.manifest.threshold).f1,
        "pixel_auroc": pixels.auroc,
        "pro": pixels.pro,
    }
