"""Entry point: `python -m vigil_operator`."""

from __future__ import annotations

from functools import partial

from vigil_common.lifecycle import run

from vigil_operator.bootstrap import serve
from vigil_operator.config import Settings

if __name__ == "__main__":
    settings = Settings()  # type: ignore[call-arg]  # the environment gives them
    run("operator", partial(serve, settings), log_level=settings.log_level, metrics_port=settings.metrics_port)
