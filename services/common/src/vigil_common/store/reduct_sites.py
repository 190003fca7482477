"""Edge sites: a centre and its edges, each with a ReductStore of its own, tied by ReductStore's own replication.

Models go down; anomalous frames, those on which live and candidate disagree, and those a person reviewed come up, with
what people said of them. A server keeps what it could not send yet in a log of its own on disk, so either side works
on while the other is away. Replication sends what is written from now on: versions published earlier are copied once.

Frames keep their entry, MODEL/CAMERA: cameras of all sites need names of their own.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reduct import BucketSettings, Client, QuotaType, ReductError, ReplicationSettings

from vigil_common.errors import Conflict, InvalidInput, NotFound
from vigil_common.store.reduct_client import NOT_FOUND, translated
from vigil_common.store.reduct_models import ReductModelStore, entries_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

MODELS, FRAMES, ANNOTATIONS = "vigil-models", "vigil-frames", "vigil-annotations"
TIMEOUT_S = 30.0
# A label that is not there makes a condition fail with an error, so each is asked for first.
WORTH_SENDING: dict[str, Any] = {
    "$or": [
        {"$and": [{"$exists": ["label"]}, {"&label": {"$eq": "anomalous"}}]},
        {"$and": [{"$exists": ["agree"]}, {"$eq": [{"&agree": {"$cast": "string"}}, "false"]}]},
        {"$exists": ["human"]},
    ]
}
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_PREFIX = "vigil-site-"


@dataclass(frozen=True, slots=True)
class Server:
    """A ReductStore: where it is, and its API token."""

    url: str
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """An edge as the centre knows it; no models: all of them."""

    name: str
    url: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """One replication.

    Attributes:
        what: "models", "frames" or "annotations".
        active: Whether the other side answers.
        pending: Records still to be sent.
        sent: Records sent within the hour.
        failed: Tries that failed within the hour.
        last_error: Of those; empty where there was none.
    """

    what: str
    active: bool
    pending: int
    sent: int
    failed: int
    last_error: str


@asynccontextmanager
async def _client(server: Server) -> AsyncIterator[Any]:
    async with translated(), Client(server.url, api_token=server.token, timeout=TIMEOUT_S) as client:
        yield client


def _replication(site: str, what: str) -> str:
    return f"{_PREFIX}{site}-{what}"


async def add_site(
    centre: Server, edge: Server, name: str, *, models: Sequence[str] = (), centre_url_at_edge: str = ""
) -> int:
    """Tie an edge to the centre, or change what it gets.

    Args:
        centre: Where versions are published, with a token that may do everything.
        edge: The edge's, likewise; its URL as the centre reaches it, too.
        name: Of the site.
        models: Which ones; empty: all.
        centre_url_at_edge: How the edge reaches the centre, where that is another URL.

    Returns:
        How many versions published earlier were copied.

    Raises:
        InvalidInput: SITE_NAME_INVALID.
        Unavailable: A server does not answer.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput("SITE_NAME_INVALID", "a site's name has 1 to 40 lower-case letters, digits and dashes")
    async with _client(centre) as here, _client(edge) as there:
        await _make_buckets(here)
        await _make_buckets(there)
        down = ReplicationSettings(
            src_bucket=MODELS,
            dst_bucket=MODELS,
            dst_host=edge.url,
            dst_token=edge.token,
            entries=[entry for model in models for entry in entries_of(model)],
        )
        await _replicate(here, _replication(name, "models"), down)
        for what, bucket, when in (("frames", FRAMES, WORTH_SENDING), ("annotations", ANNOTATIONS, None)):
            up = ReplicationSettings(
                src_bucket=bucket,
                dst_bucket=bucket,
                dst_host=centre_url_at_edge or centre.url,
                dst_token=centre.token,
                entries=[f"{model}/*" for model in models],
                when=when,
            )
            await _replicate(there, _replication(name, what), up)
    return await _copy_models(centre, edge, models)


async def _make_buckets(client: Any) -> None:
    for bucket in (MODELS, FRAMES, ANNOTATIONS):
        settings = BucketSettings(quota_type=QuotaType.NONE) if bucket == MODELS else None
        await client.create_bucket(bucket, settings, exist_ok=True)


async def _replicate(client: Any, name: str, settings: Any) -> None:
    known = {replication.name for replication in await client.get_replications()}
    await (client.update_replication if name in known else client.create_replication)(name, settings)


async def _copy_models(centre: Server, edge: Server, models: Sequence[str]) -> int:
    """Copy versions that the edge lacks; their pointers last, as in a publication."""
    source = await ReductModelStore.open(centre.url, centre.token)
    try:
        target = await ReductModelStore.open(edge.url, edge.token, settle_s=0)
        try:
            there = {(info.name, info.version): info.digest for info in await target.list()}
            copied = 0
            for info in await source.list():
                if (models and info.name not in models) or (info.name, info.version) in there:
                    continue
                if info.digest not in there.values():
                    await target.upload(info.name, info.digest, info.size_bytes, source.download(info))
                    there[info.name, info.version] = info.digest
                try:
                    await target.publish(replace(info, deprecated=""))
                except Conflict:  # the replication was first
                    continue
                if info.deprecated:
                    await target.deprecate(info.name, info.version, info.deprecated)
                copied += 1
            return copied
        finally:
            await target.close()
    finally:
        await source.close()


async def list_sites(centre: Server) -> list[Site]:
    """Every site that the centre sends to, by name."""
    sites = []
    suffix = "-models"
    async with _client(centre) as here:
        for replication in await here.get_replications():
            if replication.name.startswith(_PREFIX) and replication.name.endswith(suffix):
                settings = (await here.get_replication_detail(replication.name)).settings
                models = tuple(sorted({entry.split("/")[1] for entry in settings.entries}))
                sites.append(Site(replication.name[len(_PREFIX) : -len(suffix)], settings.dst_host, models))
    return sorted(sites, key=lambda site: site.name)


async def get_site(centre: Server, name: str) -> Site:
    """One site; `NotFound("UNKNOWN_SITE", ...)` where there is none."""
    for site in await list_sites(centre):
        if site.name == name:
            return site
    raise NotFound("UNKNOWN_SITE", f"no site {name} has been added")


async def links_down(centre: Server, name: str) -> list[Link]:
    """How sending to a site goes, as the centre says."""
    return await _links(centre, name, ("models",))


async def links_up(edge: Server, name: str) -> list[Link]:
    """How sending to the centre goes, as the edge says; `Unavailable` where it does not answer."""
    return await _links(edge, name, ("frames", "annotations"))


async def _links(server: Server, site: str, whats: Sequence[str]) -> list[Link]:
    links = []
    async with _client(server) as client:
        for what in whats:
            try:
                detail = await client.get_replication_detail(_replication(site, what))
            except ReductError as error:
                if error.status_code == NOT_FOUND:
                    raise NotFound("UNKNOWN_SITE", f"{server.url} knows no site {site}; add it again") from error
                raise
            counted = detail.diagnostics.hourly
            last = next((error.last_message for error in counted.errors.values()), "")
            links.append(
                Link(what, detail.info.is_active, detail.info.pending_records, counted.ok, counted.errored, last)
            )
    return links


async def remove_site(centre: Server, edge: Server | None, name: str) -> None:
    """Untie a site; what both hold stays. Without the edge only the centre's half goes."""
    await get_site(centre, name)
    for server, whats in ((edge, ("frames", "annotations")), (centre, ("models",))):
        if server is None:
            continue
        async with _client(server) as client:
            known = {replication.name for replication in await client.get_replications()}
            for what in whats:
                if _replication(name, what) in known:
                    await client.delete_replication(_replication(name, what))
