"""Logs: one line per event, JSON in the cluster, coloured on a terminal; never image bytes or secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import structlog


def get_logger() -> structlog.stdlib.BoundLogger:
    """The logger that every module uses."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger())


def configure(service: str, level: str = "INFO") -> None:
    """Set up the process's logs.

    Args:
        service: Bound to each line.
        level: Least level shown, such as "INFO".
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
