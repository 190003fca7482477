"""A centre and an edge, two real servers, over a link that is cut for a while."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from vigil_cli.main import app
from vigil_common.errors import InvalidInput, NotFound, Unavailable, VigilError
from vigil_common.store.ports import FrameFilter, Labelling, ModelInfo, Record
from vigil_common.store.reduct import ReductFrameStore
from vigil_common.store.reduct_models import ReductModelStore
from vigil_common.store.reduct_sites import (
    Server,
    Site,
    add_site,
    get_site,
    links_down,
    links_up,
    list_sites,
    remove_site,
)

from tests.support.link import Link
from tests.support.reduct import find_binary, reduct_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no reductstore binary")

T0 = 1_750_000_000_000_000
DEADLINE_S = 30.0


@dataclass
class Stores:
    frames: ReductFrameStore
    models: ReductModelStore

    @classmethod
    async def open(cls, url: str) -> Stores:
        return cls(await ReductFrameStore.open(url), await ReductModelStore.open(url, settle_s=0))

    async def publish(self, version: int, bundle: bytes, name: str = "cells") -> ModelInfo:
        async def chunks() -> AsyncIterator[bytes]:
            yield bundle

        digest = f"sha256:{hashlib.sha256(bundle).hexdigest()}"
        info = ModelInfo(name, version, digest, len(bundle), ("onnxruntime",), T0, f"name: {name}\n")
        await self.models.upload(name, digest, len(bundle), chunks())
        await self.models.publish(info)
        return info

    async def versions(self) -> list[tuple[str, int]]:
        """Those listed, each of which must be there whole."""
        found = await self.models.list()
        for info in found:
            assert [chunk async for chunk in self.models.download(info)]
        return [(info.name, info.version) for info in found]

    async def write(self, number: int, label: str, model: str = "cells", **labels: str) -> None:
        image = f"image {number}".encode()
        values = {"frame_id": f"f{number}", "sha256": hashlib.sha256(image).hexdigest(), "label": label, **labels}
        (written,) = await self.frames.write([Record(f"{model}/cam", T0 + number, values, image, "image/png")])
        assert not isinstance(written, Exception)

    async def ids(self) -> set[str]:
        where = FrameFilter(["cells/*", "nuts/*"])
        return {frame.labels["frame_id"] async for frame in self.frames.query(where, limit=100)}

    async def close(self) -> None:
        await self.frames.close()
        await self.models.close()


@dataclass
class World:
    centre: Server
    edge: Server
    link: Link
    at_centre: Stores
    at_edge: Stores


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """The centre reaches the edge by the link; the edge reaches the centre by a second one, cut together with it."""
    with reduct_server(tmp_path / "centre") as centre, reduct_server(tmp_path / "edge") as edge:
        async with Link(edge.port) as down, Link(centre.port) as up:
            both = _Both(down, up)
            at_centre, at_edge = await Stores.open(centre.url), await Stores.open(edge.url)
            yield World(Server(centre.url), Server(down.url), both, at_centre, at_edge)
            await at_centre.close()
            await at_edge.close()


class _Both(Link):
    """Both directions of one cable; `url` is the way up."""

    def __init__(self, down: Link, up: Link) -> None:
        super().__init__(0)
        self._ways = (down, up)
        self.port = up.port

    async def cut(self) -> None:
        for way in self._ways:
            await way.cut()

    async def mend(self) -> None:
        for way in self._ways:
            await way.mend()


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not await true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def test_models_go_down_and_what_is_worth_a_look_comes_up_over_a_link_that_was_cut(world: World) -> None:
    before = await world.at_centre.publish(1, b"first" * 1000)
    await world.at_centre.publish(2, b"second" * 1000)
    await world.at_centre.models.deprecate("cells", 1, "too many false alarms")
    await world.at_centre.publish(1, b"other" * 1000, name="nuts")
    assert await add_site(world.centre, world.edge, "hall", models=["cells"], centre_url_at_edge=world.link.url) == 2
    assert await world.at_edge.versions() == [("cells", 1), ("cells", 2)]
    assert (await world.at_edge.models.get("cells", 1)).digest == before.digest
    assert (await world.at_edge.models.get("cells", 1)).deprecated == "too many false alarms"

    await world.at_edge.write(1, "normal", agree="true")
    await world.at_edge.write(2, "anomalous")
    await world.at_edge.write(3, "normal", agree="false")
    await world.at_edge.write(4, "normal")
    await world.at_edge.write(9, "anomalous", model="nuts")
    assert await world.at_edge.frames.label([Labelling("cells/cam", T0 + 4, {"human": "anomalous"})]) == [None]
    await world.at_centre.publish(3, b"third" * 1_000_000)

    async def level() -> bool:
        return ("cells", 3) in await world.at_edge.versions() and await world.at_centre.ids() == {"f2", "f3", "f4"}

    await until(level)

    await world.link.cut()
    await world.at_centre.publish(4, b"fourth" * 1_000_000)
    await world.at_edge.write(5, "anomalous")
    await world.at_edge.write(6, "normal")
    assert await world.at_edge.ids() == {"f1", "f2", "f3", "f4", "f5", "f6", "f9"}
    assert await world.at_edge.versions() == [("cells", 1), ("cells", 2), ("cells", 3)]

    async def waiting() -> bool:
        (models,) = await links_down(world.centre, "hall")
        return models.pending > 0 and not models.active

    await until(waiting)
    with pytest.raises(Unavailable):
        await links_up(world.edge, "hall")

    await world.link.mend()

    async def caught_up() -> bool:
        return ("cells", 4) in await world.at_edge.versions() and "f5" in await world.at_centre.ids()

    await until(caught_up)
    assert await world.at_centre.ids() == {"f2", "f3", "f4", "f5"}

    async def nothing_left() -> bool:
        links = [*await links_down(world.centre, "hall"), *await links_up(world.edge, "hall")]
        assert {link.what for link in links} == {"models", "frames", "annotations"}
        return all(link.active and not link.pending for link in links)

    await until(nothing_left)


async def test_sites_are_listed_changed_and_removed(world: World) -> None:
    await add_site(world.centre, world.edge, "hall", models=["cells"], centre_url_at_edge=world.link.url)
    assert await list_sites(world.centre) == [Site("hall", world.edge.url, ("cells",))]
    await add_site(world.centre, world.edge, "hall", centre_url_at_edge=world.link.url)
    assert await get_site(world.centre, "hall") == Site("hall", world.edge.url, ())
    with pytest.raises(InvalidInput):
        await add_site(world.centre, world.edge, "Hall 1")
    with pytest.raises(NotFound):
        await get_site(world.centre, "yard")
    await remove_site(world.centre, world.edge, "hall")
    assert await list_sites(world.centre) == []
    with pytest.raises(VigilError):
        await links_up(world.edge, "hall")


async def test_the_commands_show_what_is_there(world: World) -> None:
    await world.at_centre.publish(1, b"first")
    centre = ["--store-url", world.centre.url]

    async def vigil(*arguments: str) -> tuple[int, str]:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["site", *arguments, *centre])
        return result.exit_code, result.stdout

    way_up = ["--centre-url-at-edge", world.link.url]
    assert await vigil("add", "hall", "--url", world.edge.url, *way_up) == (
        0,
        "site hall added, 1 versions copied to it\n",
    )
    code, text = await vigil("list")
    assert (code, "hall" in text, "all" in text) == (0, True, True)

    async def answers() -> bool:
        code, text = await vigil("status", "hall", "--json")
        said = json.loads(text)
        return code == 0 and [link["what"] for link in said["up"]] == ["frames", "annotations"]

    await until(answers)
    await world.link.cut()
    code, text = await vigil("status", "hall", "--json")
    assert code == 1
    assert json.loads(text)["trouble"]
    assert (await vigil("remove", "hall"))[0] == 1
    assert await vigil("remove", "hall", "--only-centre") == (0, "site hall removed\n")
    with contextlib.suppress(OSError):
        await world.link.mend()
