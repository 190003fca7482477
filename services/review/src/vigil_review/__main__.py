"""Entry point: `python -m vigil_review`."""

from __future__ import annotations

from functools import partial

from vigil_common.lifecycle import run

from vigil_review.bootstrap import serve
from vigil_review.config import Settings

if __name__ == "__main__":
    settings = Settings()
    run("review", partial(serve, settings), log_level=settings.log_level, metrics_port=settings.metrics_port)
