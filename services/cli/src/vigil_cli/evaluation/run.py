"""Judges a data set with a bundle, exactly as a worker would, and measures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from vigil_common.errors import InvalidInput
from vigil_common.pixels import decode, flat, to_tensor
from vigil_inference import visualize
from vigil_trainer.metrics import Confusion, PixelMetrics, auroc, best_f1, confusion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from vigil_common.pixels import Pixels
    from vigil_inference.model import LoadedModel

    from vigil_cli.evaluation.dataset import Item

MAX_PIXELS = 50_000_000
_GAP = 8


@dataclass(frozen=True, slots=True)
class Judged:
    """An image with what the model says of it."""

    item: Item
    score: float

    def wrong(self, threshold: float) -> bool:
        """Whether its label at this threshold is not what it is."""
        return self.item.anomalous is not None and self.item.anomalous != (self.score >= threshold)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        judged: Every image.
        threshold: At which labels were given.
        pixel_auroc: Over all pixels of images whose mask is known; None without masks.
        pro: Per-region overlap; None likewise.
        seconds: Model time per image, in the median.
        refused: Images that could not be read, with why.
    """

    judged: tuple[Judged, ...]
    threshold: float
    pixel_auroc: float | None
    pro: float | None
    seconds: float
    refused: tuple[tuple[str, str], ...]

    def scores(self, *, anomalous: bool) -> NDArray[np.float64]:
        """Scores of the images that are so."""
        return np.array([one.score for one in self.judged if one.item.anomalous is anomalous])

    @property
    def labelled(self) -> bool:
        """Whether there are images of both kinds."""
        return bool(len(self.scores(anomalous=True)) and len(self.scores(anomalous=False)))

    @property
    def auroc(self) -> float | None:
        """Image level; None unless there are images of both kinds."""
        return auroc(self.scores(anomalous=False), self.scores(anomalous=True)) if self.labelled else None

    @property
    def best(self) -> tuple[float, float] | None:
        """The threshold of the best F1, and that F1; None likewise."""
        return best_f1(self.scores(anomalous=False), self.scores(anomalous=True)) if self.labelled else None

    def confusion(self, threshold: float) -> Confusion:
        """At any threshold."""
        return confusion(self.scores(anomalous=False), self.scores(anomalous=True), threshold)


def evaluate(
    model: LoadedModel,
    items: Iterable[Item],
    *,
    threshold: float | None,
    show: Callable[[Item, Pixels], None] | None = None,
    full: bool = False,
) -> Evaluation:
    """Judge every image.

    Args:
        model: The bundle, loaded.
        items: Images.
        threshold: None takes the bundle's.
        show: Gets each image's picture.
        full: Picture of four parts: image, heat map, mask, segmentation; else the image with the mask's outline.
    """
    limit = model.manifest.threshold if threshold is None else threshold
    pixels_of, judged, refused, times = PixelMetrics(), [], [], []
    measured = False
    for item in items:
        try:
            pixels = decode(item.path.read_bytes(), max_pixels=MAX_PIXELS)
        except InvalidInput as error:
            refused.append((item.name, error.message))
            continue
        wanted = show is not None or item.mask is not None or item.anomalous is False
        began = time.perf_counter()
        outputs = model.judge(to_tensor(pixels, model.manifest.input), pictures=wanted)
        times.append(time.perf_counter() - began)
        score = float(outputs.score[0])
        judged.append(Judged(item, score))
        found = None if outputs.map is None else outputs.map[0]
        if found is not None and (item.mask is not None or item.anomalous is False):
            pixels_of.add(found, _truth(item, pixels))
            measured = measured or item.mask is not None
        if show is not None:
            mask = outputs.mask[0] if outputs.mask is not None else None
            if mask is None:
                mask = found >= limit if found is not None else np.zeros(pixels.shape[:2], dtype=bool)
            show(item, _picture(pixels, found, mask, f"{score:.3f}", full=full))
    return Evaluation(
        tuple(judged),
        limit,
        pixels_of.auroc if measured else None,
        pixels_of.pro if measured else None,
        float(np.median(times)) if times else 0.0,
        tuple(refused),
    )


def _truth(item: Item, pixels: Pixels) -> NDArray[np.bool_]:
    if item.mask is None:
        return np.zeros(pixels.shape[:2], dtype=bool)
    truth = flat(decode(item.mask.read_bytes(), max_pixels=MAX_PIXELS)) > 0
    if truth.shape != pixels.shape[:2]:
        sizes = f"{truth.shape[1]}x{truth.shape[0]} and {pixels.shape[1]}x{pixels.shape[0]}"
        raise InvalidInput("MASK_SIZE_MISMATCH", f"{item.mask} is not of its image's size: {sizes}")
    return truth


def _picture(
    pixels: Pixels, found: NDArray[np.float32] | None, mask: NDArray[np.bool_], text: str, *, full: bool
) -> Pixels:
    outlined = visualize.simple(pixels, mask)
    if not full:
        return outlined
    height, width = pixels.shape[:2]
    heat = visualize.full(pixels, mask.astype(np.float32) if found is None else found, mask, text)
    flat = Image.fromarray(visualize.mask_pixels(mask)).resize((width, height), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (4 * width + 3 * _GAP, height), "white")
    for place, part in enumerate((pixels, heat, np.asarray(flat), outlined)):
        sheet.paste(Image.fromarray(part).convert("RGB"), (place * (width + _GAP), 0))
    return np.asarray(sheet)


def picture_of(folder: Path, item: Item) -> Path:
    """Where an image's picture is saved: a PNG, told from that of an image that only its suffix tells apart."""
    path = folder / item.name
    return path if path.suffix == ".png" else path.with_name(f"{path.name}.png")


def save(folder: Path) -> Callable[[Item, Pixels], None]:
    """Saves pictures below a folder under their images' names."""

    def show(item: Item, picture: Pixels) -> None:
        path = picture_of(folder, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(visualize.encode(picture))

    return show
