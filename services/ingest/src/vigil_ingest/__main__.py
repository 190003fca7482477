"""Entry point: `python -m vigil_ingest`."""

from __future__ import annotations

from functools import partial

from vigil_common.lifecycle import run

from vigil_ingest.bootstrap import serve
from vigil_ingest.config import Settings

if __name__ == "__main__":
    settings = Settings()
    run("ingest", partial(serve, settings), log_level=settings.log_level, metrics_port=settings.metrics_port)
