"""The parts of the local platform that need no service."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import json
import os
import platform
import socket
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner
from vigil_cli import rollout
from vigil_cli.demo import split_cells
from vigil_cli.local import LocalStack, StackError, find_store
from vigil_cli.local.commands import write_environment
from vigil_cli.local.process import Process, free_port
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.main import app
from vigil_cli.sources import SourceError, open_source, source_label
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.grpc.workers import worker_address
from vigil_common.store.labels import check_labels

DEADLINE_S = 20.0
HEAD = "{apiVersion: vigil.dev/v1alpha1, kind: AnomalyModel"
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
# A parent that starts a child, says its id, and is killed.
PARENT = """
import os, sys
from pathlib import Path
from vigil_cli.local.process import Process
child = Process("child", [sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1]), os.environ)
child.start()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_a_stopped_process_can_be_started_again_and_its_output_is_kept(tmp_path: Path) -> None:
    process = Process("sleeper", SLEEPER, tmp_path / "log", os.environ)
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(2):
            process.start()
            first = process.pid
            assert first is not None
            await process.stop()
            assert process.pid is None
            assert not _alive(first)
        process.start()
        while process.tail().count("up") == 0:
            await asyncio.sleep(0.02)
        process.kill()
    assert process.pid is None


async def test_what_nobody_waits_for_stands_back(tmp_path: Path) -> None:
    process = Process("sleeper", SLEEPER, tmp_path / "log", os.environ, nice=5)
    process.start()
    assert process.pid is not None
    async with asyncio.timeout(DEADLINE_S):
        while process.tail().count("up") == 0:
            await asyncio.sleep(0.02)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5
    group = Path(f"/proc/{process.pid}/autogroup")
    assert not group.exists() or group.read_text().endswith("nice 5\n")
    process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
async def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path / "log"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await parent.communicate()
    async with asyncio.timeout(DEADLINE_S):
        while _alive(int(output)):
            await asyncio.sleep(0.02)


def test_without_reductstore_or_network_the_embedded_store_is_used_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.delenv("VIGIL_REDUCT_URL", raising=False)
    monkeypatch.delenv("VIGIL_REDUCT_BINARY", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    store = find_store(tmp_path / "store")
    assert store.url == f"file://{tmp_path / 'store'}"
    assert store.binary is None
    assert "make reductstore" in store.description


@pytest.mark.parametrize(("digest_of", "accepted"), [(b"", True), (b"tampered", False)])
def test_the_official_release_is_used_only_where_it_is_what_its_digest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest_of: bytes, *, accepted: bool
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("release/reductstore")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"\x7fELF"))
    archive = packed.getvalue()
    digest = f"sha256:{hashlib.sha256(digest_of or archive).hexdigest()}"
    asset = {"name": "reductstore.x86_64-unknown-linux-gnu.tar.gz", "digest": digest}

    def served(url: str, **_: object) -> io.BytesIO:
        return io.BytesIO(json.dumps({"assets": [asset]}).encode() if "api.github" in url else archive)

    for name in ("VIGIL_REDUCT_URL", "VIGIL_REDUCT_BINARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(urllib.request, "urlopen", served)
    store = find_store(tmp_path / "store")
    assert (store.binary is not None) == accepted
    if store.binary is not None:
        assert store.binary.read_bytes() == b"\x7fELF"
        assert os.access(store.binary, os.X_OK)
    else:
        assert "not what its digest says" in store.description


def test_a_running_store_named_by_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIGIL_REDUCT_URL", "http://store:8383")
    assert find_store(tmp_path).url == "http://store:8383"


def test_the_split_is_the_same_each_time_and_tests_on_no_training_cell() -> None:
    split = split_cells()
    assert split == split_cells()
    assert (len(split.train), len(split.test), sum(defective for _, defective in split.test)) == (350, 300, 150)
    assert not set(split.train) & {path for path, _ in split.test}


def test_folders_globs_and_videos_are_told_apart(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "clip.mp4"):
        (tmp_path / name).touch()
    whole = open_source([str(tmp_path)])
    assert [path.name for path in whole.images] == ["a.JPG", "b.png"]
    assert whole.left_out == len(list(tmp_path.iterdir())) - 2
    assert [path.name for path in open_source([str(tmp_path / "*.png")]).images] == ["b.png"]
    source = open_source([str(tmp_path / "clip.mp4"), "rtsp://camera/1", str(tmp_path / "b.png")])
    assert len(source.streams) == 2
    assert source.total is None
    with pytest.raises(SourceError, match="no image in"):
        open_source([str(tmp_path / "*.webp")])


def test_the_live_worker_s_address_is_read_anew_at_each_call(tmp_path: Path) -> None:
    setting = f"file:{tmp_path}/live/{{model}}"
    with pytest.raises(Unavailable, match="no worker of cells"):
        worker_address(setting, "cells")
    (tmp_path / "live").mkdir()
    for address in ("127.0.0.1:1", "127.0.0.1:2"):
        (tmp_path / "live" / "cells").write_text(f"{address}\n")
        assert worker_address(setting, "cells") == address
    (tmp_path / "secret").write_text("elsewhere:1")
    with pytest.raises(Unavailable):
        worker_address(setting, "../secret")
    assert worker_address("vigil-{model}.ns.svc:50052", "cells") == "vigil-cells.ns.svc:50052"
    by_resource = "vigil-{resource}.{namespace}.svc:50052"
    assert worker_address(by_resource, "cells", "line-1/solar") == "vigil-solar.line-1.svc:50052"
    with pytest.raises(Unavailable, match="no worker of cells"):
        worker_address(by_resource, "cells")


async def test_a_second_platform_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StackError, match="already"):
            await LocalStack(tmp_path).__aenter__()


async def test_tokens_without_one_for_the_services_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="VIGIL_TOKEN_FILE"):
        await LocalStack(tmp_path, env={"VIGIL_TOKENS_FILE": "tokens.yaml"}).__aenter__()


def test_a_port_is_the_one_wanted_where_it_is_free() -> None:
    first = free_port()
    assert free_port(first) == first
    with socket.socket() as held:
        held.bind(("127.0.0.1", first))
        held.listen()
        assert free_port(first) != first


async def test_a_folder_that_can_not_be_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StackError, match="file can't be a platform's folder: File exists"):
        await LocalStack(file).__aenter__()


@pytest.mark.parametrize("name", ["a/1.png", "Prüfung/" * 200 + "1.png", "%" * 900, "d ü/" * 400])
def test_a_file_s_name_becomes_a_label_that_is_kept(name: str) -> None:
    label = source_label(name)
    check_labels({"source": label})
    assert name.endswith(unquote(label)[-5:])


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(SourceError, match="there is no nowhere"):
        open_source(["nowhere"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        (
            f"{HEAD}, metadata: {{name: m}}, spec: {{source: {{model: m, version: 2}}}}}}",
            "put it in quotes",
        ),
        ("x", "'x' stands where apiVersion, kind"),
        ("- 1", r"\[1\] stands where"),
        (f"{HEAD}, spec: {{}}}}", "'metadata' is missing"),
        (f"{HEAD}, metadata: x, spec: {{}}}}", "metadata must hold fields, not 'x'"),
        (f"{HEAD}, metadata: {{name: m}}, spec: 5}}", "spec must hold fields, not 5"),
        (f"{HEAD}, metadata: {{name: 5}}, spec: {{source: {{model: m, version: '2'}}}}}}", "metadata.name 5"),
        (f"{HEAD}, metadata: {{name: {'m' * 51}}}, spec: {{source: {{model: m, version: '2'}}}}}}", "up to 50"),
    ],
)
def test_what_is_applied_and_is_none_is_said_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        ResourceFiles(tmp_path).apply(text)


def test_what_is_applied_again_takes_away_what_it_said_before_and_leaves_what_others_said(tmp_path: Path) -> None:
    files = ResourceFiles(tmp_path)
    text = f"{HEAD}, metadata: {{name: m}}, spec: {{replicas: 2, source: {{model: m, version: '1'}}}}}}"
    assert files.apply(text) == {"m": "created"}
    files.patch("m", {"spec": {"threshold": 0.7, "suspend": True}})
    assert files.apply(text) == {"m": "unchanged"}
    assert files.get("m")["spec"] == {
        "replicas": 2,
        "source": {"model": "m", "version": "1"},
        "threshold": 0.7,
        "suspend": True,
    }
    assert files.apply(text.replace("replicas: 2, ", "suspend: false, ")) == {"m": "configured"}
    body = files.get("m")
    assert body["spec"] == {"source": {"model": "m", "version": "1"}, "threshold": 0.7, "suspend": False}
    assert body["metadata"]["generation"] == 3


def test_the_environment_of_a_platform_with_tls_says_whom_to_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIGIL_TLS_CA_FILE", "ca.crt")
    where = dict.fromkeys(["ingest", "storage", "shadow", "inference"], "127.0.0.1:1")
    stack = MagicMock(folder=tmp_path, **{f"{part}_address": address for part, address in where.items()})
    write_environment(stack)
    lines = (tmp_path / "env").read_text().splitlines()
    assert f"export VIGIL_TLS_CA_FILE={tmp_path}/ca.crt" in lines
    assert "export VIGIL_ADDRESS=127.0.0.1:1" in lines


def test_status_says_why_a_rollout_stands_still_and_where_live_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ResourceFiles(tmp_path)
    monkeypatch.setattr(rollout, "_where", files)
    spec = "spec: {source: {model: cells, version: latest}}"
    files.apply(f"{HEAD}, metadata: {{name: first}}, {spec}}}\n---\n{HEAD}, metadata: {{name: second}}, {spec}}}")
    promoted = {"type": "Promoted", "status": "True", "reason": "Promoted", "message": "as asked for"}
    files.write_status("first", {"phase": "Live", "live": {"version": 1, "threshold": 0.7}, "conditions": [promoted]})
    synced = {"type": "Synced", "status": "False", "reason": "ModelTaken", "message": "first has model cells already"}
    files.write_status("second", {"phase": "Pending", "conditions": [synced]})
    shown = CliRunner().invoke(app, ["status"])
    every = shown.output
    assert (shown.exit_code, "no platform runs in" in every) == (1, True)
    assert "second: ModelTaken: first has model cells already" in every
    assert "first: " not in every
    assert "live decides at 0.7" in CliRunner().invoke(app, ["status", "first"]).output


def test_two_services_never_get_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been chosen is free until its owner listens; the other would take its place and pass for it."""
    free = iter([7001, 7001, 7001, 7002])
    monkeypatch.setattr("vigil_cli.local.stack.free_port", lambda _=0: next(free))
    stack = LocalStack(tmp_path)
    assert [stack._bind(name) for name in ("storage", "ingest")] == ["127.0.0.1:7001", "127.0.0.1:7002"]
