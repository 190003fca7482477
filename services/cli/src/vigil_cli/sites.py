"""`vigil site`: edges that get models from the centre and send back what is worth a look."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from vigil_common.errors import VigilError

from vigil_cli.options import AsJson, console, errors, run

# Its client of ReductStore takes as long to load as all other commands together, so only what needs it does.
if TYPE_CHECKING:
    from vigil_common.store.reduct_sites import Link, Server, Site

app = typer.Typer(help="Edge sites, by ReductStore's replication.", no_args_is_help=True)

StoreUrl = Annotated[str, typer.Option(envvar="VIGIL_STORE_URL", help="The centre's ReductStore, http(s)://HOST:PORT.")]
StoreTokenFile = Annotated[
    Path | None, typer.Option(envvar="VIGIL_STORE_TOKEN_FILE", exists=True, help="Holds the centre's API token.")
]
SiteName = Annotated[str, typer.Argument(help="The site's name.")]
TokenFile = Annotated[Path | None, typer.Option(exists=True, help="Holds the edge's API token.")]
DEFAULT_STORE = "http://localhost:8383"


def _server(url: str, token_file: Path | None) -> "Server":
    from vigil_common.store.reduct_sites import Server  # noqa: PLC0415 - see above

    return Server(url, token_file.read_text().strip() if token_file else None)


@app.command()
def add(
    name: SiteName,
    *,
    url: Annotated[str, typer.Option(help="The edge's ReductStore, as the centre reaches it.")],
    token_file: TokenFile = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Only this model; may be repeated.")] = None,
    centre_url_at_edge: Annotated[str, typer.Option(help="How the edge reaches the centre, if otherwise.")] = "",
    store_url: StoreUrl = DEFAULT_STORE,
    store_token_file: StoreTokenFile = None,
) -> None:
    """Send models to an edge, and its anomalous, disagreeing and reviewed frames to the centre; from now on, by itself.

    Adding it again changes what it gets. Cameras of all sites need names of their own.
    """
    from vigil_common.store import reduct_sites  # noqa: PLC0415 - see above

    copied = run(
        reduct_sites.add_site(
            _server(store_url, store_token_file),
            _server(url, token_file),
            name,
            models=model or (),
            centre_url_at_edge=centre_url_at_edge,
        )
    )
    console.print(f"site {name} added, {copied} versions copied to it")


@app.command("list")
def list_(*, store_url: StoreUrl = DEFAULT_STORE, store_token_file: StoreTokenFile = None) -> None:
    """List sites."""
    from vigil_common.store import reduct_sites  # noqa: PLC0415 - see above

    table = Table("site", Column("store", overflow="fold"), "models")
    for site in run(reduct_sites.list_sites(_server(store_url, store_token_file))):
        table.add_row(site.name, site.url, ", ".join(site.models) or "all")
    console.print(table)


@app.command()
def status(
    name: SiteName,
    *,
    token_file: TokenFile = None,
    store_url: StoreUrl = DEFAULT_STORE,
    store_token_file: StoreTokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is still to be sent each way; exit code 1 where a side does not answer."""
    from vigil_common.store import reduct_sites  # noqa: PLC0415 - see above

    centre = _server(store_url, store_token_file)

    async def work() -> "tuple[Site, list[Link], list[Link], str]":
        site = await reduct_sites.get_site(centre, name)
        down = await reduct_sites.links_down(centre, name)
        try:
            return site, down, await reduct_sites.links_up(_server(site.url, token_file), name), ""
        except VigilError as error:
            return site, down, [], error.message

    site, down, up, trouble = run(work())
    if as_json:
        links = {"down": [asdict(link) for link in down], "up": [asdict(link) for link in up]}
        typer.echo(json.dumps({"site": site.name, "store": site.url, **links, "trouble": trouble}))
    else:
        table = Table("direction", "what", "other side", "to be sent", "sent in an hour", "failed", "last error")
        for direction, links_of in (("to the edge", down), ("to the centre", up)):
            for link in links_of:
                answers = "answers" if link.active else "away"
                counts = (f"{count:,}" for count in (link.pending, link.sent, link.failed))
                table.add_row(direction, link.what, answers, *counts, link.last_error)
        console.print(table)
    if trouble:
        errors.print(f"{site.url}: {trouble}", soft_wrap=True)
    if trouble or not all(link.active for link in (*down, *up)):
        raise typer.Exit(1)


@app.command()
def remove(
    name: SiteName,
    *,
    token_file: TokenFile = None,
    only_centre: Annotated[bool, typer.Option("--only-centre", help="The edge is gone for good.")] = False,
    store_url: StoreUrl = DEFAULT_STORE,
    store_token_file: StoreTokenFile = None,
) -> None:
    """End the replications of a site; what both sides hold stays."""
    from vigil_common.store import reduct_sites  # noqa: PLC0415 - see above

    centre = _server(store_url, store_token_file)

    async def work() -> None:
        site = await reduct_sites.get_site(centre, name)
        edge = None if only_centre else _server(site.url, token_file)
        await reduct_sites.remove_site(centre, edge, name)

    run(work())
    console.print(f"site {name} removed")
