"""`vigil model`: bundles and their versions."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Column, Table
from vigil_client import Model, Route, RouteClient, StorageClient
from vigil_common.bundle import open_bundle, read_manifest
from vigil_common.errors import VigilError

from vigil_cli.options import (
    DEFAULT_STORAGE,
    LAST_VERSION,
    AsJson,
    StorageAddress,
    Token,
    Version,
    check_name,
    console,
    narrow_table,
    run,
    say_error,
    told,
)
from vigil_cli.sources import find_images

SHORT_DIGEST = len("sha256:") + 12
app = typer.Typer(help="Model bundles and versions.", no_args_is_help=True)

_PARITY_IMAGES = 8


@app.command("import")
def import_(
    export: Annotated[Path, typer.Argument(exists=True, help="An Anomalib export: its folder, .onnx or .xml.")],
    *,
    name: Annotated[str | None, typer.Option(help="The model's name; else the folder's.")] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Images whose scores pin the export.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How far their scores may be off elsewhere.")] = 1e-3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle goes.")] = Path("bundle.tar"),
) -> None:
    """Make a bundle of a model exported by Anomalib."""
    from vigil_trainer import import_export  # noqa: PLC0415 - loads the runtimes

    if name is not None:
        check_name(name)
    with told():
        parity = find_images(images)[:_PARITY_IMAGES] if images else ()
        bundle = import_export(export, name=name, parity_images=parity, tolerance=tolerance)
        output.write_bytes(bundle)
    manifest = read_manifest(bundle)
    facts = {"runtimes": ", ".join(manifest.artefacts), **manifest.lineage}
    console.print(f"{output}: model {manifest.name}, {len(bundle):,} bytes", soft_wrap=True)
    console.print("; ".join(f"{what} {value}" for what, value in facts.items()), soft_wrap=True)


@app.command()
def publish(
    bundle: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The bundle.")],
    *,
    version: Annotated[int, typer.Option(min=0, max=LAST_VERSION, help="0: the next free one.")] = 0,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Publish a bundle; the same bundle again keeps its version."""

    async def work() -> Model:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_publish(bundle, version=version)

    model = run(work())
    how = "published" if model.created else "had been published before"
    console.print(f"{model.name} version {model.version} {how}: {model.digest}", soft_wrap=True)


@app.command("list")
def list_(
    name: Annotated[str, typer.Argument(help="Only this model.")] = "",
    *,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """List published versions and which are live; `show` has their whole digests."""

    async def work() -> tuple[list[Model], list[Route]]:
        async with StorageClient(storage_address, token=token) as storage:
            models = await storage.models_list(name)
        async with RouteClient(storage_address, token=token) as routes:
            return models, await routes.list_routes(name)

    models, routes = run(work())
    if not models:
        console.print(f"no version of {name or 'any model'} is published: `vigil model publish BUNDLE`")
        return
    roles = {(route.model, route.candidate): "candidate" for route in routes}
    roles |= {(route.model, route.live): "live" for route in routes}
    table = narrow_table("model", "version", "", "formats", "MB", "published", "digest")
    for model in models:
        published, digest = f"{model.published_at.astimezone():%Y-%m-%d %H:%M}", model.digest[:SHORT_DIGEST]
        formats, size = "\n".join(model.formats), f"{model.size_bytes / 1e6:,.1f}"
        role = roles.get((model.name, model.version)) or ("deprecated" if model.deprecated else "")
        table.add_row(model.name, str(model.version), role, formats, size, published, digest)
    console.print(table)
    for model in filter(lambda found: found.deprecated, models):
        text = f"{model.name} version {model.version} is deprecated: {model.deprecated}"
        console.print(text, soft_wrap=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Version = 0,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show one version: who published it when, what it takes and gives, its lineage and metrics."""

    async def work() -> Model:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_get(name, version)

    model = run(work())
    manifest = yaml.safe_load(model.manifest)
    facts = {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "bytes": model.size_bytes,
        "formats": list(model.formats),
        "published_at": model.published_at.isoformat(timespec="seconds"),
        "published_by": model.published_by,
        "deprecated": model.deprecated,
        "threshold": manifest.get("threshold"),
        "input": manifest.get("input"),
        "outputs": manifest.get("outputs"),
        "parity_samples": len(manifest.get("parity", ())),
        "lineage": manifest.get("lineage", {}),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table("what", Column("is", overflow="fold"))
    for what, value in facts.items():
        nested = value.items() if isinstance(value, dict) else ()
        if not nested:
            table.add_row(what, _plain(value))
        for inner, found in nested:
            table.add_row(f"{what}.{inner}", _plain(found))
    console.print(table)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Version = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="NAME-VERSION.tar where not given.")] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Save a version's bundle; the file appears only once its digest has been checked."""

    async def work() -> Path:
        async with StorageClient(storage_address, token=token) as storage:
            model = await storage.models_get(name, version)
            path = output or Path(f"{model.name}-{model.version}.tar")
            await storage.models_save(model.name, model.version, path)
            return path

    console.print(str(run(work())), soft_wrap=True)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The bundle.")],
    *,
    digest: Annotated[str, typer.Option(help="What it must hash to.")] = "",
) -> None:
    """Check a bundle as a worker does before it serves it: digest, content, and parity on each runtime it is for."""
    from vigil_inference.model import LoadedModel  # noqa: PLC0415 - loads the runtimes

    table = Table("runtime", "parity sample", "expected", "found", "tolerance")
    try:
        content = bundle.read_bytes()
        for engine in open_bundle(content, expected_digest=digest or None).manifest.artefacts:
            with tempfile.TemporaryDirectory() as folder:
                model = LoadedModel(content, Path(folder), engine=engine)
            for one in model.parity:
                table.add_row(engine, one.sample, f"{one.expected:.6f}", f"{one.actual:.6f}", f"{one.tolerance:g}")
            if not model.parity:
                table.add_row(engine, "none in the bundle", "-", "-", "-")
    except VigilError as error:
        say_error(f"{error.reason}: {error}")
        raise typer.Exit(1) from error
    console.print(table)
    against = "" if digest else " (give --digest to have it compared with what it should be)"
    console.print(f"{bundle}: {model.digest}{against}", soft_wrap=True)


@app.command()
def deprecate(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Annotated[int, typer.Option(min=1, max=LAST_VERSION, help="Which one.")],
    reason: Annotated[str, typer.Option(help="Why it should not be used any more.")],
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Say that a version should not be used any more; it stays, and what runs it goes on."""

    async def work() -> Model:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.models_deprecate(name, version, reason)

    model = run(work())
    console.print(f"{model.name} version {model.version} is deprecated: {model.deprecated}", soft_wrap=True)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Version = 0,
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though an AnomalyModel decides: its operator is away.")
    ] = False,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Make a published version live; its token needs the role admin."""
    route = run(make_live(storage_address, name, version, threshold=threshold, force=force, token=token))
    workers = "its workers are yours to start; an AnomalyModel starts them by itself"
    console.print(f"{route.model} version {route.live} is live; {workers}", soft_wrap=True)


async def make_live(
    storage_address: str,
    name: str,
    version: int,
    *,
    threshold: float | None = None,
    force: bool = False,
    token: str | None = None,
) -> Route:
    """Have storage write the route; workers and ingest follow within a second."""
    async with RouteClient(storage_address, token=token) as routes:
        return await routes.promote(name, version, threshold=threshold, force=force)
