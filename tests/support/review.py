"""The review page before storage with tokens, without the rest of the platform."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from aiohttp import CookieJar
from aiohttp.test_utils import BaseTestServer, TestClient, TestServer
from PIL import Image
from vigil.storage.v1 import storage_pb2_grpc
from vigil_common.config import SecuritySettings
from vigil_common.grpc.server import create_server
from vigil_common.store.embedded import EmbeddedFrameStore
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_common.store.ports import Record
from vigil_common.streams.memory import MemoryStreams
from vigil_review.app import create_app
from vigil_review.backend import Backend
from vigil_review.config import Settings
from vigil_review.sessions import Sessions
from vigil_storage.annotations import AnnotationKeeper
from vigil_storage.app import Storage
from vigil_storage.bootstrap import ACCESS
from vigil_storage.reviews import Reviews
from vigil_storage.routes import Routes
from vigil_storage.servicer import FrameServicer, ModelServicer, RouteServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

M = "cells"
# Of the frame that `record(1)` makes.
PLACE = f"/m/{M}/f/line-1/f1"
T0 = 1_750_000_000_000_000
WIDTH, HEIGHT = 16, 12
TOKENS = {
    "Ann": {"roles": ["review"], "models": [M]},
    "Eve": {"roles": ["review"], "models": ["glass"]},
    "line-1": {"roles": ["stream"]},
}


def image(kind: str = "PNG", *, mode: str = "L", size: tuple[int, int] = (WIDTH, HEIGHT), fill: Any = 90) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, fill).save(file, kind)
    return file.getvalue()


def record(number: int, *, kind: str = "PNG") -> Record:
    body = image(kind, fill=number)
    labels = {
        "frame_id": f"f{number}",
        "sha256": hashlib.sha256(body).hexdigest(),
        "model": M,
        "camera": "line-1",
        "captured_at_us": str(T0 + number),
        "width": str(WIDTH),
        "height": str(HEIGHT),
        "outcome": "judged",
        "score": "0.4",
        "threshold": "0.5",
        "label": "normal",
        "version": "1",
    }
    return Record(f"{M}/line-1", T0 + number * 1_000, labels, body, f"image/{kind.lower()}")


@dataclass
class Site:
    """Storage with tokens, and the page before it, each on a port of its own."""

    tokens: dict[str, str]
    frames: EmbeddedFrameStore
    models: EmbeddedModelStore
    streams: MemoryStreams
    storage: Any
    server: BaseTestServer
    sessions: Sessions
    clock: list[float]
    clients: list[TestClient[Any, Any]] = field(default_factory=list)

    async def browser(self) -> TestClient[Any, Any]:
        """Somebody's browser, with cookies of its own."""
        client: TestClient[Any, Any] = TestClient(self.server, cookie_jar=CookieJar(unsafe=True))
        self.clients.append(client)
        return client

    async def logged_in(self, who: str = "Ann") -> TestClient[Any, Any]:
        """As they would."""
        client = await self.browser()
        answer = await client.post("/login", data={"name": who, "token": self.tokens[who]})
        assert str(answer.url.path) == "/"
        return client


@asynccontextmanager
async def review_site(tmp_path: Path, *, inference_address: str = "") -> AsyncIterator[Site]:
    """All of it, up for as long as the context is open; heat maps come from the worker at that address."""
    tokens = {name: secrets.token_hex(32) for name in TOKENS}
    known = [
        {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), **TOKENS[name]}
        for name, token in tokens.items()
    ]
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump({"tokens": known}))
    frames = await EmbeddedFrameStore.open(tmp_path)
    annotations = await EmbeddedFrameStore.open(tmp_path / "annotations")
    models = await EmbeddedModelStore.open(tmp_path)
    streams = MemoryStreams()
    reviews = Reviews(frames, annotations, streams.reviews, now_us=lambda: T0 + 1_000_000)
    security = SecuritySettings(tokens_file=tmp_path / "tokens.yaml")
    handle = create_server("127.0.0.1:0", access=ACCESS, security=security)
    app = Storage(frames, models)
    storage_pb2_grpc.add_FrameServiceServicer_to_server(FrameServicer(app, reviews), handle.server)
    storage_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(app), handle.server)
    routes = RouteServicer(Routes(models, streams.routing))
    storage_pb2_grpc.add_RouteServiceServicer_to_server(routes, handle.server)
    await handle.start()
    keeper = AnnotationKeeper(M, streams.reviews, annotations, frames, confirm_after_s=0.05)
    keeping = asyncio.create_task(keeper.run())
    backend = Backend(Settings(storage_address=f"127.0.0.1:{handle.port}", inference_address=inference_address))
    clock = [0.0]
    sessions = Sessions(60.0, clock=lambda: clock[0])
    async with TestServer(create_app(backend, sessions, secure=False)) as server:
        found = Site(tokens, frames, models, streams, handle, server, sessions, clock)
        yield found
        for client in found.clients:
            await client.session.close()
    await backend.close()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await handle.drain(0)
    for store in (frames, annotations, models):
        await store.close()


async def form_of(client: TestClient[Any, Any], path: str) -> dict[str, str]:
    """The hidden fields of a page's form, as a browser sends them."""
    text = await (await client.get(path)).text()
    page = text[text.index("<main>") :]
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


async def labels(site: Site, frame_id: str) -> dict[str, str]:
    """Of a stored frame."""
    return dict((await site.frames.find(M, frame_id)).labels)
