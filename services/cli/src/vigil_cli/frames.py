"""`vigil frames`: what is stored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer
from rich.table import Table
from vigil_client import Annotation, HumanLabel, ReviewedFrame, StorageClient, StoredFrame

from vigil_cli.options import (
    DEFAULT_STORAGE,
    LAST_VERSION,
    AsJson,
    Since,
    StorageAddress,
    Token,
    Until,
    check_known,
    console,
    errors,
    narrow_table,
    run,
    told,
)
from vigil_cli.replay import replay
from vigil_cli.sources import SOURCE, source_label

app = typer.Typer(help="Stored frames.", no_args_is_help=True)
app.command()(replay)


@app.command()
def query(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    camera: Annotated[str | None, typer.Option(help="Only this camera.")] = None,
    since: Since = None,
    until: Until = None,
    anomalous: Annotated[bool | None, typer.Option("--anomalous/--normal", help="Only with this label.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only those that could not be judged.")] = False,
    min_score: Annotated[float | None, typer.Option(help="Least score.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Greatest score.")] = None,
    version: Annotated[int | None, typer.Option(min=1, max=LAST_VERSION, help="Only what this version judged.")] = None,
    human: Annotated[HumanLabel | None, typer.Option(help="Only what people say this of.")] = None,
    reviewed: Annotated[
        bool | None, typer.Option("--reviewed/--not-reviewed", help="Only what people labelled, or did not.")
    ] = None,
    disagreement: Annotated[
        bool | None, typer.Option("--disagreement/--agreement", help="Only where live and candidate differ, or agree.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Only what was sent with this label, such as source=FILE; again for more."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List stored frames, oldest first."""

    async def work() -> list[StoredFrame]:
        async with StorageClient(storage_address, token=token) as storage:
            for labels in _labels(label or []):
                found = storage.frames_query(
                    model,
                    camera=camera,
                    start=since,
                    stop=until,
                    anomalous=anomalous,
                    failed=failed,
                    min_score=min_score,
                    max_score=max_score,
                    version=version,
                    human_label=human,
                    reviewed=reviewed,
                    disagreement=disagreement,
                    labels=labels,
                    limit=limit + 1,
                )
                if frames := [frame async for frame in found]:
                    return frames
            await check_known(storage, model)
            return []

    frames = run(work())
    more = len(frames) > limit
    frames = frames[:limit]
    if not frames:
        if not as_json:
            errors.print(f"no stored frame of {model} is like that")
    elif as_json:
        for frame in frames:
            typer.echo(json.dumps(_plain(frame)))
    else:
        console.print(_table(frames))
    if more:
        last = f"{frames[-1].captured_at.astimezone():%Y-%m-%dT%H:%M:%S}"
        errors.print(f"the oldest {limit}, and there are more: --limit, or --since {last}", soft_wrap=True)


def _table(frames: Sequence[StoredFrame]) -> Table:
    """A line each."""
    # Columns without anything to tell apart would push the others off a narrow terminal.
    cameras, people = len({frame.camera for frame in frames}) > 1, any(frame.annotation for frame in frames)
    names = ["captured", "score", "label", "version", *["camera"] * cameras, *["people"] * people]
    table = narrow_table("frame", *names)
    for frame in frames:
        found = frame.verdict
        judged = ("-", frame.failure_reason, "-")
        if found is not None:
            judged = (f"{found.score:.3f}", "anomalous" if found.anomalous else "normal", str(found.version))
        told_of = [*[frame.camera] * cameras, *[_people(frame)] * people]
        table.add_row(frame.frame_id, f"{frame.captured_at.astimezone():%m-%d %H:%M:%S}", *judged, *told_of)
    return table


@app.command()
def get(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    frame_id: Annotated[str, typer.Argument(help="The frame's id.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save the image.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where to save the mask that stands.")] = None,
    camera: Annotated[str | None, typer.Option(help="Its camera; spares a search.")] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Show one stored frame as JSON with all that people said of it, and save its image and mask."""

    async def work() -> ReviewedFrame:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.frames_history(model, frame_id, camera=camera)

    found = run(work())
    with told():
        if output is not None:
            output.write_bytes(found.image)
        if mask is not None and found.mask is not None:
            mask.write_bytes(found.mask)
    history = {"annotations": [said(one) for one in found.annotations]} if found.annotations else {}
    typer.echo(json.dumps({**_plain(found.frame), **history}, indent=2))
    if mask is not None and found.mask is None:
        errors.print(f"{frame_id} has no mask")
        raise typer.Exit(1)


def _labels(given: Sequence[str]) -> list[dict[str, str]]:
    """What to ask for, in turn until something is found: a source as `vigil stream` sends it, then as it is."""
    found: dict[str, str] = {}
    for text in given:
        name, is_one, value = text.partition("=")
        if not (name and is_one and value):
            raise typer.BadParameter(f"{text} is not NAME=VALUE", param_hint="--label")
        found[name] = value
    if SOURCE not in found:
        return [found]
    return [{**found, SOURCE: source_label(found[SOURCE])}, found]


def _people(frame: StoredFrame) -> str:
    return f"{frame.annotation.label.value} ({frame.annotation.author})" if frame.annotation else "-"


def said(one: Annotation) -> dict[str, object]:
    """What a person said, as JSON has it."""
    plain: dict[str, object] = {"label": one.label.value, "author": one.author}
    return {**plain, "annotated_at": one.annotated_at.isoformat(), "note": one.note, "masked": one.masked}


def _plain(frame: StoredFrame) -> dict[str, object]:
    plain: dict[str, object] = {"frame_id": frame.frame_id, "model": frame.model, "camera": frame.camera}
    plain |= {"captured_at": frame.captured_at.isoformat(), "record_at": frame.stored_at.isoformat()}
    plain |= {"content_type": frame.content_type, "width": frame.width, "height": frame.height}
    if frame.verdict is not None:
        plain |= {"score": frame.verdict.score, "anomalous": frame.verdict.anomalous, "version": frame.verdict.version}
    else:
        plain["failure_reason"] = frame.failure_reason
    if frame.annotation is not None:
        plain["annotation"] = said(frame.annotation)
    labels = dict(frame.labels)
    if SOURCE in labels:
        labels[SOURCE] = unquote(labels[SOURCE])
    return {**plain, "labels": labels}
