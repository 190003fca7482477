"""Reports and what the gates say of them; free of transport."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from vigil_common.errors import InvalidInput, NotFound, Unavailable
from vigil_common.evidence import Decision, Gates, decide

from vigil_shadow.replay import Progress, ReplayRequest
from vigil_shadow.replay import replay as replay_frames
from vigil_shadow.report import Report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vigil_common.streams.ports import ReportStore, RoutingTable

    from vigil_shadow.ports import Archive, Judge, Reviews

DEFAULT_PAGE = 20
MAX_PAGE = 100
# A watched report's ranks may be this old: they cost more to read than all counts.
JOINT_AGE_S = 5.0
FEW_MORE = 1.1
LEAST_INTERVAL_S = 0.1
REPLAY = "replay-"


class Shadow:
    """What the service offers.

    Args:
        reports: Where reports are.
        routing: Tells what is being compared.
        reviews: What people said; None where there is no storage to ask.
        archive: Stored frames; None likewise.
        judge: A connection to a candidate's worker.
    """

    def __init__(
        self,
        reports: ReportStore,
        routing: RoutingTable,
        reviews: Reviews | None,
        archive: Archive | None,
        judge: Callable[[str], Judge],
    ) -> None:
        self._reports = reports
        self._routing = routing
        self._reviews = reviews
        self._archive = archive
        self._judge = judge
        self._joints: dict[tuple[str, str], tuple[float, int, dict[str, int]]] = {}

    async def report(self, model: str, run: str, *, max_age_s: float = 0.0) -> tuple[Report, bool]:
        """A run's report, of the latest comparison where none is named, and whether it is under way.

        Raises:
            NotFound: NO_COMPARISON.
            Unavailable: Redis is away, or storage, which knows what people said.
        """
        run, fields = await self._find(model, run)
        joint = await self._joint(model, run, int(fields.get("frames", 0)), max_age_s)
        report = Report(model, run, fields, joint)
        if self._reviews is not None and report.count("new_alarms") + report.count("new_misses"):
            candidate_right, live_right = await self._reviews.counts(report)
            report = Report(model, run, fields, joint, candidate_right, live_right)
        route = await self._routing.get(model)
        return report, route is not None and str(route.comparison) == run

    async def _find(self, model: str, run: str) -> tuple[str, dict[str, str]]:
        if not model:
            raise InvalidInput("MODEL_MISSING", "model is needed")
        found = run or await self._reports.latest(model) or ""
        fields = await self._reports.fields(model, found) if found else {}
        if not fields and run and not run.startswith(REPLAY):
            # A replay may be called as it was when it was asked for.
            found = REPLAY + run
            fields = await self._reports.fields(model, found)
        if "candidate_digest" not in fields:
            what = f"run {run} of model {model}" if run else f"a comparison of model {model}"
            raise NotFound("NO_COMPARISON", f"there is no report of {what}; start one, or name another run")
        return found, fields

    async def _joint(self, model: str, run: str, frames: int, max_age_s: float) -> dict[str, int]:
        now = asyncio.get_running_loop().time()
        read_at, counted, joint = self._joints.get((model, run), (0.0, -1, {}))
        few_more = counted < frames <= counted * FEW_MORE and now - read_at < max_age_s
        if counted != frames and not few_more:
            joint = await self._reports.joint(model, run)
            self._joints[model, run] = (now, frames, joint)
            if len(self._joints) > MAX_PAGE:
                del self._joints[next(iter(self._joints))]
        return joint

    @staticmethod
    def decide(report: Report, gates: Gates) -> Decision:
        """What the gates say of it; those of time do not ask of a replay, since stored verdicts know no such time."""
        if report.run.startswith(REPLAY):
            gates = replace(gates, min_duration_s=0.0, max_latency_ratio=None)
        return decide(gates, report.numbers, report.elapsed_s)

    async def watch(self, model: str, interval_s: float) -> AsyncIterator[tuple[Report, bool]]:
        """The latest report now and after each change."""
        seen: tuple[Report, bool] | None = None
        while True:
            found = await self.report(model, "", max_age_s=JOINT_AGE_S)
            if found != seen:
                seen = found
                yield found
            await asyncio.sleep(max(LEAST_INTERVAL_S, interval_s))

    async def disagreements(self, model: str, run: str, *, start: int, size: int) -> tuple[list[bytes], int]:
        """Serialised Disagreements, worst first, and where the next page begins; 0 where that was the last."""
        if size > MAX_PAGE:
            raise InvalidInput("PAGE_TOO_LARGE", f"a page has at most {MAX_PAGE} disagreements")
        count = size or DEFAULT_PAGE
        run, _ = await self._find(model, run)
        found = await self._reports.worst(model, run, start=start, count=count + 1)
        return found[:count], start + count if len(found) > count else 0

    async def replay(self, request: ReplayRequest) -> AsyncIterator[Progress]:
        """Replay stored frames; see `vigil_shadow.replay`."""
        if self._archive is None:
            raise Unavailable("NO_STORAGE", "shadow knows no storage to replay from; set VIGIL_STORAGE_ADDRESS")
        judge = self._judge(request.worker)
        try:
            async for progress in replay_frames(request, self._reports, self._archive, judge):
                yield progress
        finally:
            await judge.close()
