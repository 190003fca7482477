"""A Redis that lets in only who shows a certificate."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from vigil_common.config import SecuritySettings
from vigil_common.errors import Unavailable
from vigil_common.streams.redis import RedisStreams

from tests.e2e.tools import certificates

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server that speaks TLS")


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
