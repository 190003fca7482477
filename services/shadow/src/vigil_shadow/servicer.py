"""vigil.shadow.v1: convert in, await, convert out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vigil.shadow.v1 import shadow_pb2, shadow_pb2_grpc
from vigil_common.access import authorize

from vigil_shadow import convert
from vigil_shadow.ports import StoredRange
from vigil_shadow.replay import ReplayRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_shadow.app import Shadow

DEFAULT_INTERVAL_S = 1.0


class ShadowServicer(shadow_pb2_grpc.ShadowServiceServicer):
    """Reports of comparisons."""

    def __init__(self, app: Shadow) -> None:
        self._app = app

    async def GetReport(self, request: shadow_pb2.GetReportRequest, _context: Any) -> shadow_pb2.GetReportResponse:
        """A report, with what the gates say of it."""
        authorize(request.model)
        gates = convert.gates(request.gates)
        found, active = await self._app.report(request.model, request.run)
        return shadow_pb2.GetReportResponse(
            report=convert.report(found, active=active, detail=request.detail),
            decision=convert.decision(self._app.decide(found, gates)),
        )

    async def WatchReport(
        self, request: shadow_pb2.WatchReportRequest, _context: Any
    ) -> AsyncIterator[shadow_pb2.WatchReportResponse]:
        """The same now and after each change."""
        authorize(request.model)
        gates = convert.gates(request.gates)
        interval_s = request.interval.seconds + request.interval.nanos / 1e9 or DEFAULT_INTERVAL_S
        async for found, active in self._app.watch(request.model, interval_s):
            yield shadow_pb2.WatchReportResponse(
                report=convert.report(found, active=active, detail=False),
                decision=convert.decision(self._app.decide(found, gates)),
            )

    async def ListDisagreements(
        self, request: shadow_pb2.ListDisagreementsRequest, _context: Any
    ) -> shadow_pb2.ListDisagreementsResponse:
        """Frames with two labels, worst first."""
        authorize(request.model)
        start = convert.page_start(request.page_token)
        found, following = await self._app.disagreements(
            request.model, request.run, start=start, size=request.page_size
        )
        return shadow_pb2.ListDisagreementsResponse(
            disagreements=map(shadow_pb2.Disagreement.FromString, found),
            next_page_token=str(following) if following else "",
        )

    async def Replay(
        self, request: shadow_pb2.ReplayRequest, _context: Any
    ) -> AsyncIterator[shadow_pb2.ReplayResponse]:
        """A candidate against stored frames."""
        authorize(request.model)
        where = StoredRange(request.camera, convert.to_us(request.start), convert.to_us(request.stop))
        asked = ReplayRequest(request.model, request.replay_id, request.worker, request.version, where, request.rate)
        async for progress in self._app.replay(asked):
            yield shadow_pb2.ReplayResponse(
                frames=progress.frames, position=convert.from_us(progress.position_us), done=progress.done
            )
