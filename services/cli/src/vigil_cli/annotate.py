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
    no_mask: Annotated[bool, typer.Option("--no-mask", help="Let no mask stand any more.")] = False,
    note: Annotated[str, typer.Option(help="Anything worth knowing.")] = "",
    author: Author = None,
    camera: Annotated[str | None, typer.Option(help="Its camera; spares a search.")] = None,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Label a stored frame; all that was said is kept, the latest stands, with the mask before where it has none."""
    if mask and no_mask:
        raise typer.BadParameter("give a mask, or say that none is to stand", param_hint="--no-mask")

    async def work() -> Annotation:
        async with StorageClient(storage_address, token=token) as storage:
            drawn = mask.read_bytes() if mask else None
            if drawn is None and not no_mask and label is not HumanLabel.NORMAL:
                drawn = (await storage.frames_history(model, frame_id, camera=camera)).mask
            return await storage.frames_annotate(
                model,
                frame_id,
                label,
                author=author or login(),
                mask=drawn,
                note=note,
                camera=camera,
            )

    said = run(work())
    masked = "" if not said.masked else ", with a mask" if mask else ", with the mask that stood"
    console.print(f"{frame_id}: {said.label.value}{masked}, says {said.author}", soft_wrap=True)
