"""How a process starts and stops: uvloop, signals, one stop event, metrics, spans."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from typing import TYPE_CHECKING

import uvloop
from prometheus_client import start_http_server

from vigil_common import logging
from vigil_common.errors import VigilError
from vigil_common.trace import traced

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# What comes and goes with each frame is freed without the collector: it needn't look as often as it does by default.
GC_THRESHOLDS = (20_000, 50, 100)


def run(service: str, main: Callable[[asyncio.Event], Awaitable[None]], *, log_level: str, metrics_port: int) -> None:
    """Run a service until SIGTERM or SIGINT sets its stop event and `main` has drained.

    Args:
        service: Its name in logs.
        main: Serves until the event is set, then drains and returns.
        log_level: Least level logged.
        metrics_port: Prometheus metrics over HTTP; 0 for none.
    """
    logging.configure(service, log_level)
    # What importing has made lives as long as the process: the collector needn't look at it either.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if metrics_port:
        start_http_server(metrics_port)

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        await main(stop)

    try:
        with traced(service):
            uvloop.run(supervised())
    except VigilError as error:
        # The last line, which Kubernetes keeps of a container that ended: the operator reads why from it.
        logging.get_logger().error("failed", reason=error.reason, status=error.status, detail=error.message)
        sys.exit(1)
