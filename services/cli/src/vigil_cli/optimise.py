"""`vigil model optimise`: a published version made over for speed, as a new version."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from vigil_client import HumanLabel, Model, StorageClient
from vigil_common.bundle import open_bundle

from vigil_cli.options import DEFAULT_STORAGE, StorageAddress, Token, Version, console, narrow_table, run
from vigil_cli.sources import find_images

if TYPE_CHECKING:
    from vigil_trainer.optimise import Measured

_CALIBRATION_IMAGES = 64
_MEASURED_IMAGES = 500


def optimise(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Version = 0,
    normal: Annotated[
        Path | None, typer.Option(exists=True, help="Normal images; without it, stored frames judged or reviewed so.")
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
    that people called anomalous. The new version rolls out as any other, through shadow and its gates.
    """
    from vigil_trainer.optimise import optimise as make  # noqa: PLC0415 - loads the runtimes

    async def gather() -> tuple[Model, bytes, list[bytes], list[bytes]]:
        async with StorageClient(storage_address, token=token) as storage:
            model, content = await storage.models_download(name, version)
            good = _read(normal) if normal else await _stored(storage, name, HumanLabel.NORMAL)
            if not normal and not good:
                good = await _stored(storage, name, None)
            bad = _read(anomalous) if anomalous else await _stored(storage, name, HumanLabel.ANOMALOUS)
            return model, content, good, bad

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
        new = await publish(made.bundle)
        console.print(f"{name} version {new.version} published: {new.digest}", soft_wrap=True)

    run(work())


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


async def _stored(storage: StorageClient, name: str, label: HumanLabel | None) -> list[bytes]:
    """Stored frames that people called so; with None, those that were judged normal."""
    anomalous = False if label is None else None
    query = storage.frames_query(name, human_label=label, anomalous=anomalous, limit=_MEASURED_IMAGES)
    frames = [frame async for frame in query]
    return [(await storage.frames_get(name, frame.frame_id, camera=frame.camera))[1] for frame in frames]
