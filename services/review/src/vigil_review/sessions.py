"""Who is logged in: kept in this process, so that a token never leaves it; a restart asks people to log in again."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vigil_review import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 1_000


@dataclass(slots=True)
class Session:
    """One person's login.

    Attributes:
        name: How they call themselves.
        token: What storage is asked with; empty where it asks for none.
        csrf: Every form must bring it.
        seen_at: When they last clicked, in seconds.
        waiting: Frames they were given and have not looked at, by model: id, camera and why.
        notice: Shown on the next page.
    """

    name: str
    token: str = field(repr=False)
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    seen_at: float = 0.0
    waiting: dict[str, deque[tuple[str, str, str]]] = field(default_factory=dict)
    notice: str = ""

    def owns(self, csrf: str) -> bool:
        """Whether a form came from one of this session's pages."""
        return hmac.compare_digest(csrf.encode(), self.csrf.encode())


class Sessions:
    """Sessions by a secret in a cookie; the one not seen for longest gives way.

    Args:
        ttl_s: How long one lasts without a click.
        clock: Seconds, monotonic.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: OrderedDict[str, Session] = OrderedDict()

    def begin(self, name: str, token: str) -> str:
        """Log somebody in; the cookie's value."""
        key = secrets.token_urlsafe(32)
        self._known[key] = Session(name, token, seen_at=self._clock())
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        metrics.SESSIONS.set(len(self._known))
        return key

    def get(self, key: str) -> Session | None:
        """Who has this cookie; None where nobody has, or not any more."""
        session = self._known.get(key)
        if session is None:
            return None
        if self._clock() - session.seen_at > self._ttl_s:
            self.end(key)
            return None
        session.seen_at = self._clock()
        self._known.move_to_end(key)
        return session

    def end(self, key: str) -> None:
        """Log out."""
        self._known.pop(key, None)
        metrics.SESSIONS.set(len(self._known))
