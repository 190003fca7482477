"""Work on every model that has a route or had one, for as long as the process runs.

A model whose route is gone is worked on all the same: its last frames are stored, and people go on saying of them what
they were. That costs a task and a read that waits.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from vigil_common.errors import Unavailable
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from vigil_common.streams.ports import RoutingTable

DISCOVER_EVERY_S = 1.0

log = get_logger()


async def wait(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but no longer than until the stop."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def for_each_model(
    routing: RoutingTable, work: Callable[[str], Coroutine[None, None, None]], stop: asyncio.Event, *, failed: str
) -> None:
    """Find models and work on each until stopped; work that broke is started again.

    Args:
        routing: Knows the models.
        work: On one model, until the stop.
        stop: Ends everything.
        failed: The event logged where work broke.
    """
    running: dict[str, asyncio.Task[None]] = {}
    try:
        while not stop.is_set():
            for model, task in list(running.items()):
                if task.done() and not task.cancelled():
                    log.error(failed, model=model, exc_info=task.exception())
                    del running[model]
            try:
                models = await routing.models()
            except Unavailable as error:
                log.warning("models_unknown", reason=error.reason, message=error.message)
                models = []
            for model in models:
                if model not in running:
                    running[model] = asyncio.create_task(work(model))
            await wait(stop, DISCOVER_EVERY_S)
        await asyncio.gather(*running.values(), return_exceptions=True)
    finally:
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
