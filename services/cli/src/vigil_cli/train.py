"""`vigil train`: folders, an export, or what people reviewed in the store; in, a bundle out."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from vigil_client import StorageClient

from vigil_cli.evaluation.dataset import Item, read_dataset
from vigil_cli.export import Format, write_export
from vigil_cli.options import DEFAULT_STORAGE, Since, StorageAddress, Token, Until, check_name, console, run, told
from vigil_cli.sources import SourceError, find_images

# Fewer than these say too little of where the threshold belongs.
FEW_ANOMALOUS = 10


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What to learn from.

    Attributes:
        normal: Images without anomalies.
        abnormal: Anomalous ones.
        masks: Where they are anomalous, by their place among the abnormal ones.
    """

    normal: tuple[Path, ...] = ()
    abnormal: tuple[Path, ...] = ()
    masks: dict[int, Path] = field(default_factory=dict)

    @classmethod
    def of_dataset(cls, root: Path) -> Self:
        """An export or a data set as `vigil evaluate` reads it; of one with `train` and `test`, `train` alone.

        Raises:
            SourceError: No image there.
        """
        part = root / "train"
        items = read_dataset(part if part.is_dir() else root)
        normal = tuple(item.path for item in items if item.anomalous is False)
        return cls._with_masks(normal, [item for item in items if item.anomalous])

    @classmethod
    def of_folders(cls, normal: Path | None, abnormal: Path | None, masks: Path | None) -> Self:
        """Folders named one by one; the mask of 001.png is 001.png or 001_mask.png among the masks, or beside it.

        Raises:
            SourceError: No image in a folder.
        """
        items = _of_one_kind(abnormal, anomalous=True) if abnormal else []
        known = {path.stem.removesuffix("_mask"): path for path in find_images(masks)} if masks else {}
        items = [replace(item, mask=known.get(item.path.stem, item.mask)) for item in items]
        good = tuple(item.path for item in _of_one_kind(normal, anomalous=False)) if normal else ()
        return cls._with_masks(good, items)

    @classmethod
    def _with_masks(cls, normal: tuple[Path, ...], items: Sequence[Item]) -> Self:
        masks = {place: item.mask for place, item in enumerate(items) if item.mask is not None}
        return cls(normal, tuple(item.path for item in items), masks)

    def __add__(self, other: "TrainingSet") -> "TrainingSet":
        shift = len(self.abnormal)
        masks = self.masks | {shift + place: mask for place, mask in other.masks.items()}
        return TrainingSet(self.normal + other.normal, self.abnormal + other.abnormal, masks)


def _of_one_kind(folder: Path, *, anomalous: bool) -> list[Item]:
    """Images of a folder that was named as one of their kind.

    Raises:
        SourceError: No image there, or folders below it say otherwise.
    """
    items = read_dataset(folder)
    others = [item for item in items if item.anomalous is (not anomalous)]
    if others:
        kinds = ("anomalous", "normal") if anomalous else ("normal", "anomalous")
        what = f"{len(others)} images of the {kinds[0]} folder {folder} are {kinds[1]} by their folders' names"
        raise SourceError(
            f"{what}, such as {others[0].name}; name the folder of one kind, or give `vigil train {folder}`"
        )
    return items


class Trainer(Enum):
    """Who trains."""

    BUILTIN = "builtin"
    ANOMALIB = "anomalib"


def train(
    data: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="An export, or Anomalib's folder layout.")
    ] = None,
    *,
    name: Annotated[str, typer.Option("--name", "--model", "-m", help="The model's name.")],
    normal: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Images without anomalies.")] = None,
    abnormal: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Anomalous ones.")] = None,
    masks: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Masks of those, by name.")] = None,
    from_store: Annotated[bool, typer.Option("--from-store", help="The frames that people labelled.")] = False,
    camera: Annotated[str | None, typer.Option(help="Only this camera's.")] = None,
    since: Since = None,
    until: Until = None,
    trainer: Annotated[Trainer, typer.Option(help="Anomalib is an extra: vigil-cli\\[anomalib].")] = Trainer.BUILTIN,
    algorithm: Annotated[str, typer.Option(help="Anomalib's model, such as Patchcore or Padim.")] = "Patchcore",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle goes.")] = Path("bundle.tar"),
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Fit a model to normal images and write its bundle; sources given together are added up.

    Anomalous images only choose the threshold, and measure: AUROC, F1 and, with masks, pixel AUROC and PRO stand in the
    bundle's lineage.
    """
    asked: dict[str, Any] = {
        "folders": [str(path) for path in (data, normal, abnormal) if path],
        "from_store": from_store,
        "camera": camera,
        "since": since.isoformat() if since else None,
        "until": until.isoformat() if until else None,
    }
    source = {key: value for key, value in asked.items() if value}
    if not (data or normal or abnormal or from_store):
        raise typer.BadParameter("name a folder, --normal DIR or --from-store")
    check_name(name)
    with told():
        output.parent.mkdir(parents=True, exist_ok=True)

    async def work() -> None:
        images = TrainingSet.of_dataset(data) if data else TrainingSet()
        images += TrainingSet.of_folders(normal, abnormal, masks)
        with tempfile.TemporaryDirectory() as folder:
            if from_store:
                reviewed = Path(folder) / "reviewed"
                async with StorageClient(storage_address, token=token) as storage:
                    frames = storage.frames_export(name, camera=camera, since=since, until=until, decided=True)
                    summary = await write_export(frames, reviewed, Format.FOLDER, source)
                source["reviewed"] = summary.images
                images += TrainingSet.of_dataset(reviewed)
            fit = algorithm if trainer is Trainer.ANOMALIB else None
            bundle = await asyncio.to_thread(_train, images, name, fit, source)
        await asyncio.to_thread(_save, output, bundle)

    run(work())


def _train(images: TrainingSet, name: str, algorithm: str | None, source: dict[str, Any]) -> bytes:
    """Train by Anomalib's algorithm, or by the built-in trainer where none is given."""
    import vigil_trainer  # noqa: PLC0415 - loads the runtimes
    from vigil_trainer.train import FEWEST_IMAGES  # noqa: PLC0415 - likewise

    if "folders" not in source and len(images.normal) < FEWEST_IMAGES:
        few = f"training needs {FEWEST_IMAGES} frames that people labelled normal, there are {len(images.normal)}"
        raise SourceError(f"{few}; label more: vigil review, vigil annotate")
    given = f"{len(images.normal)} normal and {len(images.abnormal)} anomalous images, {len(images.masks)} masks"
    with console.status(f"training on {given}"):
        if algorithm is not None:
            result = vigil_trainer.train_anomalib(
                images.normal, images.abnormal, masks=images.masks, name=name, algorithm=algorithm, source=source
            )
        else:
            result = vigil_trainer.train(images.normal, images.abnormal, masks=images.masks, name=name, source=source)
    measured = {"AUROC": result.auroc, "F1": result.f1, "pixel AUROC": result.pixel_auroc, "PRO": result.pro}
    text = "".join(f", {what} {value:.3f}" for what, value in measured.items() if value is not None)
    console.print(f"{given}{text}, fitted in {result.fit_s:.1f} s", soft_wrap=True)
    if 0 < len(images.abnormal) < FEW_ANOMALOUS:
        console.print(
            f"{len(images.abnormal)} anomalous images chose the threshold: too few for it, and for these figures, to "
            "be relied on; compare it with what is live before it goes there",
            soft_wrap=True,
        )
    return result.bundle


def _save(output: Path, bundle: bytes) -> None:
    output.write_bytes(bundle)
    console.print(str(output), soft_wrap=True)
