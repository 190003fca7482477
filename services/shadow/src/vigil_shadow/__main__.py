"""Entry point: `python -m vigil_shadow`."""

from __future__ import annotations

from functools import partial

from vigil_common.lifecycle import run

from vigil_shadow.bootstrap import serve
from vigil_shadow.config import Settings

if __name__ == "__main__":
    settings = Settings()
    run("shadow", partial(serve, settings), log_level=settings.log_level, metrics_port=settings.metrics_port)
