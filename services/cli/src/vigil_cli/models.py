"""`vigil model`: bundles and their versions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from vigil_client import Model, StorageClient
from vigil_common.streams.ports import Route

from vigil_cli.options import (
    DEFAULT_REDIS,
    DEFAULT_STORAGE,
    RedisUrl,
    StorageAddress,
    Token,
    connect_streams,
    console,
    run,
)
from vigil_cli.sources import find_images

app = typer.Typer(help="Model bundles and versions.", no_args_is_help=True)

_PARITY_IMAGES = 8


@app.command("import")
def import_(
    export: Annotated[Path, typer.Argument(exists=True, help="An Anomalib export: its folder, .onnx or .xml.")],
    *,
    name: Annotated[str, typer.Option(help="The model's name.")],
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Images whose scores pin the export.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle goes.")] = Path("bundle.tar"),
) -> None:
    """Make a bundle of a model exported by Anomalib."""
    from vigil_trainer import import_export  # noqa: PLC0415 - loads the runtimes

    bundle = import_export(export, name=name, parity_images=find_images(images)[:_PARITY_IMAGES] if images else ())
    output.write_bytes(bundle)
    console.print(f"{output}: {len(bundle):,} bytes")


@app.command()
def publish(
    bundle: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The bundle.")],
    *,
    version: Annotated[int, typer.Option(help="0: the next free one.")] = 0,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Publish a bundle; the same bundle again keeps its version."""

    async def work() -> Model:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_publish(bundle.read_bytes(), version=version)

    model = run(work())
    how = "published" if model.created else "had been published before"
    console.print(f"{model.name} version {model.version} {how}: {model.digest}", soft_wrap=True, highlight=False)


@app.command("list")
def list_(
    name: Annotated[str, typer.Argument(help="Only this model.")] = "",
    *,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """List published versions."""

    async def work() -> list[Model]:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_list(name)

    table = Table("model", "version", "formats", "bytes", "published", Column("digest", overflow="fold"))
    for model in run(work()):
        published = model.published_at.isoformat(timespec="seconds")
        formats = ", ".join(model.formats)
        table.add_row(model.name, str(model.version), formats, f"{model.size_bytes:,}", published, model.digest)
    console.print(table)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Annotated[int, typer.Option(help="0: the newest.")] = 0,
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own.")] = None,
    redis_url: RedisUrl = DEFAULT_REDIS,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Make a published version live."""

    async def work() -> Route:
        async with StorageClient(storage_address, token=token) as storage:
            model = await storage.models_get(name, version)
        return await make_live(redis_url, model, threshold)

    route = run(work())
    console.print(f"{route.model} version {route.live.version} is live")


async def make_live(redis_url: str, model: Model, threshold: float | None = None) -> Route:
    """Write the route; workers and ingest follow within a second."""
    streams = await connect_streams(redis_url)
    try:
        return await streams.routing.promote(
            model.name, version=model.version, digest=model.digest, threshold=threshold
        )
    finally:
        await streams.close()
