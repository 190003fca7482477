"""Which operator looks after which namespaces: never two at once, by Leases that all of them see.

Each operator has one Lease, in its own namespace and named after its Deployment, held by its pod, with a note of what
it watches. Of those that are alive and have a namespace in common, the one that was taken first leads; others stand by.
First is told by the revision that the server gave: whoever takes his Lease and then sees no earlier one can't be
overlooked by a later one, whatever the clocks say.

kopf's own peering is not used: operators of one priority all pause, which leaves nobody; those of every namespace and
those of some write to objects of different kinds and don't see each other; and both kinds need definitions of their
own in the cluster.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.logging import get_logger

from vigil_operator.render import MANAGER, revision
from vigil_operator.spec import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vigil_operator.cluster import Api
    from vigil_operator.render import Manifest

API = "coordination.k8s.io/v1"
COMPONENT = {"app.kubernetes.io/component": MANAGER, "app.kubernetes.io/part-of": "vigil"}
SELECTOR = ",".join(f"{name}={value}" for name, value in COMPONENT.items())
WATCHED, SINCE = f"{GROUP}/watched-namespaces", f"{GROUP}/since-revision"
# A Lease is renewed this often, and counts as long as this after it was seen to change, seconds.
RENEW_S, ALIVE_S = 3.0, 15.0
# A leader that could not renew for so long leads no more: what it is doing must end before it counts as gone.
CUT_OFF_S = 10.0
# Clocks of nodes agree so far: an older Lease is known to be left over without waiting.
SKEW_S = 30.0

log = get_logger()


@dataclass(frozen=True, slots=True)
class Claim:
    """An operator's Lease.

    Attributes:
        namespace: Where it is.
        name: Its name.
        holder: The pod.
        watched: Namespaces that it looks after; empty for every one.
        since: Revision at which it was taken.
        revision: Changes with each renewal.
        renewed: When it was renewed, by its holder's clock.
    """

    namespace: str
    name: str
    holder: str
    watched: frozenset[str]
    since: int
    revision: int
    renewed: datetime

    def meets(self, other: Claim) -> bool:
        """Whether both look after a namespace."""
        return not self.watched or not other.watched or bool(self.watched & other.watched)


def claim_of(body: Manifest) -> Claim:
    """What a Lease says."""
    metadata, spec = body["metadata"], body["spec"]
    notes, number = metadata.get("annotations", {}), revision(body)
    since = notes.get(SINCE, "")
    return Claim(
        metadata["namespace"],
        metadata["name"],
        spec.get("holderIdentity", ""),
        frozenset(filter(None, notes.get(WATCHED, "").split(","))),
        int(since) if since.isdigit() else number,
        number,
        datetime.fromisoformat(spec["renewTime"]),
    )


def goes_first(mine: Claim, others: Iterable[Claim]) -> Claim | None:
    """Whom this operator has to leave it to, of those that are alive; None where that is itself."""
    rivals = [other for other in others if other.since < mine.since and other.meets(mine)]
    return min(rivals, key=lambda other: other.since, default=None)


class Leadership:
    """This operator's Lease.

    Args:
        api: The API server; with turns of its own, for a renewal must not wait behind a cold start.
        namespace: Where the Lease is.
        name: Its name.
        holder: This process, the same after a restart of the container.
        watched: Namespaces that are looked after; empty for every one.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        name: str,
        holder: str,
        watched: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._place = (namespace, name)
        self._holder = holder
        self._watched = watched
        self._clock = clock
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}
        self._renewed_s = clock()

    async def take(self, stop: asyncio.Event) -> bool:
        """Stand by until this operator leads; False where it is stopped before."""
        told: tuple[str, str, str] | None = None
        while not stop.is_set():
            try:
                other = await self._step()
            except Unavailable as error:
                log.warning("cluster_away", detail=error.message)
            else:
                if other is None:
                    return True
                if told != (told := (other.namespace, other.name, other.holder)):
                    log.warning("standing_by", leads=f"{other.namespace}/{other.name}", pod=other.holder)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RENEW_S)
        return False

    async def keep(self, stop: asyncio.Event) -> None:
        """Renew until stopped.

        Raises:
            Unavailable: OPERATOR_REPLACED: this one was away so long that another leads; OPERATOR_CUT_OFF: so long that
                another may soon. Everything is stopped.
        """
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RENEW_S)
            if stop.is_set():
                return
            try:
                async with asyncio.timeout(self._renewed_s + CUT_OFF_S - self._clock()):
                    other = await self._step()
            except (Unavailable, TimeoutError) as error:
                log.warning("cluster_away", detail=str(error))
                if isinstance(error, Unavailable) and self._clock() - self._renewed_s < CUT_OFF_S:
                    continue
                stop.set()
                message = f"the Lease could not be renewed for {CUT_OFF_S:g} s; another may lead soon"
                raise Unavailable("OPERATOR_CUT_OFF", message) from error
            if other is not None:
                stop.set()
                message = f"{other.namespace}/{other.name} leads by now, from pod {other.holder}"
                raise Unavailable("OPERATOR_REPLACED", message)

    async def _step(self) -> Claim | None:
        """Take or renew the Lease; whom it must be left to, if to anybody."""
        claims = await self._list()
        mine = self._mine(claims)
        if mine is not None and mine.holder != self._holder and self._alive(mine):
            return mine
        await self._write(mine)
        claims = await self._list()
        mine = self._mine(claims)
        if mine is None or mine.holder != self._holder:
            return mine or await self._step()
        return goes_first(mine, [claim for claim in claims if claim is not mine and self._alive(claim)])

    async def _list(self) -> list[Claim]:
        bodies = await self._api.list(API, "Lease", None, SELECTOR)
        claims = [claim_of(body) for body in bodies]
        for claim in claims:
            key = (claim.namespace, claim.name)
            before = self._seen.get(key)
            if before is None:
                age_s = max(0.0, (datetime.now(UTC) - claim.renewed).total_seconds() - SKEW_S)
                self._seen[key] = (claim.revision, self._clock() - age_s)
            elif before[0] != claim.revision:
                self._seen[key] = (claim.revision, self._clock())
        return claims

    def _mine(self, claims: list[Claim]) -> Claim | None:
        return next((claim for claim in claims if (claim.namespace, claim.name) == self._place), None)

    def _alive(self, claim: Claim) -> bool:
        return bool(claim.holder) and self._clock() - self._seen[claim.namespace, claim.name][1] < ALIVE_S

    async def _write(self, old: Claim | None) -> None:
        """Renew it, or take it afresh: whoever was away for long comes last."""
        now = datetime.now(UTC)
        notes = {WATCHED: ",".join(self._watched)}
        if old is not None and old.holder == self._holder and (now - old.renewed).total_seconds() < ALIVE_S:
            notes[SINCE] = str(old.since)
        namespace, name = self._place
        spec = {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": int(ALIVE_S),
            "renewTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        metadata = {"name": name, "namespace": namespace, "labels": COMPONENT, "annotations": notes}
        # From before the call: the server may have taken it at once, and answered late.
        at_s = self._clock()
        await self._api.apply({"apiVersion": API, "kind": "Lease", "metadata": metadata, "spec": spec})
        self._renewed_s = at_s

    async def let_go(self) -> None:
        """Once nothing is done any more; so that the next one need not wait."""
        with suppress(Unavailable, InvalidInput):
            mine = self._mine(await self._list())
            if mine is not None and mine.holder == self._holder:
                await self._api.delete(API, "Lease", *self._place)
