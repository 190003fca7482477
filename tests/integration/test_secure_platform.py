"""The whole path with TLS in both directions, tokens, and passwords on both stores."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
import yaml
from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, ServiceError, StorageClient, VigilClient
from vigil_common.config import SecuritySettings
from vigil_common.errors import Unavailable
from vigil_common.streams.redis import RedisStreams

from tests.support.cells import load_cells
from tests.support.platform import MODEL, trained_bundle

if TYPE_CHECKING:
    from pathlib import Path

ROLES = {"camera": ["stream"], "trainer": ["publish"], "reviewer": ["review"], "service": ["serve"], "boss": ["admin"]}


class Secrets:
    """Certificates, tokens and passwords in files, as they would be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(self.path("ca.pem"))
        issued.private_key_pem.write_to_path(self.path("tls.key"))
        issued.cert_chain_pems[0].write_to_path(self.path("tls.crt"))
        self.tokens = {name: secrets.token_hex(32) for name in ROLES}
        entries = [
            {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "roles": ROLES[name]}
            for name, token in self.tokens.items()
        ]
        self.path("tokens.yaml").write_text(yaml.safe_dump({"tokens": entries}))
        self.path("token").write_text(self.tokens["service"])
        self.path("redis-password").write_text(f'with a space and "{secrets.token_hex(32)}"')
        self.path("store-token").write_text(secrets.token_hex(32))

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def env(self) -> dict[str, str]:
        files = {
            "TLS_CERT_FILE": "tls.crt",
            "TLS_KEY_FILE": "tls.key",
            "TLS_CLIENT_CA_FILE": "ca.pem",
            "TLS_CA_FILE": "ca.pem",
            "TOKENS_FILE": "tokens.yaml",
            "TOKEN_FILE": "token",
            "REDIS_PASSWORD_FILE": "redis-password",
            "STORE_TOKEN_FILE": "store-token",
        }
        return {f"VIGIL_{key}": str(self.path(name)) for key, name in files.items()}

    def credentials(self, *, certificate: bool = True) -> grpc.ChannelCredentials:
        pair = (self.path("tls.key").read_bytes(), self.path("tls.crt").read_bytes()) if certificate else (None, None)
        return grpc.ssl_channel_credentials(self.path("ca.pem").read_bytes(), *pair)


async def test_frames_pass_only_with_certificate_and_token_and_the_stores_ask_for_theirs(tmp_path: Path) -> None:
    found = Secrets(tmp_path)
    tls, tokens = found.credentials(), found.tokens
    image = load_cells().normal[0]
    async with LocalStack(tmp_path / "stack", env=found.env) as stack:
        address, storage_address = stack.ingest_address, stack.storage_address
        async with StorageClient(storage_address, channel_credentials=tls, token=tokens["trainer"]) as storage:
            model = await storage.models_publish(trained_bundle(), name=MODEL)
        settings = SecuritySettings(redis_password_file=found.path("redis-password"))
        streams = await RedisStreams.connect(stack.redis_url, security=settings)
        await streams.routing.promote(MODEL, version=model.version, digest=model.digest, threshold=None)
        await streams.close()
        await stack.add_worker(MODEL, model.version)

        async with VigilClient(address, channel_credentials=tls, token=tokens["camera"]) as client:
            assert (await client.submit(Frame(image, MODEL))).verdict is not None

        for token, reason in ((None, "TOKEN_MISSING"), ("x", "TOKEN_UNKNOWN"), (tokens["reviewer"], "ROLE_MISSING")):
            async with VigilClient(address, channel_credentials=tls, token=token) as client:
                result = await client.submit(Frame(image, MODEL))
                assert result.error is not None
                assert result.error.reason == reason
        async with StorageClient(storage_address, channel_credentials=tls, token=tokens["camera"]) as storage:
            with pytest.raises(ServiceError, match="may not call"):
                await storage.models_publish(trained_bundle(), name=MODEL)
        for credentials in (None, found.credentials(certificate=False)):
            client = VigilClient(address, channel_credentials=credentials, token=tokens["camera"], max_retry_s=0.5)
            async with client:
                result = await client.submit(Frame(image, MODEL))
                assert result.error is not None
                assert result.error.code == "UNAVAILABLE"

        stranger = await RedisStreams.connect(stack.redis_url)
        with pytest.raises(Unavailable):
            await stranger.ping()
        await stranger.close()
        logs = "".join(path.read_text() for path in (stack.folder / "logs").glob("*.log"))
        for secret in (
            *tokens.values(),
            found.path("redis-password").read_text(),
            found.path("store-token").read_text(),
        ):
            assert secret not in logs


async def test_the_commands_take_certificates_and_passwords_from_the_environment(tmp_path: Path) -> None:
    found = Secrets(tmp_path)
    bundle, image = tmp_path / "cells.tar", tmp_path / "cell.png"
    bundle.write_bytes(trained_bundle())
    image.write_bytes(load_cells().normal[0])
    async with LocalStack(tmp_path / "stack", env=found.env) as stack:
        where = {
            "VIGIL_ADDRESS": stack.ingest_address,
            "VIGIL_STORAGE_ADDRESS": stack.storage_address,
        }

        async def vigil(*words: str, token: str, code: int = 0) -> str:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vigil_cli", *words),
                env={**os.environ, **found.env, **where, "VIGIL_TOKEN": found.tokens[token]},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output = (await process.communicate())[0].decode()
            assert process.returncode == code, output
            return output

        await vigil("model", "publish", str(bundle), token="trainer")  # noqa: S106 - names of tokens
        assert "ROLE_MISSING" in await vigil("model", "promote", MODEL, token="trainer", code=1)  # noqa: S106
        await vigil("model", "promote", MODEL, "--version", "1", token="boss")  # noqa: S106
        lines = map(json.loads, stack.log_file("storage").read_text().splitlines())
        said = [(line["action"], line["by"]) for line in lines if line["event"] == "audit"]
        assert said == [("published", "trainer"), ("promoted", "boss")]
        await stack.add_worker(MODEL, 1)
        assert '"anomalous"' in await vigil("stream", str(image), "--model", MODEL, "--json", token="camera")  # noqa: S106
