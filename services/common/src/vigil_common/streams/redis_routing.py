"""Which versions are live and compared, on Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.streams.ports import Candidate, Live, Route, check_roles, route_changed
from vigil_common.streams.redis_connection import Connection, Script, fields_of, prefix
from vigil_common.streams.redis_shadow import REPORT_KEPT_S

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS = "vigil:models"
ROUTE, UNROUTE, KEEP = Script.load("route"), Script.load("unroute"), Script.load("keep")


def route_of(model: str, found: Mapping[bytes, bytes]) -> Route | None:
    """The routing record; None where nothing is live.

    Raises:
        Unavailable: ROUTING_UNREADABLE: somebody else wrote into it; who knows an earlier route goes on with that.
    """
    if b"version" not in found:
        return None
    try:
        candidate = None
        if b"candidate_version" in found:
            candidate = Candidate(
                int(found[b"candidate_version"]),
                found[b"candidate_digest"].decode(),
                _threshold(found[b"candidate_threshold"]),
                float(found[b"sample_fraction"]),
            )
        live = Live(int(found[b"version"]), found[b"digest"].decode(), _threshold(found[b"threshold"]))
        managed_by = found.get(b"managed_by", b"").decode()
        return Route(model, live, candidate, int(found[b"generation"]), int(found.get(b"comparison", 0)), managed_by)
    except (KeyError, ValueError, InvalidInput) as error:
        raise Unavailable(
            "ROUTING_UNREADABLE", f"the routing record of {model} is broken ({error}); promote a version again"
        ) from error


def _threshold(text: bytes) -> float | None:
    return float(text) if text else None


def _text(threshold: float | None) -> str:
    return "" if threshold is None else repr(threshold)


def _kept(model: str) -> str:
    return f"{prefix(model)}keep-fraction"


async def listed(connection: Connection) -> list[str]:
    """The models that there is work on."""
    return sorted(name.decode() for name in await connection.command("SMEMBERS", MODELS))


async def enlist(connection: Connection, model: str) -> None:
    """List the model, where it is not: over its memory Redis refuses the command even where it changes nothing."""
    if model not in await listed(connection):
        await connection.command("SADD", MODELS, model)


class RedisRouting:
    """Roles of the versions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, model: str) -> Route | None:
        """The model's route."""
        return route_of(model, fields_of(await self._connection.command("HGETALL", f"{prefix(model)}routing") or []))

    async def models(self) -> list[str]:
        """Every model that has a route, or that something was left of."""
        return await listed(self._connection)

    async def write(
        self,
        model: str,
        *,
        live: Live,
        candidate: Candidate | None = None,
        after: int | None = None,
        managed_by: str = "",
    ) -> Route:
        """Write the whole record."""
        check_roles(live, candidate)
        await enlist(self._connection, model)
        arguments: list[Any] = [prefix(model), REPORT_KEPT_S, live.version, live.digest, _text(live.threshold)]
        if candidate is None:
            arguments += ["", "", "", ""]
        else:
            fraction = repr(candidate.sample_fraction)
            arguments += [candidate.version, candidate.digest, _text(candidate.threshold), fraction]
        arguments += ["" if after is None else after, managed_by]
        generation, comparison = await self._connection.script(ROUTE, self._keys(model), arguments)
        if not generation:
            raise route_changed(model)
        return Route(model, live, candidate, int(generation), int(comparison), managed_by)

    async def promote(
        self, model: str, *, version: int, digest: str, threshold: float | None, after: int | None = None
    ) -> Route:
        """Make a version live and end any comparison."""
        return await self.write(model, live=Live(version, digest, threshold), after=after)

    async def remove(self, model: str) -> None:
        """Delete the route; storage goes on with what is left."""
        left = await self._connection.script(UNROUTE, self._keys(model), [prefix(model)])
        await self.keep_fraction(model, None)
        if left == 0:
            await self._connection.command("SREM", MODELS, model)

    async def kept_fraction(self, model: str) -> float | None:
        """Which part of the model's normal frames is stored."""
        found = await self._connection.command("GET", _kept(model))
        try:
            return None if found is None else float(found)
        except ValueError as error:
            raise Unavailable("ROUTING_UNREADABLE", f"{_kept(model)} is no number ({error})") from error

    async def keep_fraction(self, model: str, fraction: float | None) -> None:
        """Say which part is stored, or take it back."""
        if fraction is None:
            await self._connection.command("DEL", _kept(model))
        else:
            await self._connection.script(KEEP, self._keys(model)[:1], [prefix(model), repr(fraction)])

    @staticmethod
    def _keys(model: str) -> list[str]:
        start = prefix(model)
        return [f"{start}routing", f"{start}routing-changes", f"{start}frames"]

    async def wait(self, model: str, generation: int, *, block_ms: int) -> Route | None:
        """The route once it has changed, or after the wait."""
        key = f"{prefix(model)}routing-changes"
        await self._connection.command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", key, f"{generation}-0")
        return await self.get(model)
