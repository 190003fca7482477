"""How Anomalib reads a folder of images and masks, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# What torchvision's `IMG_EXTENSIONS` holds, which Anomalib looks for.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def anomalib_folder(root: Path) -> list[tuple[Path, str, Path | None]]:
    """Image, label and mask as Anomalib's Folder data module pairs them, without torch.

    As in Anomalib 2.4.0dev (`make_folder_dataset` in data/datasets/image/folder.py at 0aa3fc49, and
    `_prepare_files_labels` in data/utils/path.py): every image below each folder; all sorted by path; the n-th mask
    belongs to the n-th abnormal image; the mask's stem holds the image's.
    """

    def files(name: str) -> list[Path]:
        found = [path for path in (root / name).glob("**/*") if path.suffix.lower() in EXTENSIONS and not path.is_dir()]
        if not found:
            raise RuntimeError(f"Found 0 {name} images")
        return sorted(found, key=str)

    abnormal = files("abnormal")
    masks = files("mask") if (root / "mask").exists() else []
    pairs: list[tuple[Path, str, Path | None]] = [(path, "normal", None) for path in files("normal")]
    for place, image in enumerate(abnormal):
        mask = masks[place] if place < len(masks) else None
        if mask is not None and image.stem not in mask.stem:
            raise ValueError(f"mismatch between {image} and {mask}")
        pairs.append((image, "abnormal", mask))
    return pairs
