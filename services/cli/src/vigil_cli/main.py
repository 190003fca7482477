"""The `vigil` command."""

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from vigil_cli import frames, models, rollout, shadow, sites
from vigil_cli.annotate import annotate
from vigil_cli.check import check
from vigil_cli.evaluate import evaluate
from vigil_cli.export import export
from vigil_cli.local import commands as local
from vigil_cli.optimise import optimise
from vigil_cli.options import run
from vigil_cli.review import review
from vigil_cli.stream import stream
from vigil_cli.train import train

app = typer.Typer(no_args_is_help=True)
app.command()(stream)
app.command()(train)
app.command()(evaluate)
app.command()(check)
app.command()(annotate)
app.command()(review)
app.command()(export)
app.add_typer(frames.app, name="frames")
models.app.command()(optimise)
app.add_typer(models.app, name="model")
app.add_typer(shadow.app, name="shadow")
app.add_typer(sites.app, name="site")
app.add_typer(local.app, name="local")
for verb in rollout.VERBS:
    app.command()(verb)


def _say_version(asked: bool) -> None:  # noqa: FBT001 - Typer's kind of callback
    if asked:
        typer.echo(f"vigil {metadata.version('vigil-cli')}")
        raise typer.Exit


@app.callback()
def vigil(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Visual anomaly detection: stream, train, publish, query."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where logs, data and pictures go.")] = Path("out/demo"),
) -> None:
    """Train on real solar cells, start every service here, stream 300 cells through them, and count."""
    from vigil_cli.demo import run_demo  # noqa: PLC0415 - needs the demo extra

    raise typer.Exit(run(run_demo(out)))


@app.command("demo-loop")
def demo_loop(
    out: Annotated[Path, typer.Option(help="Where logs, data and the export go.")] = Path("out/demo-loop"),
) -> None:
    """Train a version, review what it finds hard, train the next one on the export, and compare the two."""
    from vigil_cli.demo_loop import run_demo_loop  # noqa: PLC0415 - needs the demo extra

    raise typer.Exit(run(run_demo_loop(out)))


@app.command("demo-shadow")
def demo_shadow(
    out: Annotated[Path, typer.Option(help="Where logs, data and reports go.")] = Path("out/demo-shadow"),
) -> None:
    """Compare a good, a broken and a hardly seen candidate with the same live version, on real solar cells."""
    from vigil_cli.demo_shadow import run_demo_shadow  # noqa: PLC0415 - needs the demo extra

    raise typer.Exit(run(run_demo_shadow(out)))
