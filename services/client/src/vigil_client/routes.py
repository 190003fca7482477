"""Which version of a model judges its frames; to change it takes a token of the role admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil.storage.v1 import storage_pb2, storage_pb2_grpc

from vigil_client import convert
from vigil_client.channel import Connected

if TYPE_CHECKING:
    import grpc

    from vigil_client.types import Route

_CALL_S = 60.0


class RouteClient(Connected):
    """Asks storage; every method raises `ServiceError` with the service's code, reason and message.

    Args:
        address: Storage as "host:port".
        channel_credentials: For TLS; where None as the environment says, see `vigil_client.channel.connect`.
        token: Sent as a bearer token.
    """

    def __init__(
        self, address: str, *, channel_credentials: grpc.ChannelCredentials | None = None, token: str | None = None
    ) -> None:
        super().__init__(address, channel_credentials, token)

    @property
    def _stub(self) -> storage_pb2_grpc.RouteServiceAsyncStub:
        return storage_pb2_grpc.RouteServiceStub(self.channel)

    async def list_routes(self, model: str = "") -> list[Route]:
        """What is live and compared, of one model or of every one; nothing of models that have no live version."""
        request = storage_pb2.ListRoutesRequest(model=model)
        with convert.service_errors():
            response = await self._stub.ListRoutes(request, metadata=self.metadata, timeout=_CALL_S)
        return [convert.route(route) for route in response.routes]

    async def promote(
        self, model: str, version: int = 0, *, threshold: float | None = None, force: bool = False
    ) -> Route:
        """Make a published version live, the newest where it is 0; ingest and workers follow within a second.

        FAILED_PRECONDITION MANAGED where an AnomalyModel decides, unless forced.
        """
        request = storage_pb2.PromoteRequest(model=model, version=version, threshold=threshold, force=force)
        with convert.service_errors():
            response = await self._stub.Promote(request, metadata=self.metadata, timeout=_CALL_S)
        return convert.route(response.route)

    async def start_comparison(
        self, model: str, version: int = 0, *, threshold: float | None = None, sample_fraction: float = 1.0
    ) -> Route:
        """Compare a published version with live, the newest where it is 0, on this part of the frames."""
        request = storage_pb2.StartComparisonRequest(
            model=model, version=version, threshold=threshold, sample_fraction=sample_fraction
        )
        with convert.service_errors():
            response = await self._stub.StartComparison(request, metadata=self.metadata, timeout=_CALL_S)
        return convert.route(response.route)

    async def stop_comparison(self, model: str) -> Route:
        """Compare nothing with live any more; the report stays."""
        request = storage_pb2.StopComparisonRequest(model=model)
        with convert.service_errors():
            response = await self._stub.StopComparison(request, metadata=self.metadata, timeout=_CALL_S)
        return convert.route(response.route)
