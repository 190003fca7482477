"""What is live is changed by a token of the role admin that has the model, in one step, and is written down."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import yaml
from vigil.storage.v1 import storage_pb2_grpc
from vigil_client import Route, RouteClient, ServiceError
from vigil_common.config import SecuritySettings
from vigil_common.errors import Unavailable
from vigil_common.grpc.server import create_server
from vigil_common.store.embedded_models import EmbeddedModelStore
from vigil_common.store.ports import ModelInfo
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Candidate, Live
from vigil_storage.bootstrap import ACCESS
from vigil_storage.routes import Routes
from vigil_storage.servicer import RouteServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MODEL = "cells"
ROLES = {
    "boss": {"roles": ["admin"], "models": [MODEL]},
    "nuts-boss": {"roles": ["admin"], "models": ["nuts"]},
    "line-1": {"roles": ["stream"]},
    "trainer": {"roles": ["publish", "review", "serve", "stream"]},
}


def token_of(name: str) -> str:
    return name.ljust(40, "-")


def a_version(number: int) -> ModelInfo:
    return ModelInfo(
        name=MODEL,
        version=number,
        digest=f"sha256:{number:064}",
        size_bytes=1,
        formats=("onnxruntime",),
        published_at_us=1,
        manifest="",
        published_by="trainer",
    )


async def one_byte() -> AsyncIterator[bytes]:
    yield b"x"


class Bench:
    """A server that asks for tokens, with two versions; nothing is live."""

    def __init__(self, models: EmbeddedModelStore, streams: MemoryStreams, address: str) -> None:
        self.models = models
        self.streams = streams
        self.address = address

    @asynccontextmanager
    async def asked_by(self, name: str | None) -> AsyncIterator[RouteClient]:
        async with RouteClient(self.address, token=token_of(name) if name else None) as routes:
            yield routes


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    entries = [
        {"name": name, "sha256": hashlib.sha256(token_of(name).encode()).hexdigest(), **may}
        for name, may in ROLES.items()
    ]
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(yaml.safe_dump({"tokens": entries}))
    models, streams = await EmbeddedModelStore.open(tmp_path), MemoryStreams()
    for number in (1, 2):
        info = a_version(number)
        await models.upload(MODEL, info.digest, info.size_bytes, one_byte())
        await models.publish(info)
    handle = create_server("localhost:0", access=ACCESS, security=SecuritySettings(tokens_file=tokens))
    servicer = RouteServicer(Routes(models, streams.routing))
    storage_pb2_grpc.add_RouteServiceServicer_to_server(servicer, handle.server)
    await handle.start()
    yield Bench(models, streams, f"localhost:{handle.port}")
    await handle.drain(0)
    await models.close()


async def everything(routes: RouteClient) -> AsyncIterator[Any]:
    yield routes.promote(MODEL, 2)
    yield routes.start_comparison(MODEL, 2)
    yield routes.stop_comparison(MODEL)


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        (None, "UNAUTHENTICATED", "TOKEN_MISSING"),
        ("somebody", "UNAUTHENTICATED", "TOKEN_UNKNOWN"),
        ("trainer", "PERMISSION_DENIED", "ROLE_MISSING"),
        ("nuts-boss", "PERMISSION_DENIED", "MODEL_NOT_ALLOWED"),
    ],
)
async def test_only_an_admin_of_the_model_changes_what_is_live(
    bench: Bench, name: str | None, code: str, reason: str
) -> None:
    before = await bench.streams.routing.promote(MODEL, version=1, digest=a_version(1).digest, threshold=None)
    async with bench.asked_by(name) as routes:
        async for call in everything(routes):
            with pytest.raises(ServiceError) as caught:
                await call
            assert (caught.value.failure.code, caught.value.failure.reason) == (code, reason)
    assert await bench.streams.routing.get(MODEL) == before


async def test_what_is_live_and_compared_is_seen_by_who_may_read_models_and_by_nobody_else(bench: Bench) -> None:
    routing = bench.streams.routing
    live, candidate = (Live(1, a_version(1).digest), Candidate(2, a_version(2).digest))
    await routing.write(MODEL, live=live, candidate=candidate)
    await routing.promote("nuts", version=7, digest=a_version(7).digest, threshold=None)
    async with bench.asked_by("trainer") as routes:
        cells, nuts = await routes.list_routes()
        assert (cells.model, cells.live, cells.candidate) == (MODEL, 1, 2)
        assert nuts == Route("nuts", 7, None, 0)
        assert await routes.list_routes("nuts") == [nuts]
        assert await routes.list_routes("bolts") == []
    async with bench.asked_by("nuts-boss") as routes:
        assert await routes.list_routes() == [nuts]
        with pytest.raises(ServiceError, match="MODEL_NOT_ALLOWED"):
            await routes.list_routes(MODEL)
    async with bench.asked_by("line-1") as routes:
        with pytest.raises(ServiceError, match="ROLE_MISSING"):
            await routes.list_routes()


async def test_a_promotion_and_a_comparison_are_written_down_with_who_from_and_to(bench: Bench) -> None:
    with structlog.testing.capture_logs() as lines:
        async with bench.asked_by("boss") as routes:
            assert await routes.promote(MODEL, 1) == Route(MODEL, 1, None, 0)
            compared = await routes.start_comparison(MODEL, 2, sample_fraction=0.5)
            assert (compared.live, compared.candidate) == (1, 2)
            assert await routes.stop_comparison(MODEL) == Route(MODEL, 1, None, 0)
            assert await routes.promote(MODEL, threshold=0.25) == Route(MODEL, 2, None, 0)
    said = [line for line in lines if line["event"] == "audit"]
    assert {(line["by"], line["model"]) for line in said} == {("boss", MODEL)}
    assert [(line["action"], line.get("before_version"), line.get("version")) for line in said] == [
        ("promoted", None, 1),
        ("comparison_started", None, 2),
        ("comparison_stopped", None, None),
        ("promoted", 1, 2),
    ]
    last = said[-1]
    assert (last["before_digest"], last["digest"]) == (a_version(1).digest, a_version(2).digest)
    route = await bench.streams.routing.get(MODEL)
    assert route is not None
    assert route.live == Live(2, a_version(2).digest, 0.25)


async def test_what_can_not_be_live_is_refused_and_nothing_changes(bench: Bench) -> None:
    await bench.models.deprecate(MODEL, 2, "misses cracks")
    async with bench.asked_by("boss") as routes:
        for call, reason in (
            (routes.promote(MODEL, 2), "VERSION_DEPRECATED"),
            (routes.promote(MODEL, 9), "UNKNOWN_VERSION"),
            (routes.promote(MODEL, 1, threshold=float("nan")), "THRESHOLD_INVALID"),
            (routes.start_comparison(MODEL, 1), "UNKNOWN_MODEL"),
            (routes.stop_comparison(MODEL), "UNKNOWN_MODEL"),
        ):
            with pytest.raises(ServiceError) as caught:
                await call
            assert caught.value.failure.reason == reason
    assert await bench.streams.routing.get(MODEL) is None


async def test_a_comparison_decided_beside_a_promotion_does_not_bring_the_old_version_back(bench: Bench) -> None:
    routing = bench.streams.routing
    stale = await routing.promote(MODEL, version=1, digest=a_version(1).digest, threshold=None)
    promoted = await routing.promote(MODEL, version=2, digest=a_version(2).digest, threshold=None)

    class Late:
        """A table that is read just before somebody promotes."""

        write = staticmethod(routing.write)

        async def get(self, _model: str) -> Any:
            return stale

    late: Any = Late()
    with pytest.raises(Unavailable, match="somebody else changed"):
        await Routes(bench.models, late).stop_comparison(MODEL)
    assert await routing.get(MODEL) == promoted


async def test_what_an_anomalymodel_decides_is_left_to_it_unless_its_operator_is_away(bench: Bench) -> None:
    live = Live(1, a_version(1).digest)
    before = await bench.streams.routing.write(MODEL, live=live, managed_by="line-1/cells")
    async with bench.asked_by("boss") as routes:
        async for call in everything(routes):
            with pytest.raises(ServiceError, match="AnomalyModel cells in namespace line-1") as caught:
                await call
            assert (caught.value.failure.code, caught.value.failure.reason) == ("FAILED_PRECONDITION", "MANAGED")
        assert await bench.streams.routing.get(MODEL) == before
        assert await routes.promote(MODEL, 2, force=True) == Route(MODEL, 2, None, 0)
