"""What one client may ask for, so that it can't crowd out the others: calls at once, frames and bytes a second."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vigil_common.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A client may use this much of its rate at once.
BURST_S = 2.0
# Clients remembered; one that has been quiet for a burst may be forgotten without loss.
MAX_CLIENTS = 10_000
RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Limits of one client, and of all together.

    Attributes:
        calls: Calls of a client at once, streams among them.
        frames_per_s: Frames of a client; 0 for any number.
        bytes_per_s: Image bytes of a client; 0 for any number.
        held_bytes: Image bytes of all clients on their way into the queue.
        refused_per_s: Bad frames of a client that are answered at once; the answers to more of them wait, and with
            them the client's window. Refusing costs as much as accepting.
    """

    calls: int = 1024
    frames_per_s: float = 0.0
    bytes_per_s: float = 0.0
    held_bytes: int = 512 << 20
    refused_per_s: float = 50.0


@dataclass(slots=True)
class _Spent:
    """When a client will have made up for what it used."""

    frames_until: float = 0.0
    bytes_until: float = 0.0
    refusals_until: float = 0.0

    @property
    def until(self) -> float:
        """When all of it is made up for."""
        return max(self.frames_until, self.bytes_until, self.refusals_until)


class Clients:
    """Counts for each client.

    Args:
        limits: See `ClientLimits`.
        clock: Seconds, monotonic.
    """

    def __init__(self, limits: ClientLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._calls: Counter[str] = Counter()
        self._spent: dict[str, _Spent] = {}
        self._held_bytes = 0

    @contextmanager
    def call(self, client: str) -> Iterator[None]:
        """A call under way; `QueueFull` TOO_MANY_CALLS where the client has enough of them."""
        if self._calls[client] >= self._limits.calls:
            raise QueueFull(
                "TOO_MANY_CALLS", f"{self._limits.calls} calls of yours are under way", retry_after_s=RETRY_AFTER_S
            )
        self._calls[client] += 1
        try:
            yield
        finally:
            self._calls[client] -= 1
            if not self._calls[client]:
                del self._calls[client]

    @contextmanager
    def frame(self, client: str, image_bytes: int) -> Iterator[None]:
        """A frame on its way into the queue.

        Raises:
            QueueFull: RATE_LIMITED with the delay after which it will pass, INGEST_BUSY.
        """
        if self._held_bytes + image_bytes > self._limits.held_bytes:
            raise QueueFull("INGEST_BUSY", "too many images are on their way at once", retry_after_s=RETRY_AFTER_S)
        self._spend(client, image_bytes)
        self._held_bytes += image_bytes
        try:
            yield
        finally:
            self._held_bytes -= image_bytes

    def _spend(self, client: str, image_bytes: int) -> None:
        limits, now = self._limits, self._clock()
        if not limits.frames_per_s and not limits.bytes_per_s:
            return
        spent = self._of(client, now)
        wait_s = max(spent.frames_until, spent.bytes_until) - now - BURST_S
        if wait_s > 0:
            what = f"{limits.frames_per_s:g} frames/s" if limits.frames_per_s else ""
            what += f" {limits.bytes_per_s:g} bytes/s" if limits.bytes_per_s else ""
            raise QueueFull("RATE_LIMITED", f"you may send {what.strip()}; slow down", retry_after_s=max(wait_s, 0.05))
        if limits.frames_per_s:
            spent.frames_until = max(spent.frames_until, now) + 1 / limits.frames_per_s
        if limits.bytes_per_s:
            spent.bytes_until = max(spent.bytes_until, now) + image_bytes / limits.bytes_per_s

    def refusal_delay_s(self, client: str) -> float:
        """Count a bad frame of a client; how long its answer waits."""
        if not self._limits.refused_per_s:
            return 0.0
        now = self._clock()
        spent = self._of(client, now)
        delay_s = max(0.0, spent.refusals_until - now - BURST_S)
        spent.refusals_until = max(spent.refusals_until, now) + 1 / self._limits.refused_per_s
        return delay_s

    def _of(self, client: str, now: float) -> _Spent:
        spent = self._spent.get(client)
        if spent is None:
            self._forget(now)
            spent = self._spent[client] = _Spent()
        return spent

    def _forget(self, now: float) -> None:
        if len(self._spent) >= MAX_CLIENTS:
            self._spent = {name: spent for name, spent in self._spent.items() if spent.until > now}
