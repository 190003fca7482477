"""The platform as processes, every way between them through a link, its stores on disks that can be made full.

With libfaketime each process has a clock of its own, which can be put off while it runs; what it measures durations
with (the monotonic clock) goes on, as when a real clock is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigil_cli.local.stack import LocalStack, StackError

from tests.faults.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DISK_BYTES = 3 << 30
VALKEY, REDUCT = "valkey", "reductstore"
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class FaultyStack(LocalStack):
    """`LocalStack` with what can go wrong; `links` by "PART>STORE"."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.links: dict[str, Link] = {}
        self._failovers = 0

    def _add(self, name: str, command: list[str], env: dict[str, str]) -> None:
        if FAKETIME is not None:
            clock = self._clock(name)
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text("+0\n")
            env = {
                **env,
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        super()._add(name, command, env)

    def _clock(self, name: str) -> Path:
        return self.folder / "clocks" / name

    @property
    def clocks(self) -> list[str]:
        """The parts whose clocks can be put off."""
        return self.parts if FAKETIME is not None else []

    @contextlib.contextmanager
    def clock_off(self, name: str, seconds: float) -> Iterator[None]:
        """A part's clock jumps, and in the end back."""
        self._clock(name).write_text(f"{seconds:+g}\n")
        try:
            yield
        finally:
            self._clock(name).write_text("+0\n")

    def link(self, name: str, target: str) -> str:
        """The near end of a new link."""
        self.links[name] = Link(name, target)
        return self.links[name].address

    def _add_service(self, name: str, module: str, **settings: str) -> None:
        redis = self.link(f"{name}>valkey", self._bind(VALKEY))
        settings["REDIS_URL"] = f"redis://{redis}/0"
        if "storage" in name and self.store_url.startswith("http"):
            settings["STORE_URL"] = f"http://{self.link(f'{name}>reductstore', self._bind(REDUCT))}"
        super()._add_service(name, module, **settings)

    async def add_storage(self, name: str) -> None:
        """One more storage replica: the lease decides which of them writes."""
        self._add_service(name, "vigil_storage", STORAGE_BIND=self._bind(name))
        await self.start(name)

    @property
    def parts(self) -> list[str]:
        """Everything that runs."""
        return list(self._processes)

    async def revive(self, name: str) -> None:
        """Start a part, and again where it does not come up, as an orchestrator does."""
        while True:
            try:
                await self.start(name)
            except StackError:
                self.kill(name)
                await asyncio.sleep(1.0)
            else:
                return

    def ended(self, name: str) -> int | None:
        """How a part ended by itself; None while it runs."""
        return self._processes[name].returncode

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """SIGSTOP and SIGCONT to a part's group."""
        process = self._processes[name]
        process._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process._signal(signal.SIGCONT)

    async def failover(self) -> None:
        """A replica catches up and becomes the primary; who still talks to the old one is told so, then sent over."""
        self._failovers += 1
        old, old_port = self._processes[VALKEY], self._ports[VALKEY]
        folder = self.folder / f"valkey-{self._failovers}"
        folder.mkdir()
        del self._ports[VALKEY]
        port = int(self._bind(VALKEY).rpartition(":")[2])
        command = [str(port) if word == str(old_port) else word for word in old._command]
        command = [str(folder) if word == str(old._command[3]) else word for word in command]
        self._add(VALKEY, command, dict(os.environ))
        new = self._processes[VALKEY]
        new.start()
        await self._until(lambda: _ask(port, "PING").startswith("+PONG"))
        _ask(port, "REPLICAOF", "127.0.0.1", str(old_port))
        await self._until(lambda: "master_link_status:up" in _ask(port, "INFO", "replication"))
        # After a full copy its own log is written anew; until then it would come up empty.
        await self._until(lambda: _log_is_whole(_ask(port, "INFO", "persistence")))
        _ask(old_port, "FAILOVER", "TIMEOUT", "5000")
        await self._until(lambda: "role:master" in _ask(port, "INFO", "replication"))
        await asyncio.sleep(1.0)
        for name, link in self.links.items():
            if name.endswith(">valkey"):
                link.lead_to(f"127.0.0.1:{port}")
        self.redis_url = f"redis://127.0.0.1:{port}/0"
        old.kill()

    async def _until(self, condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
        async with asyncio.timeout(deadline_s):
            while True:
                with contextlib.suppress(OSError):
                    if await asyncio.to_thread(condition):
                        return
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Take everything down."""
        await super().close()
        for link in self.links.values():
            await link.close()


def _ask(port: int, *words: str) -> str:
    with socket.create_connection(("127.0.0.1", port), 2.0) as connection:
        connection.sendall("".join([f"*{len(words)}\r\n", *(f"${len(w)}\r\n{w}\r\n" for w in words)]).encode())
        return connection.recv(1 << 16).decode(errors="replace")


def _log_is_whole(info: str) -> bool:
    return all(
        f"{name}\r" in info for name in ("aof_enabled:1", "aof_rewrite_in_progress:0", "aof_rewrite_scheduled:0")
    )


class Disk:
    """A small file system of its own for a part's data.

    Raises:
        OSError: It can't be had here: only root mounts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs")

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self._folder)], check=False, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte more than there is."""
        found = os.statvfs(self._folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        self._mount("-o", f"remount,size={max(used, 4096)}")
        try:
            yield
        finally:
            self._mount("-o", f"remount,size={DISK_BYTES}")

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self._folder)], check=False)
