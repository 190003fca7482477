"""A Redis that lets in only who shows a certificate."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from vigil_common.config import SecuritySettings
from vigil_common.errors import Unavailable
from vigil_common.streams.redis import RedisStreams

from tests.e2e.tools import certificates
from tests.support.valkey import free_port

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server that speaks TLS")


@pytest.mark.parametrize("cluster", [False, True])
async def test_a_rotated_certificate_is_shown_at_the_next_connection(tmp_path: Path, *, cluster: bool) -> None:
    ca, cert, key, own_cert, own_key = (str(tmp_path / name) for name in ("ca", "cert", "key", "own-cert", "own-key"))

    def write(authority: trustme.CA, cert: str, key: str) -> None:
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(cert)

    ours = trustme.CA()
    ours.cert_pem.write_to_path(ca)
    write(ours, cert, key)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca, "--tls-auth-clients", "yes"]
    if cluster:
        files += ["--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--tls-cluster", "yes"]

    def ask(*words: str) -> None:
        cli = ("redis-cli", "-p", str(port), "--tls", "--cacert", ca, "--cert", cert, "--key", key)
        subprocess.run([*cli, *words], check=True, capture_output=True)

    with subprocess.Popen(  # noqa: ASYNC220 - returns at once
        ["redis-server", "--port", "0", "--tls-port", str(port), "--dir", tmp_path, "--save", "", *files],
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            write(ours, own_cert, own_key)
            own = Path(own_cert), Path(own_key)
            settings = SecuritySettings(redis_ca_file=Path(ca), tls_cert_file=own[0], tls_key_file=own[1])
            kind = "rediss+cluster" if cluster else "rediss"
            streams = await RedisStreams.connect(f"{kind}://127.0.0.1:{port}", security=settings)
            async with asyncio.timeout(10):
                while not await there(streams):
                    if cluster:
                        with suppress(subprocess.CalledProcessError):
                            await asyncio.to_thread(ask, "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
                    await asyncio.sleep(0.05)
            write(trustme.CA(), own_cert, own_key)
            await asyncio.to_thread(ask, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert [await there(streams) for _ in range(3)] == [False] * 3
            write(ours, own_cert, own_key)
            async with asyncio.timeout(10):
                while not await there(streams):
                    await asyncio.sleep(0.05)
            await streams.close()
        finally:
            server.terminate()


async def there(streams: RedisStreams) -> bool:
    try:
        await streams.ping()
    except Unavailable:
        return False
    return True


async def test_services_show_theirs_to_redis(tmp_path: Path) -> None:
    certificates(tmp_path / "tls", ["localhost"])
    ca, cert, key = (tmp_path / "tls" / name for name in ("ca.crt", "tls.crt", "tls.key"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = ("--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca, "--tls-auth-clients", "yes")
    with subprocess.Popen(  # noqa: ASYNC220 - returns at once
        ["redis-server", "--port", "0", "--tls-port", str(port), "--dir", tmp_path, "--save", "", *files],
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            with_one = SecuritySettings(redis_ca_file=ca, tls_cert_file=cert, tls_key_file=key)
            streams = await RedisStreams.connect(f"rediss://localhost:{port}", security=with_one)
            async with asyncio.timeout(10):
                while True:
                    with suppress(Unavailable):
                        await streams.ping()
                        break
                    await asyncio.sleep(0.05)
            await streams.close()
            without = SecuritySettings(redis_ca_file=ca)
            streams = await RedisStreams.connect(f"rediss://localhost:{port}", security=without)
            with pytest.raises(Unavailable, match=r"(?i)certificate"):
                await streams.ping()
            await streams.close()
        finally:
            server.terminate()
