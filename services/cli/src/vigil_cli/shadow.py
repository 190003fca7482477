"""`vigil shadow`: a candidate beside live, and whether it is better."""

import json
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.live import Live as LiveDisplay
from rich.table import Column, Table
from rich.text import Text
from vigil.shadow.v1 import shadow_pb2
from vigil.types.v1 import types_pb2
from vigil_client import Route, RouteClient, ServiceError, StorageClient

from vigil_cli.options import DEFAULT_STORAGE, LAST_VERSION, AsJson, Since, StorageAddress, Token, Until, console, run
from vigil_cli.shadow_client import ShadowClient
from vigil_cli.shadow_html import PICTURES, write_html
from vigil_cli.shadow_lines import OUTCOMES, rows, title
from vigil_cli.stream import progress_bar

app = typer.Typer(help="A candidate beside live, on the same frames.", no_args_is_help=True)

DEFAULT_SHADOW = "localhost:50054"
Model = Annotated[str, typer.Argument(help="The model's name.")]
ShadowAddress = Annotated[str, typer.Option(envvar="VIGIL_SHADOW_ADDRESS", help="Shadow as HOST:PORT.")]
Run = Annotated[str, typer.Option("--run", help="A comparison's number or replay-ID; the latest where absent.")]
MinFrames = Annotated[int | None, typer.Option(help="Frames compared, at least.")]
MinAnomalous = Annotated[int | None, typer.Option(help="Frames that live calls anomalous, at least.")]
MinDuration = Annotated[float | None, typer.Option(help="Seconds of comparison, at least.")]
MaxFlips = Annotated[float | None, typer.Option(min=0, max=1, help="Fraction of frames with another label.")]
MaxAlarms = Annotated[float | None, typer.Option(min=0, max=1, help="Of live's normal frames, those now anomalous.")]
MaxMisses = Annotated[float | None, typer.Option(min=0, max=1, help="Of live's anomalous frames, those now normal.")]
MaxLatency = Annotated[float | None, typer.Option(help="Candidate's inference time over live's.")]
MaxErrors = Annotated[float | None, typer.Option(min=0, max=1, help="Fraction of frames the candidate can't judge.")]

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


@app.command()
def start(
    model: Model,
    *,
    version: Annotated[int, typer.Option(min=0, max=LAST_VERSION, help="The candidate; 0: the newest.")] = 0,
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own.")] = None,
    sample_fraction: Annotated[float, typer.Option(min=0, max=1, help="Which part of the frames it gets.")] = 1.0,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Compare a published version with live from now on; on Kubernetes the AnomalyModel does so by itself.

    Its token needs the role admin.
    """

    async def work() -> Route:
        async with RouteClient(storage_address, token=token) as routes:
            return await routes.start_comparison(model, version, threshold=threshold, sample_fraction=sample_fraction)

    route = run(work())
    console.print(
        f"{model} version {route.candidate} is compared with live version {route.live} (run {route.comparison})"
    )


@app.command()
def stop(model: Model, *, storage_address: StorageAddress = DEFAULT_STORAGE, token: Token = None) -> None:
    """End the comparison; its report stays. Its token needs the role admin."""

    async def work() -> Route:
        async with RouteClient(storage_address, token=token) as routes:
            return await routes.stop_comparison(model)

    route = run(work())
    console.print(f"{model} version {route.live} is live, nothing is compared with it")


@app.command()
def report(
    model: Model,
    *,
    run_name: Run = "",
    min_frames: MinFrames = None,
    min_anomalous: MinAnomalous = None,
    min_duration: MinDuration = None,
    max_flip_fraction: MaxFlips = None,
    max_new_false_alarms: MaxAlarms = None,
    max_new_misses: MaxMisses = None,
    max_latency_ratio: MaxLatency = None,
    max_error_fraction: MaxErrors = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it as one HTML file.")] = None,
    shadow_address: ShadowAddress = DEFAULT_SHADOW,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """What was found so far, and what the gates say of it."""
    gates = gates_of(
        min_frames=min_frames,
        min_anomalous=min_anomalous,
        min_duration_s=min_duration,
        max_flip_fraction=max_flip_fraction,
        max_new_false_alarms=max_new_false_alarms,
        max_new_misses=max_new_misses,
        max_latency_ratio=max_latency_ratio,
        max_error_fraction=max_error_fraction,
    )

    async def work() -> shadow_pb2.GetReportResponse:
        async with ShadowClient(shadow_address, token) as shadow:
            found = await shadow.report(model, run=run_name, gates=gates, detail=output is not None)
            if output is not None:
                worst = await shadow.disagreements(model, run=run_name, limit=PICTURES)
                images = await stored_images(storage_address, token, model, worst)
                write_html(output, found, worst, images)
        return found

    found = run(work())
    if as_json:
        typer.echo(json.dumps(MessageToDict(found, preserving_proto_field_name=True)))
        return
    show(found)
    if not gates.ListFields():
        console.print(f"by the default gates; those of an AnomalyModel: `vigil report {model}`")
    if output is not None:
        console.print(f"written to {output}")


async def stored_images(
    address: str, token: str | None, model: str, worst: list[shadow_pb2.Disagreement]
) -> dict[str, bytes]:
    """The frames' images, of those that are stored."""
    images = {}
    async with StorageClient(address, token=token) as storage:
        for one in worst:
            try:
                _, images[one.frame_id] = await storage.frames_get(model, one.frame_id, camera=one.camera or None)
            except ServiceError as error:
                if error.failure.code != "NOT_FOUND":
                    raise
    return images


def gates_of(*, min_duration_s: float | None = None, **given: float | None) -> shadow_pb2.Gates:
    """Gates with what is given; the rest has the service's defaults."""
    gates = shadow_pb2.Gates(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if min_duration_s is not None:
        gates.min_duration.FromNanoseconds(round(min_duration_s * 1e9))
    return gates


def show(found: shadow_pb2.GetReportResponse | shadow_pb2.WatchReportResponse) -> None:
    """Print both tables and the decision."""
    console.print(summary(found.report))
    console.print(gate_table(found.decision))
    overall = OUTCOMES[found.decision.overall]
    console.print(Text.assemble((overall, _COLOURS[overall]), f": {found.decision.reason}"))


def summary(found: shadow_pb2.Report) -> Table:
    """The report as a table."""
    table = Table(Column("what"), Column("found", justify="right"), title=title(found))
    for line in rows(found):
        table.add_row(*line)
    return table


def gate_table(decision: shadow_pb2.Decision) -> Table:
    """The gates as a table."""
    table = Table("gate", "says", "why")
    for gate in decision.gates:
        outcome = OUTCOMES[gate.outcome]
        table.add_row(gate.gate, Text(outcome, _COLOURS[outcome]), gate.reason)
    return table


@app.command()
def watch(
    model: Model,
    *,
    shadow_address: ShadowAddress = DEFAULT_SHADOW,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Follow the report until interrupted."""

    async def work() -> None:
        async with ShadowClient(shadow_address, token) as shadow:
            if as_json:
                async for found in shadow.watch(model):
                    typer.echo(json.dumps(MessageToDict(found, preserving_proto_field_name=True)))
                return
            with LiveDisplay(console=console, auto_refresh=False) as display:
                async for found in shadow.watch(model):
                    table = summary(found.report)
                    table.caption = f"{OUTCOMES[found.decision.overall]}: {found.decision.reason}"
                    display.update(table, refresh=True)

    run(work())


@app.command()
def disagreements(
    model: Model,
    *,
    run_name: Run = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    shadow_address: ShadowAddress = DEFAULT_SHADOW,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Frames of which both versions say different things, worst first; `vigil frames` opens them by their id."""

    async def work() -> list[shadow_pb2.Disagreement]:
        async with ShadowClient(shadow_address, token) as shadow:
            return await shadow.disagreements(model, run=run_name, limit=limit)

    found = run(work())
    if as_json:
        for one in found:
            for side in (one.live, one.candidate):
                side.ClearField("anomaly_map")
            typer.echo(json.dumps(MessageToDict(one, preserving_proto_field_name=True)))
        return
    table = Table(Column("frame", no_wrap=True), Column("camera", overflow="fold"), "live → candidate", "severity")
    for one in found:
        said = f"{_said(one.live)} → {_said(one.candidate)}"
        table.add_row(one.frame_id, one.camera, said, f"{one.severity:.3f}")
    console.print(table)


def _said(side: shadow_pb2.Side) -> str:
    label = "anomalous" if side.label == types_pb2.LABEL_ANOMALOUS else "normal"
    return f"{side.score:.3f} {label}"


@app.command()
def replay(
    model: Model,
    *,
    replay_id: Annotated[str, typer.Option("--id", help="Names it; the same again goes on where it was.")],
    version: Annotated[int, typer.Option(min=1, max=LAST_VERSION, help="The candidate.")],
    worker: Annotated[str, typer.Option(help="Where a worker with it answers, as HOST:PORT.")],
    since: Since = None,
    until: Until = None,
    camera: Annotated[str, typer.Option(help="Only this camera.")] = "",
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames a second.")] = 10.0,
    shadow_address: ShadowAddress = DEFAULT_SHADOW,
    token: Token = None,
) -> None:
    """Compare a version with what live said of stored frames, without touching live."""
    request = shadow_pb2.ReplayRequest(
        model=model, replay_id=replay_id, worker=worker, version=version, camera=camera, rate=rate
    )
    if since is not None:
        request.start.FromDatetime(since)
    if until is not None:
        request.stop.FromDatetime(until)

    async def work() -> shadow_pb2.GetReportResponse:
        async with ShadowClient(shadow_address, token) as shadow:
            with progress_bar() as progress:
                task = progress.add_task("replaying", total=None)
                async for answer in shadow.replay(request):
                    progress.update(task, completed=answer.frames)
            return await shadow.report(model, run=f"replay-{replay_id}")

    show(run(work()))
