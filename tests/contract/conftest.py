"""The backbones that the streams' contract holds for: the memory fake, Valkey, Valkey as a cluster, and Redis 7."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.redis import RedisStreams

from tests.support.valkey import ValkeyCluster, ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Gives the URL of a backbone by its name; each is started when it is first asked for."""
    started: dict[str, ValkeyProcess | ValkeyCluster] = {}

    def url(name: str) -> str:
        if name not in started:
            folder = tmp_path_factory.mktemp(name)
            if name == "cluster":
                started[name] = ValkeyCluster(folder).start()
            elif name == "redis":
                binary = shutil.which("redis-server")
                if binary is None:
                    pytest.skip("no redis-server on the path: install Redis 7 or newer to test against it")
                started[name] = ValkeyProcess(folder, binary=binary).start()
            else:
                started[name] = ValkeyProcess(folder).start()
        return started[name].url

    yield url
    for server in started.values():
        server.stop()


@pytest.fixture(params=["memory", "valkey", "cluster", "redis"])
async def streams(
    request: pytest.FixtureRequest, backbones: Callable[[str], str]
) -> AsyncIterator[MemoryStreams | RedisStreams]:
    """Streams on each backbone, empty; the module's BUDGET is the queue's budget in bytes."""
    budget: int = request.module.BUDGET
    if request.param == "memory":
        yield MemoryStreams(budget_bytes=budget)
        return
    real = await RedisStreams.connect(backbones(request.param), budget_bytes=budget)
    await real.queue._connection.command("FLUSHALL")
    yield real
    await real.close()
