"""`vigil evaluate`: the offline test of a bundle, before anything is published."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from vigil_client import Visualization

from vigil_cli.evaluation.dataset import read_dataset
from vigil_cli.options import console, errors, told
from vigil_cli.stream import progress_bar

Engine = Literal["auto", "onnxruntime", "openvino"]


def evaluate(
    bundle: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The bundle.")],
    images: Annotated[Path, typer.Argument(exists=True, help="An image, a folder, or a data set with masks.")],
    *,
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own.")] = None,
    visualization: Annotated[
        Visualization, typer.Option(help="Pictures: simple (outline) or full (four side by side).")
    ] = Visualization.NONE,
    engine: Annotated[Engine, typer.Option(help="Which runtime judges.")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("out/evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of a table.")] = False,
) -> None:
    """Judge images with a bundle and measure: AUROC, F1, pixel AUROC, PRO, the confusion at any threshold.

    Folders named good, normal or ok hold normal images; abnormal, defect, bad and the like anomalous ones. The mask of
    001.png is 001_mask.png beside it, or 001.png in a folder mask, masks or ground_truth.
    """
    # They load the runtimes.
    from vigil_inference.model import LoadedModel  # noqa: PLC0415

    from vigil_cli.evaluation import report, run  # noqa: PLC0415

    with told():
        items = read_dataset(images)
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
            model = LoadedModel(bundle.read_bytes(), Path(folder), engine=engine, threads=os.cpu_count() or 1)
            pictures = None if visualization is Visualization.NONE else output / "pictures"
            found = run.evaluate(
                model,
                progress.track(items, description="judging"),
                threshold=threshold,
                show=run.save(pictures) if pictures else None,
                full=visualization is Visualization.FULL,
            )
            name = f"{model.engine.name} {model.engine.version}"
        facts = report.as_dict(found, bundle=bundle.name, digest=model.digest, engine=name)
        (output / "evaluation.json").write_text(json.dumps(facts, indent=2))
        (output / "evaluation.html").write_text(report.as_html(found, facts, pictures))
    for image, why in found.refused:
        errors.print(f"{image}: {why}")
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show(facts)
        if found.judged and not (facts["normal"] or facts["anomalous"]):
            unlabelled = "no image lies in a folder such as good/ or defect/, so there is nothing to measure by"
            errors.print(f"{unlabelled}; the report has the scores", soft_wrap=True)
        console.print(f"report: {output / 'evaluation.html'}", soft_wrap=True)
    if not found.judged:
        raise typer.Exit(1)


def _show(facts: dict[str, object]) -> None:
    table = Table("what", "measured")
    for name in ("images", "anomalous", "normal", "threshold", "auroc", "f1", "best_f1", "best_threshold"):
        table.add_row(name, _text(facts[name]))
    for name in ("pixel_auroc", "pro", "median_model_s"):
        table.add_row(name, _text(facts[name]))
    confusion = facts["confusion"]
    if isinstance(confusion, dict):
        for name, count in confusion.items():
            table.add_row(name, str(count))
    console.print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
