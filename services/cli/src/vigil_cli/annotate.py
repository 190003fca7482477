"""`vigil annotate`: what a person says of a stored frame."""

import getpass
from pathlib import Path
from typing import Annotated

import typer
from vigil_client import Annotation, HumanLabel, StorageClient

from vigil_cli.options import DEFAULT_STORAGE, StorageAddress, Token, console, run

Author = Annotated[str | None, typer.Option(envvar="VIGIL_AUTHOR", help="Who says so; your login where not given.")]


def login() -> str:
    """The user's login."""
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # as in a container
        raise typer.BadParameter("this user has no login; say who you are", param_hint="--author") from error


def annotate(
    frame_id: Annotated[str, typer.Argument(help="The frame's id.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name.")],
    label: Annotated[HumanLabel, typer.Option(help="What it shows.")],
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="PNG of the image's size, grey, white where it is anomalous."),
    ] = None,
    note: Annotated[str, typer.Option(help="Anything worth knowing.")] = "",
    author: Author = None,
    camera: Annotated[str | None, typer.Option(help="Its camera; spares a search.")] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Label a stored frame; all that was said is kept, the latest stands."""

    async def work() -> Annotation:
        async with StorageClient(storage_address, token=token) as storage:
            return await storage.frames_annotate(
                model,
                frame_id,
                label,
                author=author or login(),
                mask=mask.read_bytes() if mask else None,
                note=note,
                camera=camera,
            )

    said = run(work())
    drawn = ", with a mask" if said.masked else ""
    console.print(f"{frame_id}: {said.label.value}{drawn}, says {said.author}", soft_wrap=True)
