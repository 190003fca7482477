"""Which images a folder holds, which of them are anomalous, and where; by its names alone.

Anomalib's Folder layout, MVTec AD's, and images with masks beside them are read:

- `good`, `normal`, `ok` hold normal images; `abnormal`, `anomalous`, `anomaly`, `bad`, `defect`, `defective`, `ng`, and
  an export's `abnormal_unmasked`, anomalous ones, and so does any other folder below `test`. Where there is a `test`,
  only that is read.
- The mask of `001.png` is `001_mask.png` beside it, or `001.png` or `001_mask.png` in a folder `mask`, `masks` or
  `ground_truth`, there also below the name of the image's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vigil_cli.sources import SourceError, find_images

if TYPE_CHECKING:
    from pathlib import Path

NORMAL = frozenset({"good", "normal", "ok"})
ANOMALOUS = frozenset({"abnormal", "abnormal_unmasked", "anomalous", "anomaly", "bad", "defect", "defective", "ng"})
MASKS = frozenset({"mask", "masks", "ground_truth"})
_MASK_SUFFIX = "_mask"


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    Attributes:
        path: The file.
        name: Its path within the folder.
        anomalous: What it is; None where nothing says.
        mask: Where it is anomalous; None where nothing says.
    """

    path: Path
    name: str
    anomalous: bool | None
    mask: Path | None


def read_dataset(root: Path) -> list[Item]:
    """Every image of a folder, or the one that a file is.

    Raises:
        SourceError: No image there.
    """
    if root.is_file():
        return [_item(root, root.parent, {root.with_name(f"{root.stem}{_MASK_SUFFIX}.png")})]
    found = find_images(root)
    images = [path for path in found if not _is_mask(path, root)]
    if any(path.relative_to(root).parts[0] == "test" for path in images):
        images = [path for path in images if path.relative_to(root).parts[0] == "test"]
    if not images:
        raise SourceError(f"no image in {root}")
    masks = set(found) - set(images)
    return [_item(path, root, masks) for path in images]


def _is_mask(path: Path, root: Path) -> bool:
    return path.stem.endswith(_MASK_SUFFIX) or not MASKS.isdisjoint(path.relative_to(root).parts[:-1])


def _item(path: Path, root: Path, masks: set[Path]) -> Item:
    folders = path.relative_to(root).parts[:-1]
    # A mask folder's names are those of the anomalous images: good/01.png has nothing to do with mask/01.png.
    places = _places(path, root) if NORMAL.isdisjoint(folders) else []
    mask = next((found for found in places if found in masks and found.is_file()), None)
    anomalous: bool | None = None
    if mask is not None:
        anomalous = True
    elif not NORMAL.isdisjoint(folders):
        anomalous = False
    elif not ANOMALOUS.isdisjoint(folders) or (len(folders) > 1 and folders[0] == "test"):
        anomalous = True
    return Item(path, str(path.relative_to(root)), anomalous, mask)


def _places(path: Path, root: Path) -> list[Path]:
    """Where the mask of an image may be, the likeliest first."""
    names = [f"{path.stem}{_MASK_SUFFIX}.png", f"{path.stem}.png"]
    places = [path.with_name(names[0])]
    folder = path.parent
    above = [folder, *folder.parents]
    for base in above[: above.index(root) + 1] if root in above else [folder]:
        for mask_folder in sorted(MASKS):
            for within in (base / mask_folder / folder.name, base / mask_folder):
                places += [within / name for name in names]
    return places
