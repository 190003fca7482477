"""`vigil review`: what is most worth a look, and masks drawn with programs that people know."""

import asyncio
import shlex
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.table import Column, Table
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_client import HumanLabel, ReviewedFrame, ReviewItem, StorageClient
from vigil_client.channel import connect, metadata
from vigil_common.errors import Unavailable
from vigil_common.grpc.workers import worker_address

from vigil_cli.annotate import Author, login
from vigil_cli.options import DEFAULT_STORAGE, StorageAddress, Token, check_known, console, errors, run
from vigil_cli.sources import SourceError

_PREDICT_S = 30.0
# A running GIMP would take the file and leave the one that was started at once.
_PROGRAMS = {"gimp": "gimp --new-instance"}


class Answer(Enum):
    """What is said once the program has closed."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"
    UNSURE = "unsure"
    SKIP = "skip"
    QUIT = "quit"


def review(
    frame_ids: Annotated[list[str] | None, typer.Argument(help="These frames; the review queue where none.")] = None,
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name.")],
    program: Annotated[
        str | None, typer.Option("--open", help="gimp, krita or any command: opens each as layers, image and mask.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, max=200, help="At most so many of the queue.")] = 20,
    camera: Annotated[str | None, typer.Option(help="Only this camera.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what you had before, behind the rest.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: anomalous where something is painted.")] = False,
    author: Author = None,
    inference_address: Annotated[
        str | None,
        typer.Option(
            envvar="VIGIL_INFERENCE_ADDRESS",
            help="A worker, or file:PATH of what names it: begin with its mask.",
        ),
    ] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """List the frames most worth a look, or open them one by one, take the mask back and label them."""
    name = author or login()

    async def work() -> None:
        async with StorageClient(storage_address, token=token) as storage:
            if frame_ids:
                todo = frame_ids
            else:
                # What is never opened stays in this person's queue.
                items = await storage.frames_review_queue(model, name, camera=camera, size=size, again=again, peek=True)
                if not items:
                    await check_known(storage, model)
                todo = [item.frame.frame_id for item in items]
                if program is None or not items:
                    _show(items)
            if program is None:
                return
            for frame_id in todo:
                found = await storage.frames_history(model, frame_id, camera=camera, reviewer=name)
                drawn = found.mask or await _predicted(inference_address, token, found)
                mask = await edit(program, found, drawn)
                answer = _ask(frame_id, mask, yes=yes)
                if answer is Answer.QUIT:
                    return
                if answer is Answer.SKIP:
                    continue
                label = HumanLabel(answer.value)
                await storage.frames_annotate(
                    model, frame_id, label, author=name, mask=None if label is HumanLabel.NORMAL else mask
                )
                console.print(f"{frame_id}: {label.value}")

    run(work())


async def edit(program: str, found: ReviewedFrame, mask: bytes | None) -> bytes | None:
    """Open a frame with a program and wait until that ends.

    Args:
        program: Command; the file's path is appended, or replaces {}.
        found: The frame with its image.
        mask: What the mask's layer begins with.

    Returns:
        The mask as it was saved; None where nothing is painted.

    Raises:
        SourceError: Where the program can't be started or fails.
        InvalidInput: As `openraster.read_mask`.
    """
    from vigil_cli import gimp, openraster  # noqa: PLC0415 - loads numpy and decoders

    with tempfile.TemporaryDirectory(prefix="vigil-review-") as folder:
        by_gimp = program == "gimp" and await gimp.is_second()
        path = Path(folder) / ("frame.xcf" if by_gimp else "frame.ora")
        if by_gimp:
            await gimp.write(path, found.image, mask)
        else:
            await asyncio.to_thread(lambda: path.write_bytes(openraster.write(found.image, mask)))
        words = shlex.split(_PROGRAMS.get(program, program))
        command = [word.replace("{}", str(path)) for word in words]
        if command == words:
            command.append(str(path))
        try:
            process = await asyncio.create_subprocess_exec(*command)
            code = await process.wait()
        except (FileNotFoundError, PermissionError) as error:
            raise SourceError(f"{command[0]} can't be started: {error.strerror}") from error
        if code:
            raise SourceError(f"{command[0]} ended with code {code}: nothing of {found.frame.frame_id} was taken")
        if by_gimp:
            return await gimp.read_mask(path)
        return await asyncio.to_thread(lambda: openraster.read_mask(path.read_bytes()))


async def _predicted(address: str | None, token: str | None, found: ReviewedFrame) -> bytes | None:
    """What the live version marks, of frames that it finds anomalous; None where no worker is named or answers."""
    if address is None or found.frame.verdict is None or not found.frame.verdict.anomalous:
        return None
    outputs = types_pb2.OutputOptions(mask=True)
    request = inference_pb2.PredictRequest(image=found.image, outputs=outputs)
    try:
        async with connect(worker_address(address, found.frame.model)) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            answer = await stub.Predict(request, metadata=metadata(token), timeout=_PREDICT_S)
    except (Unavailable, grpc.aio.AioRpcError) as error:
        why = error.message if isinstance(error, Unavailable) else error.details()
        errors.print(f"{found.frame.frame_id}: the mask begins empty ({why})")
        return None
    return answer.verdict.mask.data or None


def _ask(frame_id: str, mask: bytes | None, *, yes: bool) -> Answer:
    likely = Answer.ANOMALOUS if mask else Answer.NORMAL
    if yes:
        return likely
    choices = "/".join(answer.value for answer in Answer)
    while True:
        said = typer.prompt(f"{frame_id} ({choices})", default=likely.value)
        for answer in Answer:
            if said and answer.value.startswith(said.lower()):
                return answer
        errors.print(f"{said!r}: say one of {choices}")


def _show(items: list[ReviewItem]) -> None:
    if not items:
        console.print("nothing left to look at; --again shows what you had before")
        return
    # Without padding all of it fits a terminal of 80 columns.
    table = Table(Column("frame", no_wrap=True), "camera", "score", "label", "why", padding=0)
    for item in items:
        judged = item.frame.verdict
        said = ("-", "-") if judged is None else (f"{judged.score:.3f}", "anomalous" if judged.anomalous else "normal")
        table.add_row(item.frame.frame_id, item.frame.camera, *said, item.reason)
    console.print(table)
