"""Which normal frames are kept, and how many were not."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from vigil_common.errors import Unavailable
from vigil_common.logging import get_logger
from vigil_common.streams.ports import sampled

from vigil_storage import domain, metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vigil_common.store.ports import Record
    from vigil_common.store.retained import RetainedFrameStore
    from vigil_common.streams.ports import RoutingTable

EVERY_S = 5.0

log = get_logger()


class Sampling:
    """Lets only a part of a model's normal frames into the store.

    Args:
        model: The model's name.
        fraction: Which part, from 0 to 1, where the model has no say of its own; by the frame's id, so that a second
            try decides as the first.
        routing: Has the model's own fraction, and tells whether a candidate is compared: then all are kept, since it
            may turn out to disagree.
    """

    def __init__(self, model: str, fraction: float, routing: RoutingTable) -> None:
        self._model = model
        self._fraction = fraction
        self._routing = routing

    async def left_out(self, records: Sequence[Record]) -> list[bool]:
        """Which of them are not to be stored.

        Raises:
            Unavailable: Redis is away.
        """
        passing = [not domain.stays(record.labels) for record in records]
        if not any(passing):
            return passing
        own = await self._routing.kept_fraction(self._model)
        fraction = self._fraction if own is None else own
        out = [
            passes and not sampled(record.labels["frame_id"], fraction)
            for record, passes in zip(records, passing, strict=True)
        ]
        if any(out):
            route = await self._routing.get(self._model)
            if route is not None and route.candidate is not None:
                return [False] * len(out)
        return out


async def count_dropped(store: RetainedFrameStore, stop: asyncio.Event) -> None:
    """Tell Prometheus what the quota has dropped, until stopped."""
    told: Counter[str] = Counter()
    while not stop.is_set():
        try:
            dropped = await store.dropped()
        except Unavailable as error:
            log.warning("dropped_not_counted", reason=error.reason, message=error.message)
            dropped = {}
        by_model: Counter[str] = Counter()
        for entry, count in dropped.items():
            by_model[entry.partition("/")[0]] += count
        for model, count in by_model.items():
            if count > told[model]:
                metrics.DROPPED.labels(model, "quota").inc(count - told[model])
                told[model] = count
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), EVERY_S)
