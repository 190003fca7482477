"""`vigil local`: the whole platform as processes of this machine, and what is asked of it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from vigil_client.channel import TLS_FILES
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.logging import configure

from vigil_cli import INTERRUPTED
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.options import FOLDER, FOLDER_VARIABLE, console, run
from vigil_cli.rollout import Name, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from vigil_cli.local.stack import LocalStack

app = typer.Typer(help="The whole platform on this machine.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option(envvar=FOLDER_VARIABLE, help="The platform's folder.")]


@app.command()
def up(folder: Folder = FOLDER) -> None:
    """Start Valkey, ReductStore and every service, and look after the applied AnomalyModels, until Ctrl-C."""
    from vigil_cli.local import LocalStack, StackError  # noqa: PLC0415 - needs the demo extra
    from vigil_cli.local.operator import look_after  # noqa: PLC0415

    async def work() -> None:
        stop, loop, starting = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()

        def on_signals(act: Callable[[], object]) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, act)

        def say(text: str) -> None:
            console.print(text, soft_wrap=True)

        assert starting is not None  # noqa: S101 - this is a task
        # What the operator does is said once, as `say` says it.
        configure("operator", "WARNING")
        on_signals(starting.cancel)
        try:
            async with LocalStack(folder, log=say) as stack:
                on_signals(stop.set)
                write_environment(stack)
                say(f"review page: {await stack.add_review(inference_address=stack.inference_address)}")
                say(f"up; in other terminals first: source {stack.folder / 'env'}")
                keeping = asyncio.create_task(stack.keep_up(stop))
                try:
                    await look_after(stack, stop)
                finally:  # before the stack takes its parts down
                    stop.set()
                    await keeping
        except StackError as error:
            raise Unavailable("STACK_DOWN", str(error)) from error
        except asyncio.CancelledError:
            say("stopped before it was up")
            raise typer.Exit(INTERRUPTED) from None

    run(work())


def write_environment(stack: LocalStack) -> None:
    """The file FOLDER/env, by which commands of other terminals find the platform."""
    found = {
        "VIGIL_ADDRESS": stack.ingest_address,
        "VIGIL_STORAGE_ADDRESS": stack.storage_address,
        "VIGIL_SHADOW_ADDRESS": stack.shadow_address,
        "VIGIL_INFERENCE_ADDRESS": stack.inference_address,
        FOLDER_VARIABLE: str(stack.folder),
        # Clients need them where the services were started with TLS.
        **{name: str(Path(os.environ[name]).absolute()) for name in TLS_FILES if os.environ.get(name)},
    }
    (stack.folder / "env").write_text("".join(f"export {key}={shlex.quote(value)}\n" for key, value in found.items()))


@app.command("apply")
def apply_(
    file: Annotated[Path, typer.Option("--file", "-f", exists=True, dir_okay=False, help="YAML of AnomalyModels.")],
    *,
    folder: Folder = FOLDER,
) -> None:
    """Ask for what a YAML file says; the same file works with kubectl."""

    async def work() -> dict[str, str]:
        try:
            text = await asyncio.to_thread(file.read_text, "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput("RESOURCE_INVALID", f"{file} is not UTF-8: {error.reason}") from error
        return await asyncio.to_thread(ResourceFiles(folder).apply, text)

    warn(ResourceFiles(folder))
    for name, what in run(work()).items():
        console.print(f"anomalymodel/{name} {what}")


@app.command()
def delete(name: Name, *, folder: Folder = FOLDER) -> None:
    """Remove an AnomalyModel: its workers end, and ingest takes no more frames for it."""

    async def work() -> None:
        await asyncio.to_thread(ResourceFiles(folder).delete, name)

    warn(ResourceFiles(folder))
    run(work())
    console.print(f"anomalymodel/{name} deleted")
