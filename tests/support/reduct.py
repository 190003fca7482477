"""A real ReductStore for tests: VIGIL_REDUCT_BINARY, the PATH, or the cache folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "1.21.5"
START_DEADLINE_S = 20.0


def find_binary() -> str | None:
    """Where the server is; None where it is not installed."""
    cached = Path.home() / ".cache" / "vigil" / f"reductstore-{VERSION}" / "bin" / "reductstore"
    named = os.environ.get("VIGIL_REDUCT_BINARY") or shutil.which("reductstore")
    return named or (str(cached) if cached.exists() else None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ReductServer:
    """One server on a folder; may be killed and started again."""

    def __init__(self, binary: str, folder: Path, token: str = "") -> None:
        self._binary = binary
        self._folder = folder
        self._access = {"RS_API_TOKEN": token} if token else {"RS_DISABLE_AUTH": "true"}
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "RS_DATA_PATH": str(self._folder),
            "RS_HOST": "127.0.0.1",
            "RS_PORT": str(self.port),
            **self._access,
            "RS_ENGINE_COMPACTION_INTERVAL": "1",
            "RS_RWLOCK_TIMEOUT": "5",
        }
        with (self._folder.parent / "reductstore.log").open("ab") as log:
            self._process = subprocess.Popen([self._binary], env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.alive():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"ReductStore did not start, see {self._folder.parent / 'reductstore.log'}")
            time.sleep(0.02)

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/alive", timeout=1) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End it without warning."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an orderly shutdown does."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None


@contextlib.contextmanager
def reduct_server(folder: Path, *, token: str = "") -> Iterator[ReductServer]:
    """A running server, open to everybody without a token; `RuntimeError` where there is no binary."""
    binary = find_binary()
    if binary is None:
        raise RuntimeError("no reductstore binary")
    server = ReductServer(binary, folder / "reduct", token)
    server.start()
    try:
        yield server
    finally:
        server.kill()
