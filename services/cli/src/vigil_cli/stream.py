"""`vigil stream`: images to ingest, verdicts to the terminal."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from vigil_client import Frame, Result, VigilClient, Visualization, WaitFor
from vigil_common.trace import traced

from vigil_cli.options import DEFAULT_INGEST, Address, AsJson, Token, console, errors, hint, run
from vigil_cli.sources import Source, SourceError, open_source

# Of errors of one kind; a folder sent to the wrong model would print a line for every image.
_SHOWN_OF_A_KIND = 10
# What a label may hold.
_LONGEST_SOURCE = 1024


def progress_bar() -> Progress:
    """The progress bar of every command, on standard error."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=errors)


def stream(
    paths: Annotated[list[str], typer.Argument(help="Folders, globs, image files, videos or camera URLs.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name.")],
    address: Address = DEFAULT_INGEST,
    wait: Annotated[WaitFor, typer.Option(help="When a frame counts as done.")] = WaitFor.VERDICT,
    camera: Annotated[str | None, typer.Option(help="Name of the camera.")] = None,
    visualization: Annotated[Visualization, typer.Option(help="Picture to save per frame.")] = Visualization.NONE,
    pictures: Annotated[Path, typer.Option(help="Where pictures are saved.")] = Path("out/stream"),
    window: Annotated[int, typer.Option(min=1, help="Most frames in flight.")] = 64,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Send images to a model; prints those that it calls anomalous, and a line on all."""
    try:
        source = open_source(paths)
    except SourceError as error:
        raise typer.BadParameter(str(error)) from error
    if source.left_out:
        what = f"left out, as no images by their names: {source.left_out}"
        errors.print(f"{what}; name a file itself to have it sent", highlight=False, soft_wrap=True)
    names: dict[str, str] = {}

    async def frames() -> AsyncIterator[Frame]:
        async for name, image in source:
            # So that a stored frame leads back to its file. A camera's URL may hold a password.
            labels = {} if "://" in name else {"source": quote(name, safe="/#")[-_LONGEST_SOURCE:]}
            frame = Frame(image, model, camera=camera, visualization=visualization, labels=labels)
            names[frame.frame_id] = name
            yield frame

    async def work() -> list[Result]:
        with traced("client") as tracer:
            sdk = tracer.sdk if tracer is not None else None
            async with VigilClient(address, window=window, token=token, tracer=sdk) as client:
                return await _collect(client.stream(frames(), wait_for=wait), source, names, pictures, as_json=as_json)

    results = run(work())
    if not as_json:
        _show(results)
    for next_step in {hint(result.error) for result in results if result.error} - {""}:
        errors.print(next_step, highlight=False, soft_wrap=True)
    if any(result.error for result in results):
        raise typer.Exit(1)


async def _collect(
    answers: AsyncIterator[Result], source: Source, names: dict[str, str], pictures: Path, *, as_json: bool
) -> list[Result]:
    results: list[Result] = []
    refused: Counter[str] = Counter()
    with progress_bar() as progress:
        task = progress.add_task("streaming", total=source.total)
        async for result in answers:
            progress.advance(task)
            name = names.pop(result.frame_id)
            if as_json:
                typer.echo(json.dumps(_plain(result, name)))
            elif result.error is not None:
                reason = result.error.reason or result.error.code
                refused[reason] += 1
                if refused[reason] <= _SHOWN_OF_A_KIND:
                    errors.print(f"{name}: {reason}: {result.error.message}", highlight=False, soft_wrap=True)
            elif result.verdict is not None and result.verdict.anomalous:
                console.print(f"{name}: anomalous, {result.verdict.score:.3f}", highlight=False, soft_wrap=True)
            if result.verdict is not None and result.verdict.visualization:
                await asyncio.to_thread(_save, pictures / f"{result.frame_id}.png", result.verdict.visualization)
                # A long stream must not pile up its pictures in memory.
                result = replace(result, verdict=replace(result.verdict, visualization=None))  # noqa: PLW2901
            results.append(result)
    for reason, count in refused.items():
        if not as_json and count > _SHOWN_OF_A_KIND:
            more = f"{count - _SHOWN_OF_A_KIND} more: {reason}; --json names them all"
            errors.print(more, highlight=False, soft_wrap=True)
    return results


def _save(path: Path, picture: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)


def _plain(result: Result, name: str) -> dict[str, object]:
    plain: dict[str, object] = {"frame_id": result.frame_id, "source": name, "latency_s": round(result.latency_s, 6)}
    if result.verdict is not None:
        found = result.verdict
        plain |= {"model": found.model, "version": found.version, "digest": found.digest, "score": found.score}
        plain |= {"threshold": found.threshold, "anomalous": found.anomalous}
    elif result.error is not None:
        plain["error"] = {"code": result.error.code, "reason": result.error.reason, "message": result.error.message}
    else:
        plain["accepted"] = result.accepted
    return plain


def _show(results: list[Result]) -> None:
    verdicts = [result.verdict for result in results if result.verdict is not None]
    table = Table("frames", "accepted", "verdicts", "anomalous", "errors", "median latency")
    latencies = sorted(result.latency_s for result in results)
    table.add_row(
        str(len(results)),
        str(sum(result.accepted for result in results)),
        str(len(verdicts)),
        str(sum(verdict.anomalous for verdict in verdicts)),
        str(sum(result.error is not None for result in results)),
        f"{latencies[len(latencies) // 2] * 1000:.0f} ms" if latencies else "-",
    )
    console.print(table)
