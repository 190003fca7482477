"""Where a model's live workers are, as a setting says it."""

from __future__ import annotations

from pathlib import Path

from vigil_common.bundle import NAME
from vigil_common.errors import Unavailable

FILE = "file:"
# Stands for the AnomalyModel that has the model: its workers bear its name, and are in its namespace.
RESOURCE, NAMESPACE = "{resource}", "{namespace}"


def worker_address(setting: str, model: str, managed_by: str = "") -> str:
    """HOST:PORT of a model's live workers.

    Args:
        setting: HOST:PORT, or file:PATH of a file that holds it and is read at each call, as on one machine, where each
            version has a port of its own; "{model}" stands for the model's name, "{resource}" and "{namespace}" for
            those of the AnomalyModel that has it.
        model: The model's name.
        managed_by: That AnomalyModel, as "NAMESPACE/NAME"; empty where none has it.

    Raises:
        Unavailable: NO_WORKER, where no file says so, no AnomalyModel has it, or this can't be a model's name.
    """
    unknown = Unavailable("NO_WORKER", f"no worker of {model} is known now", retry_after_s=1.0)
    if not NAME.fullmatch(model):  # it becomes part of a path or a host
        raise unknown
    place = setting.replace("{model}", model)
    if RESOURCE in setting or NAMESPACE in setting:
        namespace, _, name = managed_by.partition("/")
        if not name:
            raise unknown
        place = place.replace(RESOURCE, name).replace(NAMESPACE, namespace)
    if not place.startswith(FILE):
        return place
    try:
        return Path(place.removeprefix(FILE)).read_text().strip()
    except OSError as error:
        raise unknown from error
