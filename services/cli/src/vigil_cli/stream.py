"""`vigil stream`: images to ingest, verdicts to the terminal."""

import asyncio
import json
import os
import statistics
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from vigil_client import Frame, Result, VigilClient, Visualization, WaitFor
from vigil_common.trace import traced

from vigil_cli.options import DEFAULT_INGEST, Address, AsJson, Token, console, errors, hint, run
from vigil_cli.sources import SOURCE, Source, SourceError, open_source, source_label

# Of errors of one kind; a folder sent to the wrong model would print a line for every image.
_SHOWN_OF_A_KIND = 10
# Of how many frames the median latency is.
_LATENCIES = 10_000


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
        errors.print(f"{what}; name a file itself to have it sent", soft_wrap=True)
    names: dict[str, str] = {}

    async def frames() -> AsyncIterator[Frame]:
        async for name, image in source:
            # A camera's URL may hold a password.
            labels = {} if "://" in name else {SOURCE: source_label(name)}
            frame = Frame(image, model, camera=camera, visualization=visualization, labels=labels)
            names[frame.frame_id] = os.fsencode(name).decode(errors="replace")
            yield frame

    tally = _Tally()

    async def work() -> None:
        with traced("client") as tracer:
            sdk = tracer.sdk if tracer is not None else None
            async with VigilClient(address, window=window, token=token, tracer=sdk) as client:
                answers = client.stream(frames(), wait_for=wait)
                await _collect(answers, tally, source, names, pictures, as_json=as_json)

    try:
        run(work())
    finally:  # a camera's stream ends by Ctrl-C
        if tally.frames and not as_json:
            console.print(tally.table())
        for line in tally.remarks(named=as_json):
            errors.print(line, soft_wrap=True)
        if names:
            errors.print(f"{len(names)} more were on their way; what was accepted of them is judged and stored")
    if tally.errors:
        raise typer.Exit(1)


class _Tally:
    """What came back, in bounded space: a camera's stream may go on for years."""

    def __init__(self) -> None:
        self.frames = self.accepted = self.verdicts = self.anomalous = 0
        self.errors: Counter[str] = Counter()
        self._next_steps: set[str] = set()
        self._latencies_s: deque[float] = deque(maxlen=_LATENCIES)

    def add(self, result: Result) -> None:
        """Count a frame's answer."""
        self.frames += 1
        self.accepted += result.accepted
        self._latencies_s.append(result.latency_s)
        if result.verdict is not None:
            self.verdicts += 1
            self.anomalous += result.verdict.anomalous
        elif result.error is not None:
            self.errors[result.error.reason or result.error.code] += 1
            self._next_steps |= {hint(result.error)} - {""}

    def remarks(self, *, named: bool) -> Iterator[str]:
        """Errors that were not printed, unless each was, and what to do next."""
        for reason, count in self.errors.items():
            if not named and count > _SHOWN_OF_A_KIND:
                yield f"{count - _SHOWN_OF_A_KIND} more: {reason}; --json names them all"
        yield from sorted(self._next_steps)

    def table(self) -> Table:
        """One line on all."""
        table = Table("frames", "accepted", "verdicts", "anomalous", "errors", "median latency")
        counts = (self.frames, self.accepted, self.verdicts, self.anomalous, self.errors.total())
        median = f"{statistics.median(self._latencies_s) * 1000:.0f} ms" if self._latencies_s else "-"
        table.add_row(*map(str, counts), median)
        return table


async def _collect(
    answers: AsyncIterator[Result],
    tally: _Tally,
    source: Source,
    names: dict[str, str],
    pictures: Path,
    *,
    as_json: bool,
) -> None:
    with progress_bar() as progress:
        task = progress.add_task("streaming", total=source.total)
        async for result in answers:
            progress.advance(task)
            tally.add(result)
            name = names.pop(result.frame_id)
            picture = None
            if result.verdict is not None and result.verdict.visualization:
                picture = pictures / f"{result.frame_id}.png"
                await asyncio.to_thread(_save, picture, result.verdict.visualization)
            if as_json:
                typer.echo(json.dumps({**_plain(result, name), **({"picture": str(picture)} if picture else {})}))
            elif result.error is not None:
                reason = result.error.reason or result.error.code
                if tally.errors[reason] <= _SHOWN_OF_A_KIND:
                    errors.print(f"{name}: {reason}: {result.error.message}", soft_wrap=True)
            elif result.verdict is not None and result.verdict.anomalous:
                shown = f", {picture}" if picture else ""
                console.print(f"{name}: anomalous, {result.verdict.score:.3f}{shown}", soft_wrap=True)


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
