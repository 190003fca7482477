"""Where a model's live workers are, as a setting says it."""

from __future__ import annotations

from pathlib import Path

from vigil_common.bundle import NAME
from vigil_common.errors import Unavailable

FILE = "file:"


def worker_address(setting: str, model: str) -> str:
    """HOST:PORT of a model's live workers.

    Args:
        setting: HOST:PORT, or file:PATH of a file that holds it and is read at each call, as on one machine, where each
            version has a port of its own; "{model}" stands for the model's name.
        model: The model's name.

    Raises:
        Unavailable: NO_WORKER, where no file says so, or this can't be a model's name.
    """
    unknown = Unavailable("NO_WORKER", f"no worker of {model} is known now", retry_after_s=1.0)
    if not NAME.fullmatch(model):  # it becomes part of a path or a host
        raise unknown
    place = setting.replace("{model}", model)
    if not place.startswith(FILE):
        return place
    try:
        return Path(place.removeprefix(FILE)).read_text().strip()
    except OSError as error:
        raise unknown from error
