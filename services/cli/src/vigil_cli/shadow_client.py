"""The shadow service, as the commands ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from vigil.shadow.v1 import shadow_pb2, shadow_pb2_grpc
from vigil_client import ServiceError
from vigil_client.channel import Connected
from vigil_client.convert import rpc_failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CALL_S = 60.0
PAGE = 100


class ShadowClient(Connected):
    """Asks shadow; every method raises `ServiceError` with the service's code, reason and message.

    Args:
        address: Shadow as "host:port".
        token: Sent as a bearer token.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        super().__init__(address, None, token)

    @property
    def _stub(self) -> shadow_pb2_grpc.ShadowServiceAsyncStub:
        return shadow_pb2_grpc.ShadowServiceStub(self.channel)

    async def report(
        self, model: str, *, run: str = "", gates: shadow_pb2.Gates | None = None, detail: bool = False
    ) -> shadow_pb2.GetReportResponse:
        """A report with the gates' decision."""
        request = shadow_pb2.GetReportRequest(model=model, run=run, gates=gates, detail=detail)
        try:
            return await self._stub.GetReport(request, metadata=self.metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            raise ServiceError(rpc_failure(error)) from error

    async def watch(
        self, model: str, *, gates: shadow_pb2.Gates | None = None, interval_s: float = 1.0
    ) -> AsyncIterator[shadow_pb2.WatchReportResponse]:
        """The latest report now and after each change."""
        request = shadow_pb2.WatchReportRequest(model=model, gates=gates)
        request.interval.FromNanoseconds(round(interval_s * 1e9))
        try:
            async for answer in self._stub.WatchReport(request, metadata=self.metadata):
                yield answer
        except grpc.aio.AioRpcError as error:
            raise ServiceError(rpc_failure(error)) from error

    async def disagreements(self, model: str, *, run: str = "", limit: int) -> list[shadow_pb2.Disagreement]:
        """The worst disagreements."""
        request = shadow_pb2.ListDisagreementsRequest(model=model, run=run)
        found: list[shadow_pb2.Disagreement] = []
        while len(found) < limit:
            request.page_size = min(PAGE, limit - len(found))
            try:
                answer = await self._stub.ListDisagreements(request, metadata=self.metadata, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise ServiceError(rpc_failure(error)) from error
            found += answer.disagreements
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        return found

    async def replay(self, request: shadow_pb2.ReplayRequest) -> AsyncIterator[shadow_pb2.ReplayResponse]:
        """Replay stored frames; ends when they are done."""
        try:
            async for answer in self._stub.Replay(request, metadata=self.metadata):
                yield answer
        except grpc.aio.AioRpcError as error:
            raise ServiceError(rpc_failure(error)) from error
