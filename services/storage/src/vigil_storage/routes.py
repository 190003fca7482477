"""Which version of a model is live, and which is compared with it; free of transport.

Here and not in a service of its own: storage knows the versions, their digests and what is deprecated, and people with
a token reach it anyway. The operator, which has Redis' credentials and Kubernetes' own log of who asked it, writes the
routes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil_common.audit import audit
from vigil_common.errors import Managed, NotFound, NotLive
from vigil_common.streams.ports import Candidate

if TYPE_CHECKING:
    from vigil_common.store.ports import ModelStore
    from vigil_common.streams.ports import Route, RoutingTable


class Routes:
    """Changes of routes, each one step and one audit line.

    A change is made after the route that it was decided by; where that is not the latest any more, it raises
    `Unavailable` ROUTE_CHANGED and nothing happens. So a comparison never brings back a version that was live.

    What an AnomalyModel decides is refused with `Managed` MANAGED: its operator would undo it.

    Args:
        models: Where model versions are.
        routing: Where routes are.
    """

    def __init__(self, models: ModelStore, routing: RoutingTable) -> None:
        self._models = models
        self._routing = routing

    async def current(self, model: str = "") -> list[Route]:
        """The routes there are: of one model, or of every one by name."""
        names = [model] if model else sorted(await self._routing.models())
        found = [await self._routing.get(name) for name in names]
        return [route for route in found if route is not None]

    async def promote(self, model: str, version: int, threshold: float | None, *, force: bool = False) -> Route:
        """Make a version live (0: the newest); `NotLive` VERSION_DEPRECATED.

        With `force` even where an AnomalyModel decides: for when its operator is away.
        """
        info = await self._models.get(model, version or None)
        if info.deprecated:
            what = f"{model} version {info.version} is deprecated ({info.deprecated}); promote another"
            raise NotLive("VERSION_DEPRECATED", what)
        before = await self._routing.get(model)
        if before is not None and not force:
            _check_unmanaged(before, otherwise=", or promote with --force while its operator is away")
        route = await self._routing.promote(
            model,
            version=info.version,
            digest=info.digest,
            threshold=threshold,
            after=before.generation if before else 0,
        )
        audit(
            "promoted",
            model=model,
            version=info.version,
            digest=info.digest,
            threshold=threshold,
            before_version=before.live.version if before else None,
            before_digest=before.live.digest if before else None,
        )
        return route

    async def start_comparison(
        self, model: str, version: int, threshold: float | None, sample_fraction: float
    ) -> Route:
        """Compare a version (0: the newest) with live; `NotFound` UNKNOWN_MODEL where nothing is live."""
        info = await self._models.get(model, version or None)
        candidate = Candidate(info.version, info.digest, threshold, sample_fraction)
        route = await self._compare(model, candidate)
        audit(
            "comparison_started",
            model=model,
            version=candidate.version,
            digest=candidate.digest,
            live_version=route.live.version,
            comparison=route.comparison,
        )
        return route

    async def stop_comparison(self, model: str) -> Route:
        """Compare nothing with live any more; `NotFound` UNKNOWN_MODEL where nothing is live."""
        route = await self._compare(model, None)
        audit("comparison_stopped", model=model, live_version=route.live.version)
        return route

    async def _compare(self, model: str, candidate: Candidate | None) -> Route:
        before = await self._routing.get(model)
        if before is None:
            raise NotFound("UNKNOWN_MODEL", f"no version of {model} is live; apply an AnomalyModel for one")
        _check_unmanaged(before)
        return await self._routing.write(model, live=before.live, candidate=candidate, after=before.generation)


def _check_unmanaged(route: Route, *, otherwise: str = "") -> None:
    if route.managed_by:
        namespace, _, name = route.managed_by.partition("/")
        raise Managed(
            "MANAGED",
            f"AnomalyModel {name} in namespace {namespace} decides on {route.model} and would undo this; change its "
            f"spec instead (`kubectl apply` or `vigil local apply`){otherwise}",
        )
