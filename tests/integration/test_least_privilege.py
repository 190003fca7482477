"""The whole path with each service as its own Redis user, and storage with a token for its own buckets alone."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio as aredis
from redis.exceptions import NoPermissionError, RedisError
from reduct import Client, ReductError
from vigil_cli.local.stack import LocalStack
from vigil_cli.shadow_client import ShadowClient
from vigil_client import Frame, HumanLabel, RouteClient, StorageClient, VigilClient
from vigil_common.config import SecuritySettings
from vigil_common.errors import Unavailable
from vigil_common.store.open import open_stores
from vigil_common.store.reduct_sites import FRAMES
from vigil_common.store.reduct_token import main as write_token
from vigil_common.streams import acl, redis_frames
from vigil_common.streams.ports import Emission, Live
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import train

from tests.support.cells import load_cells
from tests.support.platform import MODEL, trained_bundle
from tests.support.reduct import reduct_server
from tests.support.valkey import ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

USERS = {
    "vigil_storage": "storage",
    "vigil_ingest": "ingest",
    "vigil_shadow": "shadow",
    "vigil_inference": "inference",
}
KEY = f"vigil:{{{MODEL}}}:"


class LeastStack(LocalStack):
    """`LocalStack` whose services each have their own user and token."""

    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(folder, env={"VIGIL_STORE_TOKEN_FILE": str(root), "VIGIL_CLAIM_IDLE_MS": "500"})
        self.users = folder / "users"
        self._root = root
        acl.write(self.users)

    def _add_valkey(self) -> None:
        super()._add_valkey()
        config = self.folder / "valkey" / "valkey.conf"
        config.write_text(f"aclfile {self.users / 'users.acl'}\n")

    def _add_service(self, name: str, module: str, **settings: str) -> None:
        user = USERS[module]
        settings["REDIS_URL"] = self.url(user)
        settings["REDIS_PASSWORD_FILE"] = str(self.users / user)
        settings["STORE_TOKEN_FILE"] = str(self.folder / ("store-token" if user == "storage" else "none"))
        super()._add_service(name, module, **settings)

    async def start(self, name: str) -> None:
        if name == "storage":
            await asyncio.to_thread(write_token, self.store_url, str(self._root), str(self.folder / "store-token"))
        await super().start(name)

    def url(self, user: str) -> str:
        return self.redis_url.replace("redis://", f"redis://{user}@")


def by_user(url: str, users: Path, name: str) -> aredis.Redis:
    host = url.rpartition("@")[2].removeprefix("redis://")
    password = (users / name).read_text()
    return aredis.Redis.from_url(f"redis://{host}", username=name, password=password, driver_info=None)


async def denied(url: str, users: Path) -> list[str]:
    """What Redis refused to whom since the last call."""
    admin = by_user(url, users, acl.ADMIN)
    try:
        log: Any = await admin.acl_log()
        await admin.acl_log_reset()
    finally:
        await admin.aclose()
    return [f"{entry['username']}: {entry['reason']} {entry['object']} ({entry['context']})" for entry in log]


async def test_every_service_does_its_work_as_its_own_user_and_nothing_is_refused_to_any(tmp_path: Path) -> None:
    root = tmp_path / "root-token"
    root.write_text(secrets.token_hex(32))
    cells = load_cells()
    second = await asyncio.to_thread(train, cells.train[:60], name=MODEL)
    async with LeastStack(tmp_path / "stack", root) as stack, StorageClient(stack.storage_address) as storage:
        live, candidate = [await storage.models_publish(one, name=MODEL) for one in (trained_bundle(), second.bundle)]
        async with RouteClient(stack.storage_address) as routes:
            await routes.promote(MODEL, live.version)
            await stack.add_worker(MODEL, live.version)
            await stack.add_worker(MODEL, candidate.version)
            await routes.start_comparison(MODEL, candidate.version)
        images = [*cells.test_images[:24], cells.normal[0][:1000]]  # the last one is torn: a dead letter
        async with VigilClient(stack.ingest_address) as client:
            results = [one async for one in client.stream(Frame(image, MODEL, camera="c") for image in images)]
        ids = {one.frame_id for one in results}
        assert sum(one.verdict is not None for one in results) == 24

        async with asyncio.timeout(60):
            while ids != {frame.frame_id async for frame in storage.frames_query(MODEL)}:
                await asyncio.sleep(0.1)
            async with ShadowClient(stack.shadow_address) as shadow:
                while (await shadow.report(MODEL, detail=True)).report.frames < 24:
                    await asyncio.sleep(0.1)
                await shadow.disagreements(MODEL, limit=5)
        given = await storage.frames_review_queue(MODEL, "ada")
        await storage.frames_annotate(MODEL, given[0].frame.frame_id, HumanLabel.NORMAL, author="ada")

        # A worker that dies with frames in hand; the next one claims them.
        stack.kill(f"worker-{MODEL}-{live.version}")
        await stack.start(f"worker-{MODEL}-{live.version}")

        # What KEDA asks to tell live's lag.
        scaler = by_user(stack.redis_url, stack.users, "keda")
        await scaler.info()
        await scaler.xinfo_groups(f"{KEY}frames")
        await scaler.aclose()

        settings = SecuritySettings(redis_password_file=stack.users / "operator")
        operator = await RedisStreams.connect(stack.url("operator"), security=settings)
        await operator.routing.write(MODEL, live=Live(live.version, live.digest))
        await operator.routing.keep_fraction(MODEL, 0.5)
        assert await operator.routing.kept_fraction(MODEL) == 0.5
        route = await operator.routing.get(MODEL)
        assert route is not None
        assert route.live.version == live.version
        await operator.routing.keep_fraction(MODEL, None)
        await operator.routing.remove(MODEL)
        await operator.close()
        for name in ("ingest", "shadow", "storage"):
            await stack.restart(name)
        assert await denied(stack.redis_url, stack.users) == []


async def test_storages_token_is_good_for_its_buckets_alone(tmp_path: Path) -> None:
    root, file = tmp_path / "root", tmp_path / "token"
    root.write_text(secrets.token_hex(32))
    with reduct_server(tmp_path, token=root.read_text()) as server:
        await asyncio.to_thread(write_token, server.url, str(root), str(file))
        old = file.read_text()
        await asyncio.to_thread(write_token, server.url, str(root), str(file))
        async with Client(server.url, api_token=root.read_text()) as admin:
            other = await admin.create_bucket("other")
            await other.write("e", b"x", timestamp=1)
        frames, models = await open_stores(server.url, file.read_text())
        assert await models.list() == []
        await frames.close()
        await models.close()
        async with Client(server.url, api_token=file.read_text()) as storage:
            bucket = await storage.get_bucket(FRAMES)
            await bucket.write("e", b"x", timestamp=1)
            for refused in (storage.create_bucket("mine"), storage.get_token_list(), bucket.remove(), peek(storage)):
                with pytest.raises(ReductError) as caught:
                    await refused
                assert caught.value.status_code == 403
        with pytest.raises(Unavailable):
            await open_stores(server.url, old)


async def peek(client: Client) -> None:
    bucket = await client.get_bucket("other")
    async with bucket.read("e", 1):
        pass


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[ValkeyProcess]:
    server = ValkeyProcess(tmp_path / "data", "--aclfile", str(acl.write(tmp_path / "users")))
    await asyncio.to_thread(server.start)
    yield server
    server.stop()


FRAME = ("XADD", f"{KEY}frames", "*", "h", "x")
ROUTE = ("HSET", f"{KEY}routing", "version", "2")
VERDICT = ("XADD", f"{KEY}verdicts", "*", "e", "1-1")


@pytest.mark.parametrize(
    ("user", "commands"),
    [
        (
            "ingest",
            (ROUTE, VERDICT, ("XACK", f"{KEY}frames", "live", "1-1"), ("XREAD", "STREAMS", f"{KEY}frames", "0")),
        ),
        ("inference", (ROUTE, FRAME, ("SET", f"{KEY}owner", "me"), ("XRANGE", f"{KEY}annotations", "-", "+"))),
        ("shadow", (ROUTE, FRAME, VERDICT, ("XREAD", "STREAMS", f"{KEY}frames", "0"))),
        ("storage", (FRAME, VERDICT, ("XADD", f"{KEY}replies:r", "*", "o", "x"))),
        (
            "operator",
            (FRAME, VERDICT, ("XRANGE", f"{KEY}frames", "-", "+"), ("XREAD", "STREAMS", f"{KEY}verdicts", "0")),
        ),
    ],
)
async def test_a_service_may_not_do_what_is_another_ones(
    valkey: ValkeyProcess, tmp_path: Path, user: str, commands: tuple[tuple[str, ...], ...]
) -> None:
    client: Any = by_user(valkey.url, tmp_path / "users", user)
    assert await client.ping()
    for command in (
        *commands,
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("GET", "another"),
        ("ACL", "LIST"),
    ):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command)
    await client.aclose()


async def connect_as(name: str, url: str, users: Path) -> RedisStreams:
    settings = SecuritySettings(redis_password_file=users / name)
    return await RedisStreams.connect(url.replace("redis://", f"redis://{name}@"), security=settings)


async def test_pictures_that_pile_up_are_trimmed_by_worker_and_ingest_as_their_own_users(
    valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_frames, "REPLIES_BYTES_AT_MOST", 1_000_000)
    ingest, worker = [await connect_as(name, valkey.url, tmp_path / "users") for name in ("ingest", "inference")]
    source, after, fetched = worker.source(MODEL, "a"), "0", []
    for name in ("f1", "f2", "f3"):
        await ingest.queue.admit(MODEL, frame_id=name, sha256=b"s", header=b"h", image=b"i", reply_to="me")
        (frame,) = await source.read(count=1, block_ms=1000)
        await source.emit([Emission(frame.entry_id, name, b"o", name.encode() * 300_000)])
    for _ in range(2):
        after, replies = await ingest.queue.read_replies(MODEL, "me", after, block_ms=10)
        fetched += [reply[:2] for reply in replies]
    assert fetched == [b"f3"]
    assert await denied(valkey.url, tmp_path / "users") == []
    for one in (ingest, worker):
        await one.close()


async def test_a_worker_can_not_write_the_route_by_a_script_either(valkey: ValkeyProcess, tmp_path: Path) -> None:
    users = tmp_path / "users"
    admin, worker = [await connect_as(name, valkey.url, users) for name in (acl.ADMIN, "inference")]
    written = await admin.routing.promote(MODEL, version=1, digest="sha256:1", threshold=None)
    assert await worker.routing.get(MODEL) == written
    with pytest.raises(NoPermissionError):
        await worker.routing.promote(MODEL, version=2, digest="sha256:2", threshold=None)
    client = by_user(valkey.url, users, "inference")
    with pytest.raises(RedisError, match="ACL failure"):
        await client.eval(f"return redis.call('HSET', '{KEY}routing', 'version', '2')", 0)
    await client.aclose()
    assert await admin.routing.get(MODEL) == written
    for one in (admin, worker):
        await one.close()


async def test_the_file_holds_no_password_and_called_again_keeps_them(tmp_path: Path) -> None:
    folder = tmp_path / "users"
    text = acl.write(folder).read_text()
    passwords = {name: (folder / name).read_text() for name in (*acl.USERS, acl.ADMIN)}
    assert len(set(passwords.values())) == len(passwords)
    assert not any(password in text for password in passwords.values())
    assert acl.write(folder).read_text() == text
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))
