"""From the shadow verdicts into the report: one owner per model at a time, by lease."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from vigil_common.errors import Unavailable
from vigil_common.logging import get_logger
from vigil_common.streams.supervise import for_each_model, wait

from vigil_shadow import metrics
from vigil_shadow.domain import Compared
from vigil_shadow.pairing import WINDOW, Pairing

if TYPE_CHECKING:
    from collections.abc import Callable

    from vigil_common.streams.ports import ComparedVerdict, ReportStep, ReportStore, RoutingTable, VerdictSource

READ_BLOCK_MS = 500
# Verdicts gather for so long: a step for each of them would cost Redis as much as the frame does.
GATHER_S = 1.0
RETRY_S = 0.2
COUNTED = ("missing", "unmatched", "late", "duplicate", "foreign", "lost", "malformed")

log = get_logger()


@dataclass(frozen=True, slots=True)
class ComparerOptions:
    """How a comparer works.

    Attributes:
        batch_size: Most verdicts of one step.
        window: Verdicts that a frame waits for its pair.
        lease_ms: How long a dead owner keeps others waiting; that no verdict counts twice does not hang on it.
    """

    batch_size: int = 512
    window: int = WINDOW
    lease_ms: int = 3_000


class Comparer:
    """Keeps the reports of one model."""

    def __init__(self, model: str, source: VerdictSource, reports: ReportStore, options: ComparerOptions) -> None:
        self._model = model
        self._source = source
        self._reports = reports
        self._options = options
        self._run = ""
        self._pairing: Pairing | None = None
        self._place = ""
        self._log = log.bind(model=model)

    async def run(self, stop: asyncio.Event) -> None:
        """Compare until stopped, whenever the lease is ours."""
        try:
            while not stop.is_set():
                try:
                    if await self._source.own(ttl_ms=self._options.lease_ms):
                        await self._serve(stop)
                except Unavailable as error:
                    self._log.warning("shadow_waits", reason=error.reason, message=error.message)
                await wait(stop, RETRY_S)
        finally:
            metrics.OWNED.labels(self._model).set(0)
            with suppress(Unavailable):
                await self._source.close()

    async def _serve(self, stop: asyncio.Event) -> None:
        """Work as the owner until stopped or the lease is lost; begins where the report stands."""
        self._pairing = None
        self._place = (await self._reports.place(self._model, "")).place
        metrics.OWNED.labels(self._model).set(1)
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        block_ms = min(READ_BLOCK_MS, self._options.lease_ms // 4)
        pause_s = min(GATHER_S, self._options.lease_ms / 4000)
        while not stop.is_set():
            if loop.time() - renewed > self._options.lease_ms / 4000:
                if not await self._source.own(ttl_ms=self._options.lease_ms):
                    self._log.warning("shadow_lease_lost")
                    metrics.OWNED.labels(self._model).set(0)
                    return
                renewed = loop.time()
            verdicts = await self._source.read(self._place, count=self._options.batch_size, block_ms=block_ms)
            for run, part in groupby(verdicts, key=lambda verdict: str(verdict.comparison)):
                if not await self._step(run, list(part)):
                    return
            if 0 < len(verdicts) < self._options.batch_size:
                await wait(stop, pause_s)

    async def _step(self, run: str, verdicts: list[ComparedVerdict]) -> bool:
        """Add verdicts of one run to its report; False where another owner has been at it."""
        with metrics.STEP_SECONDS.labels(self._model).time():
            if self._pairing is None or run != self._run:
                self._pairing = await self._load(run)
            step = self._pairing.step(verdicts)
            if not await self._reports.commit(self._model, run, step):
                self._log.warning("step_taken_by_another", run=run, after=step.after)
                return False
        self._place = step.upto
        self._count(len(verdicts), step)
        return True

    async def _load(self, run: str) -> Pairing:
        """The run's open frames, as the last owner or the last comparison left them."""
        place = await self._reports.place(self._model, run)
        fields = await self._reports.fields(self._model, run)
        compared = Compared(self._model, fields.get("live_digest", ""), fields.get("candidate_digest", ""))
        self._run = run
        self._log.info("compares", run=run, candidate=compared.candidate_digest, place=place.place)
        return Pairing(compared, place, last_ms=int(fields.get("last_ms") or 0), window=self._options.window)

    def _count(self, verdicts: int, step: ReportStep) -> None:
        metrics.VERDICTS.labels(self._model).inc(verdicts)
        metrics.FRAMES.labels(self._model).inc(step.adds.get("frames", 0))
        metrics.DISAGREEMENTS.labels(self._model).inc(len(step.disagreements))
        for name in COUNTED:
            if name in step.adds:
                metrics.UNPAIRED.labels(self._model, name).inc(step.adds[name])


class Comparers:
    """A comparer for each model that has a route."""

    def __init__(
        self,
        routing: RoutingTable,
        source: Callable[[str], VerdictSource],
        reports: ReportStore,
        options: ComparerOptions,
    ) -> None:
        self._routing = routing
        self._source = source
        self._reports = reports
        self._options = options

    async def run(self, stop: asyncio.Event) -> None:
        """Find models and compare until stopped; a comparer that broke is started again."""
        await for_each_model(
            self._routing, lambda model: self._comparer(model).run(stop), stop, failed="comparer_failed"
        )

    def _comparer(self, model: str) -> Comparer:
        return Comparer(model, self._source(model), self._reports, self._options)
