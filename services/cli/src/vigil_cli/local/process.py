"""One child process that ends when its parent does, with its output in a file."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Asks the kernel to end the process with its parent, then becomes the command. Not a preexec_fn: forking a process that
# runs gRPC's threads crashes the child now and then.
_LAUNCHER = """
import ctypes, os, sys, time
parent, nice, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
# The parent may have died before the kernel was asked.
os.getppid() == parent or sys.exit("parent is gone")
os.nice(int(nice))
# Where the kernel shares the processor out between sessions, niceness counts inside of one alone. Who is not root may
# change a session's ten times a second, all together.
group = "/proc/self/autogroup"
for _ in range(10 if int(nice) and os.path.exists(group) else 0):
    try:
        with open(group, "w") as file:
            file.write(nice)
        break
    except OSError:
        time.sleep(0.11)
os.execvp(command[0], command)
"""


def free_port(wanted: int = 0) -> int:
    """A port that was free a moment ago: the one wanted where it is, else any."""
    with socket.socket() as found:
        # As servers do, so that a port whose connections have just ended counts as free.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", wanted))
        except OSError:
            found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Process:
    """A named command that can be started, stopped, killed and started again, in a process group of its own.

    Args:
        name: For people and the log's name.
        command: Program and arguments.
        log: Where its output is appended.
        env: Its whole environment.
        nice: How far it stands back for others where the processor is short, 0 to 19.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str], nice: int = 0) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._env = dict(env)
        self._nice = nice
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs or before its start."""
        return self._popen.poll() if self._popen is not None else None

    def start(self) -> None:
        """Start it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, "-ISc", _LAUNCHER, str(os.getpid()), str(self._nice), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        atexit.register(self.kill)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ask it to end, and kill it where it doesn't within the time."""
        if self.pid is not None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while self.pid is not None:  # noqa: ASYNC110 - the system tells by waitpid, not by an event
                        await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to its whole group."""
        if self._popen is not None:
            self._signal(signal.SIGKILL)
            self._popen.wait()
            self._popen = None
        atexit.unregister(self.kill)

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        if not self.log.exists():
            return "(no output)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) or "(no output)"

    def _signal(self, number: signal.Signals) -> None:
        # Until `wait` its id can't be another's, so its group is still ours.
        if self._popen is not None and self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)
