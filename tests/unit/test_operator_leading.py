"""Of operators that have a namespace in common, exactly one goes first."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vigil_common.errors import Unavailable
from vigil_operator import leading
from vigil_operator.leading import ALIVE_S, SINCE, Claim, Leadership, claim_of, goes_first

NOW = datetime(2026, 1, 1, tzinfo=UTC)
watches = st.frozensets(st.sampled_from("abc"), max_size=2)


class Server:
    """Leases as an API server keeps them: each write makes the next revision."""

    def __init__(self) -> None:
        self.bodies: dict[tuple[str, str], dict[str, Any]] = {}
        self.revisions = itertools.count(100)
        self.away = False

    async def list(self, *_: Any) -> list[dict[str, Any]]:
        self._answer()
        return list(self.bodies.values())

    async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        metadata = {**body["metadata"], "resourceVersion": str(next(self.revisions))}
        self.bodies[metadata["namespace"], metadata["name"]] = {**body, "metadata": metadata}
        return body

    async def delete(self, _: str, __: str, namespace: str, name: str) -> None:
        self._answer()
        self.bodies.pop((namespace, name), None)

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("CLUSTER_UNAVAILABLE", "away")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "RENEW_S", 0.001)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def operator(server: Server, place: str, pod: str, *watched: str, clock: Clock | None = None) -> Leadership:
    namespace, name = place.split("/")
    api: Any = server
    return Leadership(api, namespace=namespace, name=name, holder=pod, watched=watched, clock=clock or Clock())


@given(st.lists(watches, min_size=1, max_size=6))
def test_of_any_operators_no_two_that_lead_have_a_namespace_in_common_and_somebody_leads(
    watched: list[frozenset[str]],
) -> None:
    claims = [Claim("ns", str(n), str(n), names, n, n, NOW) for n, names in enumerate(watched)]
    leaders = [mine for mine in claims if goes_first(mine, [other for other in claims if other is not mine]) is None]
    assert claims[0] in leaders
    assert not any(one.meets(other) for one in leaders for other in leaders if one is not other)


async def leads(who: Leadership, stop: asyncio.Event | None = None) -> bool:
    async with asyncio.timeout(5):
        return await who.take(stop or asyncio.Event())


async def stands_by(who: Leadership) -> bool:
    stop = asyncio.Event()
    taking = asyncio.create_task(who.take(stop))
    await asyncio.sleep(0.05)
    stop.set()
    return not await taking


async def test_the_later_one_stands_by_until_the_first_lets_go() -> None:
    server, stop = Server(), asyncio.Event()
    first, second = operator(server, "a/op", "p1"), operator(server, "b/op", "p2", "line-1")
    assert await leads(first, stop)
    assert await stands_by(second)
    keeping = asyncio.create_task(first.keep(stop))
    stop.set()
    await keeping
    assert await stands_by(second)
    await first.let_go()
    assert await leads(second)


async def test_operators_of_other_namespaces_do_not_care() -> None:
    server = Server()
    assert await leads(operator(server, "a/op", "p1", "line-1"))
    assert await leads(operator(server, "b/op", "p2", "line-2"))
    assert await stands_by(operator(server, "c/op", "p3", "line-2", "line-3"))


async def test_a_second_pod_of_the_same_deployment_waits_until_the_first_is_dead() -> None:
    server, clock = Server(), Clock()
    assert await leads(operator(server, "a/op", "p1"))
    second = operator(server, "a/op", "p2", clock=clock)
    assert await stands_by(second)
    clock.now += ALIVE_S + 1
    assert await leads(second)


async def test_a_container_that_is_started_again_keeps_its_place() -> None:
    server = Server()
    assert await leads(operator(server, "a/op", "p1"))
    assert await stands_by(operator(server, "b/op", "p2"))
    assert await leads(operator(server, "a/op", "p1"))


async def test_who_was_away_for_long_comes_last_and_ends() -> None:
    server, stop, clock = Server(), asyncio.Event(), Clock()
    first, second = operator(server, "a/op", "p1"), operator(server, "b/op", "p2", clock=clock)
    assert await leads(first, stop)
    assert await stands_by(second)
    clock.now += ALIVE_S + 1
    assert await leads(second)
    lease = server.bodies["a", "op"]
    long_ago = claim_of(lease).renewed - timedelta(seconds=ALIVE_S + 1)
    lease["spec"]["renewTime"] = long_ago.isoformat()
    with pytest.raises(Unavailable, match="b/op leads by now"):
        await first.keep(stop)
    assert stop.is_set()
    await first.let_go()
    assert ("a", "op") not in server.bodies


async def test_a_server_that_is_away_ends_nothing() -> None:
    server, stop = Server(), asyncio.Event()
    first = operator(server, "a/op", "p1")
    assert await leads(first, stop)
    server.away = True
    keeping = asyncio.create_task(first.keep(stop))
    await asyncio.sleep(0.05)
    assert not keeping.done()
    server.away = False
    await asyncio.sleep(0.05)
    assert claim_of(server.bodies["a", "op"]).since == 100
    assert server.bodies["a", "op"]["metadata"]["annotations"][SINCE] == "100"
    stop.set()
    await keeping
    await first.let_go()
    assert not server.bodies


async def test_a_leader_that_is_cut_off_from_the_server_ends_before_another_may_lead() -> None:
    server, stop, clock = Server(), asyncio.Event(), Clock()
    first = operator(server, "a/op", "p1", clock=clock)
    assert await leads(first, stop)
    keeping = asyncio.create_task(first.keep(stop))
    server.away = True
    clock.now += leading.CUT_OFF_S - 1
    await asyncio.sleep(0.05)
    assert not keeping.done()
    clock.now += 1
    with pytest.raises(Unavailable, match="could not be renewed"):
        async with asyncio.timeout(5):
            await keeping
    assert stop.is_set()
    assert leading.CUT_OFF_S < ALIVE_S


async def test_a_server_that_never_answers_cuts_a_leader_off_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    server, stop = Server(), asyncio.Event()
    first = operator(server, "a/op", "p1")
    assert await leads(first, stop)
    monkeypatch.setattr(leading, "CUT_OFF_S", 0.05)
    monkeypatch.setattr(server, "list", lambda *_: asyncio.Event().wait())
    with pytest.raises(Unavailable, match="could not be renewed"):
        async with asyncio.timeout(5):
            await first.keep(stop)
    assert stop.is_set()
