"""`vigil model optimise`: a published version made over for speed, as a new version."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vigil_client import HumanLabel, Model, ServiceError, StorageClient
from vigil_common.bundle import open_bundle

from vigil_cli.options import DEFAULT_STORAGE, StorageAddress, Token, Version, console, narrow_table, run
from vigil_cli.sources import find_images

if TYPE_CHECKING:
    from vigil_trainer.optimise import Measured

_CALIBRATION_IMAGES = 64
_MEASURED_IMAGES = 500
# Queries for stored frames.
_ANOMALOUS = {"human_label": HumanLabel.ANOMALOUS}
_REVIEWED_NORMAL = {"human_label": HumanLabel.NORMAL}
_JUDGED_NORMAL = {"anomalous": False, "reviewed": False}


def optimise(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Version = 0,
    normal: Annotated[
        Path | None,
        typer.Option(exists=True, help="Normal images; without it, frames reviewed so, then those judged so."),
    ] = None,
    anomalous: Annotated[
        Path | None, typer.Option(exists=True, help="Anomalous images; without it, frames reviewed so.")
    ] = None,
    input_size: Annotated[
        list[int] | None,
        typer.Option(min=32, help="Also variants for a smaller image: pixels of its shorter side. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the bundle, don't publish it.")] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Make faster variants of a version, measure each here, and publish those that say the same as a new version.

    Quantisation learns from stored normal frames, every second of them; AUROC is measured on the others and on those
    that people called anomalous. Normal are those that people called so, and up to 500 in all those judged so
    that nobody reviewed. The new version rolls out as any other, through shadow and its gates.
    """
    from vigil_trainer.optimise import optimise as make  # noqa: PLC0415 - loads the runtimes

    async def gather() -> tuple[Model, bytes, list[bytes], list[bytes]]:
        async with StorageClient(storage_address, token=token) as storage:
            model, content = await storage.models_download(name, version)
            return model, content, *await gather_images(storage, name, normal, anomalous)

    async def publish(content: bytes) -> Model:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_publish(content, name=name)

    async def work() -> None:
        model, content, good, bad = await gather()
        bundle = open_bundle(content, expected_digest=model.digest)
        with console.status("making variants") as status:
            made = make(
                bundle,
                calibration=good[::2][:_CALIBRATION_IMAGES],
                normal=good[1::2],
                anomalous=bad,
                input_sizes=input_size or (),
                progress=status.update,
            )
        _show(made.measured, set(bundle.manifest.artefacts))
        if output is not None:
            output.write_bytes(made.bundle)
            console.print(f"{output}: {len(made.bundle):,} bytes")
            return
        if all(one.refused for one in made.measured if one.name not in bundle.manifest.artefacts):
            console.print("nothing to publish: none of them says the same")
            return
        new = await publish(made.bundle)
        console.print(f"{name} version {new.version} published: {new.digest}", soft_wrap=True)

    run(work())


async def gather_images(
    storage: StorageClient, name: str, normal: Path | None, anomalous: Path | None
) -> tuple[list[bytes], list[bytes]]:
    """Normal and anomalous images, of folders or else of the store; what is anomalous is not among the normal ones."""
    bad = _read(anomalous) if anomalous else await _stored(storage, name, _ANOMALOUS)
    known = frozenset(bad)  # the same picture may have been streamed again
    if normal:
        return [image for image in _read(normal) if image not in known], bad
    return await _stored(storage, name, _REVIEWED_NORMAL, _JUDGED_NORMAL, without=known), bad


def _show(measured: Sequence["Measured"], originals: set[str]) -> None:
    """The table, and below it why something is no variant."""
    table = narrow_table("artefact", "kept", "ms", "MB", "AUROC", "flips", "off by", "threshold")
    refused: dict[str, list[str]] = {}
    for one in measured:
        kept = "original" if one.name in originals else "no" if one.refused else "yes"
        numbers = ["-"] * 6
        if one.size_bytes:  # it was made
            area = "-" if one.auroc is None else f"{one.auroc:.3f}"
            size, off = f"{one.size_bytes / 1e6:.1f}", f"{one.furthest:.4f}"
            numbers = [f"{one.run_ms:.2f}", size, area, str(one.flips), off, f"{one.threshold:.4f}"]
        table.add_row(one.name, kept, *numbers)
        if one.refused:
            refused.setdefault(one.refused, []).append(one.name)
    console.print(table)
    for why, names in refused.items():
        console.print(f"{', '.join(names)}: {why}", soft_wrap=True)


def _read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in find_images(folder)[:_MEASURED_IMAGES]]


async def _stored(
    storage: StorageClient, name: str, *queries: dict[str, Any], without: AbstractSet[bytes] = frozenset()
) -> list[bytes]:
    """Images of stored frames, those of the first query first; none that is among others."""
    images: list[bytes] = []
    for query in queries:
        async for frame in storage.frames_query(name, **query):
            if len(images) == _MEASURED_IMAGES:
                return images
            try:
                _, image = await storage.frames_get(name, frame.frame_id, camera=frame.camera)
            except ServiceError as error:
                if error.failure.code != "NOT_FOUND":
                    raise
                continue  # what was found first is the oldest, which a quota drops meanwhile
            if image not in without:
                images.append(image)
    return images
