"""Options that several commands share, and how their errors look."""

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from vigil_client import Failure, ServiceError, SettingError, StorageClient
from vigil_common.bundle import NAME
from vigil_common.errors import NotFound, VigilError

from vigil_cli.sources import SourceError

T = TypeVar("T")

# Where nobody looks at a terminal, nothing is cut to the width of one.
_PIPE_WIDTH = 200
# Names, notes and reasons come from others: nothing in them is markup.
console = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH,
    markup=False,
    emoji=False,
    highlight=False,
)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


def narrow_table(first: str, *columns: str) -> Table:
    """A table of many columns that fits 80 characters; what stands in the first column is never cut."""
    column = Column(first, no_wrap=True)
    return Table(column, *columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


Address = Annotated[str, typer.Option(envvar="VIGIL_ADDRESS", help="Ingest as HOST:PORT.")]
StorageAddress = Annotated[str, typer.Option(envvar="VIGIL_STORAGE_ADDRESS", help="Storage as HOST:PORT.")]
Token = Annotated[str | None, typer.Option(envvar="VIGIL_TOKEN", help="Bearer token.")]
LAST_VERSION = 2**31 - 1
Version = Annotated[int, typer.Option(min=0, max=LAST_VERSION, help="0: the newest.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


def _with_zone(given: datetime | None) -> datetime | None:
    """What people give is local time."""
    try:
        return given.astimezone() if given else None
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter("no time that a camera could have had") from error


Since = Annotated[
    datetime | None, typer.Option("--since", callback=_with_zone, help="Captured from this time on, local time.")
]
Until = Annotated[
    datetime | None, typer.Option("--until", callback=_with_zone, help="Captured before this time, local time.")
]


def check_name(name: str) -> None:
    """Refuse what can't be a model's name, before any work is done."""
    if not NAME.fullmatch(name):
        raise typer.BadParameter(
            "a model's name has 1 to 63 lower-case letters, digits and dashes", param_hint="--name"
        )


DEFAULT_INGEST = "localhost:50051"
DEFAULT_STORAGE = "localhost:50053"


# The local platform's, and what names another.
FOLDER, FOLDER_VARIABLE = Path("out/local"), "VIGIL_LOCAL"
_HINTS = {
    "TOKEN_MISSING": "give it by --token or VIGIL_TOKEN",
    "TOKEN_UNKNOWN": "see --token and VIGIL_TOKEN",
    "VERDICT_TIMEOUT": "what is accepted is judged and stored once a worker of the live version is up: `vigil status` "
    "shows where an AnomalyModel's are",
}


def start_it() -> str:
    """What to do where no platform answers."""
    folder = os.environ.get(FOLDER_VARIABLE, FOLDER)
    return f"is the platform up there? On this machine: `vigil local up`, and here `source {folder}/env`"


def hint(failure: Failure) -> str:
    """What to do next, where there is something to say."""
    if failure.code == "UNAVAILABLE" and not failure.reason:
        return start_it()
    return _HINTS.get(failure.reason, "")


async def check_known(storage: StorageClient, model: str) -> None:
    """Where nothing was found: whether there is such a model at all.

    Raises:
        NotFound: UNKNOWN_MODEL.
    """
    with suppress(ServiceError):  # who may look at frames need not be allowed to list models
        if not await storage.models_list(model):
            raise NotFound("UNKNOWN_MODEL", f"no model is called {model}; `vigil model list` shows them")


class _ClientsWords(logging.Handler):
    """What the client library says while it goes on, and what to do where nobody answers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        errors.print(record.getMessage(), soft_wrap=True)
        if getattr(record, "nobody", False):
            errors.print(start_it(), soft_wrap=True)


logging.getLogger("vigil_client").addHandler(_ClientsWords())


def say_error(text: str) -> None:
    """One line on what went wrong."""
    errors.print(Text.assemble(("error:", "red"), " ", text), soft_wrap=True)


@contextmanager
def told() -> Iterator[None]:
    """An expected error becomes one line and exit code 1."""
    try:
        yield
    except BrokenPipeError:  # who reads has enough
        raise
    except (ServiceError, SettingError, VigilError, SourceError, OSError) as error:
        say_error(str(error))
        if isinstance(error, ServiceError) and (next_step := hint(error.failure)):
            errors.print(next_step, soft_wrap=True)
        raise typer.Exit(1) from error


def run(work: Coroutine[object, object, T]) -> T:
    """Run a command's coroutine; an expected error becomes one line and exit code 1."""
    with told():
        return asyncio.run(work)
