"""TLS and tokens, over real connections to a server as every service makes it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
import yaml
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from vigil.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from vigil_client import Frame, VigilClient
from vigil_common.access import Role, Tokens
from vigil_common.config import SecuritySettings
from vigil_common.errors import InvalidInput
from vigil_common.grpc import reloading
from vigil_common.grpc import security as grpc_security
from vigil_common.grpc.security import connect
from vigil_common.grpc.server import create_server
from vigil_ingest.app import Limits
from vigil_ingest.bootstrap import ACCESS

from tests.support.ingest import started
from tests.support.valkey import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

LIMITS = Limits(image_bytes=100_000, image_pixels=10_000, verdict_timeout_s=0.3)
TOKENS = {"line": "a" * 40, "other": "b" * 40, "reviewer": "c" * 40, "admin": "d" * 40}


@asynccontextmanager
async def serving(settings: SecuritySettings, port: int = 0) -> AsyncIterator[int]:
    async with started(LIMITS, models=("cells", "nuts"), bind=f"localhost:{port}", security=settings) as (bound, _):
        yield bound


async def reason(channel: grpc.aio.Channel, *, model: str = "cells", token: str | None = None) -> str:
    """Why a frame without an image was refused: IMAGE_EMPTY where nothing else stood in its way."""
    stub: ingest_pb2_grpc.IngestServiceAsyncStub = ingest_pb2_grpc.IngestServiceStub(channel)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request = ingest_pb2.SubmitRequest(frame=ingest_pb2.Frame(frame_id="f", model=model, image=b"x" * 10))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Submit(request, metadata=metadata, timeout=5)
    return reason_of(caught.value)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
    if status is None:
        return error.code().name
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return str(info.reason)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    def entry(name: str, roles: list[str], models: list[str] | None = None) -> dict[str, Any]:
        digest = hashlib.sha256(TOKENS[name].encode()).hexdigest()
        return {"name": name, "sha256": digest, "roles": roles} | ({"models": models} if models else {})

    path = tmp_path / "tokens.yaml"
    entries = [
        entry("line", ["stream"], ["cells"]),
        entry("other", ["stream"], ["nuts"]),
        entry("reviewer", ["review"]),
        entry("admin", ["admin"]),
    ]
    path.write_text(yaml.safe_dump({"tokens": entries}))
    return path


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, "TOKEN_MISSING"),
        ("x" * 40, "TOKEN_UNKNOWN"),
        (TOKENS["reviewer"], "ROLE_MISSING"),
        (TOKENS["other"], "MODEL_NOT_ALLOWED"),
        (TOKENS["line"], "IMAGE_UNREADABLE"),
        (TOKENS["admin"], "IMAGE_UNREADABLE"),
    ],
)
async def test_a_call_needs_a_token_with_the_role_and_the_model(
    tokens_file: Path, token: str | None, expected: str
) -> None:
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        assert await reason(channel, token=token) == expected


async def test_each_frame_of_a_stream_is_held_against_the_tokens_models(tokens_file: Path) -> None:
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        stub: ingest_pb2_grpc.IngestServiceAsyncStub = ingest_pb2_grpc.IngestServiceStub(channel)
        frames = [ingest_pb2.Frame(frame_id=model, model=model, image=b"x" * 10) for model in ("cells", "nuts")]
        call = stub.Stream(
            iter([ingest_pb2.StreamRequest(frame=frame) for frame in frames]),
            metadata=(("authorization", f"Bearer {TOKENS['line']}"),),
        )
        codes = {response.frame_id: response.error.code async for response in call}
        assert codes == {
            "cells": grpc.StatusCode.INVALID_ARGUMENT.value[0],
            "nuts": grpc.StatusCode.PERMISSION_DENIED.value[0],
        }


async def test_a_revoked_token_is_refused_without_a_restart(tokens_file: Path) -> None:
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        assert await reason(channel, token=TOKENS["line"]) == "IMAGE_UNREADABLE"
        document = yaml.safe_load(tokens_file.read_text())
        tokens_file.write_text(yaml.safe_dump({"tokens": document["tokens"][1:]}))
        os.utime(tokens_file, ns=(1, 1))
        assert await reason(channel, token=TOKENS["line"]) == "TOKEN_UNKNOWN"


async def ended(port: int, tokens_file: Path, change: Callable[[dict[str, Any]], None]) -> tuple[str, bool]:
    """How an open stream ends after a change of its token's entry, and whether a frame was taken until then."""
    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        stub: ingest_pb2_grpc.IngestServiceAsyncStub = ingest_pb2_grpc.IngestServiceStub(channel)
        call = stub.Stream(metadata=(("authorization", f"Bearer {TOKENS['line']}"),))
        await call.write(ingest_pb2.StreamRequest(frame=ingest_pb2.Frame(frame_id="f", model="cells", image=b"x")))
        taken = isinstance(await call.read(), ingest_pb2.StreamResponse)
        document = yaml.safe_load(tokens_file.read_text())
        change(document["tokens"][0])
        tokens_file.write_text(yaml.safe_dump(document))
        os.utime(tokens_file, ns=(1, 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(5):
                await call.read()
        return reason_of(caught.value), taken


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sha256": "0" * 64}, "TOKEN_UNKNOWN"),
        ({"roles": ["review"]}, "ROLE_MISSING"),
        ({"models": ["nuts"]}, "TOKEN_CHANGED"),
    ],
)
async def test_an_open_stream_ends_when_its_token_no_longer_allows_it(
    tokens_file: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(grpc_security, "RECHECK_S", 0.05)
    async with serving(SecuritySettings(tokens_file=tokens_file)) as port:
        assert await ended(port, tokens_file, lambda entry: entry.update(change)) == (expected, True)


async def test_a_clients_stream_hears_of_the_end_also_while_it_sends(
    tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_security, "RECHECK_S", 0.05)

    window = asyncio.Semaphore(32)

    async def frames() -> AsyncIterator[ingest_pb2.StreamRequest]:
        while True:
            await window.acquire()
            yield ingest_pb2.StreamRequest(frame=ingest_pb2.Frame(frame_id="f", model="cells", image=b"x" * 50_000))

    async def answers() -> None:
        async with asyncio.timeout(5):
            async for _ in call:
                window.release()

    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        stub: ingest_pb2_grpc.IngestServiceAsyncStub = ingest_pb2_grpc.IngestServiceStub(channel)
        call = stub.Stream(frames(), metadata=(("authorization", f"Bearer {TOKENS['line']}"),))
        document = yaml.safe_load(tokens_file.read_text())
        tokens_file.write_text(yaml.safe_dump({"tokens": document["tokens"][1:]}))
        os.utime(tokens_file, ns=(1, 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers()
        assert reason_of(caught.value) == "TOKEN_UNKNOWN"


@pytest.mark.parametrize(
    "slip",
    [b"tokens: [{name: line-1}]", b"# for hall \xfc\ntokens: []", b"tokens: 2026-13-45", b"[" * 5000],
    ids=["a field is missing", "not UTF-8", "no date", "too deep"],
)
async def test_a_slip_in_the_tokens_file_locks_nobody_out(tokens_file: Path, slip: bytes) -> None:
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        tokens_file.write_bytes(slip)
        os.utime(tokens_file, ns=(1, 1))
        assert await reason(channel, token=TOKENS["line"]) == "IMAGE_UNREADABLE"
        assert await reason(channel, token="x" * 40) == "TOKEN_UNKNOWN"
        tokens_file.unlink()
        assert await reason(channel, token=TOKENS["line"]) == "IMAGE_UNREADABLE"


async def test_probes_need_no_token(tokens_file: Path) -> None:
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        grpc.aio.insecure_channel(f"localhost:{port}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="vigil.ingest.v1.IngestService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_tokens_file_that_holds_the_token_itself_is_refused_without_repeating_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(
        yaml.safe_dump({"tokens": [{"name": "a", "sha256": "my-secret-token", "roles": [Role.STREAM.value]}]})
    )
    with pytest.raises(InvalidInput) as caught:
        Tokens(path)
    assert "tokens.0.sha256" in caught.value.message
    assert "my-secret-token" not in caught.value.message


class Pki:
    """An authority and the files of a server and a client."""

    def __init__(self, folder: Path, name: str) -> None:
        self.authority = trustme.CA()
        self.ca = folder / f"{name}-ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        self.issue()

    def issue(self) -> None:
        issued = self.authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.cert)


class Rotated:
    """The files of a client, which hold first one authority's and later another's."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = Pki(folder, "first"), Pki(folder, "second")
        self.ca, self.cert, self.key = folder / "own-ca", folder / "own", folder / "own-key"
        self.settings = SecuritySettings(tls_ca_file=self.ca, tls_cert_file=self.cert, tls_key_file=self.key)
        self.rotate(self.first)

    def rotate(self, pki: Pki) -> None:
        for path, source in ((self.ca, pki.ca), (self.cert, pki.cert), (self.key, pki.key)):
            path.write_bytes(source.read_bytes())

    def server(self, pki: Pki) -> SecuritySettings:
        return SecuritySettings(tls_cert_file=pki.cert, tls_key_file=pki.key, tls_client_ca_file=pki.ca)


async def test_only_a_client_that_knows_the_authority_can_connect(tmp_path: Path) -> None:
    ours, theirs = Pki(tmp_path, "ours"), Pki(tmp_path, "theirs")
    async with serving(SecuritySettings(tls_cert_file=ours.cert, tls_key_file=ours.key)) as port:
        address = f"localhost:{port}"
        async with connect(address, SecuritySettings(tls_ca_file=ours.ca)) as channel:
            assert await reason(channel) == "IMAGE_UNREADABLE"
        for settings in (SecuritySettings(tls_ca_file=theirs.ca), SecuritySettings()):
            async with connect(address, settings) as channel:
                assert await reason(channel) == "UNAVAILABLE"


async def test_mutual_tls_refuses_a_client_without_a_certificate(tmp_path: Path) -> None:
    ours, theirs = Pki(tmp_path, "ours"), Pki(tmp_path, "theirs")
    server = SecuritySettings(tls_cert_file=ours.cert, tls_key_file=ours.key, tls_client_ca_file=ours.ca)
    async with serving(server) as port:
        for settings, expected in (
            (SecuritySettings(tls_ca_file=ours.ca), "UNAVAILABLE"),
            (SecuritySettings(tls_ca_file=ours.ca, tls_cert_file=theirs.cert, tls_key_file=theirs.key), "UNAVAILABLE"),
            (SecuritySettings(tls_ca_file=ours.ca, tls_cert_file=ours.cert, tls_key_file=ours.key), "IMAGE_UNREADABLE"),
        ):
            async with connect(f"localhost:{port}", settings) as channel:
                assert await reason(channel) == expected


async def test_a_rotated_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    first, second = Pki(tmp_path, "first"), Pki(tmp_path, "second")
    async with serving(SecuritySettings(tls_cert_file=first.cert, tls_key_file=first.key)) as port:
        async with connect(f"localhost:{port}", SecuritySettings(tls_ca_file=first.ca)) as channel:
            assert await reason(channel) == "IMAGE_UNREADABLE"
        first.key.write_bytes(second.key.read_bytes())
        first.cert.write_bytes(second.cert.read_bytes())
        async with connect(f"localhost:{port}", SecuritySettings(tls_ca_file=second.ca)) as channel:
            assert await reason(channel) == "IMAGE_UNREADABLE"


async def test_a_channel_shows_and_trusts_the_certificates_that_are_in_its_files_now(
    tmp_path: Path, unused_port: int
) -> None:
    own = Rotated(tmp_path)
    async with connect(f"localhost:{unused_port}", own.settings) as channel:
        async with serving(own.server(own.first), unused_port):
            assert await reason(channel) == "IMAGE_UNREADABLE"
            own.key.unlink()
            assert await reason(channel) == "IMAGE_UNREADABLE"
        own.rotate(own.second)
        async with serving(own.server(own.second), unused_port):
            assert await reason(channel) == "IMAGE_UNREADABLE"


async def test_a_client_that_streams_goes_on_with_the_certificates_that_are_in_its_files_now(
    tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Rotated(tmp_path)
    for name, path in (("CA", own.ca), ("CERT", own.cert), ("KEY", own.key)):
        monkeypatch.setenv(f"VIGIL_TLS_{name}_FILE", str(path))
    source: asyncio.Queue[Frame] = asyncio.Queue()

    async def frames() -> AsyncIterator[Frame]:
        while True:
            yield await source.get()

    async def refused() -> str:
        source.put_nowait(Frame(b"x" * 10, "cells"))
        error = (await anext(results)).error
        assert error is not None
        return error.reason

    async with asyncio.timeout(20), VigilClient(f"localhost:{unused_port}", max_retry_s=10) as client:
        results = client.stream(frames())
        async with serving(own.server(own.first), unused_port):
            assert await refused() == "IMAGE_UNREADABLE"
            own.key.unlink()
            assert await refused() == "IMAGE_UNREADABLE"
        own.rotate(own.second)
        async with serving(own.server(own.second), unused_port):
            assert await refused() == "IMAGE_UNREADABLE"


async def test_a_call_under_way_ends_well_after_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "RETIRE_AFTER_S", 0.0)
    ours = Pki(tmp_path, "ours")
    served = SecuritySettings(tls_cert_file=ours.cert, tls_key_file=ours.key)
    async with serving(served) as port, connect(f"localhost:{port}", SecuritySettings(tls_ca_file=ours.ca)) as channel:
        stub: ingest_pb2_grpc.IngestServiceAsyncStub = ingest_pb2_grpc.IngestServiceStub(channel)
        call = stub.Stream()
        frame = ingest_pb2.StreamRequest(frame=ingest_pb2.Frame(frame_id="f", model="cells", image=b"x"))
        for turn in range(1, 3):
            await call.write(frame)
            assert isinstance(await call.read(), ingest_pb2.StreamResponse)
            os.utime(ours.ca, ns=(turn, turn))
            assert await reason(channel) == "IMAGE_UNREADABLE"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_with_tls_the_probes_have_a_port_that_answers_nothing_else(tmp_path: Path, unused_port: int) -> None:
    ours = Pki(tmp_path, "ours")
    settings = SecuritySettings(tls_cert_file=ours.cert, tls_key_file=ours.key, health_bind=f"localhost:{unused_port}")
    async with serving(settings), grpc.aio.insecure_channel(f"localhost:{unused_port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert await reason(channel) == "UNIMPLEMENTED"


async def test_a_service_sends_its_token_with_each_call(tokens_file: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKENS["line"] + "\n")
    async with (
        serving(SecuritySettings(tokens_file=tokens_file)) as port,
        connect(f"localhost:{port}", SecuritySettings(token_file=token_file)) as channel,
    ):
        assert await reason(channel) == "IMAGE_UNREADABLE"


async def test_half_of_tls_is_refused(tmp_path: Path) -> None:
    ours = Pki(tmp_path, "ours")
    with pytest.raises(InvalidInput, match="VIGIL_TLS_KEY_FILE"):
        create_server("localhost:0", access=ACCESS, security=SecuritySettings(tls_cert_file=ours.cert))


@pytest.fixture
def unused_port() -> int:
    return free_port()
