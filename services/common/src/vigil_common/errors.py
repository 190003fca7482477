"""Every error that Vigil answers with, as one tree.

    VigilError
    ├── InvalidInput        INVALID_ARGUMENT      the caller must change the request
    │   └── InvalidBundle   INVALID_ARGUMENT      a bundle that can't be trusted or run
    ├── Unauthenticated     UNAUTHENTICATED       no token, or one that nobody knows
    ├── Forbidden           PERMISSION_DENIED     a token that may not do this
    ├── NotFound            NOT_FOUND             no such model, version or frame
    ├── Conflict            ALREADY_EXISTS        the name, version or id is taken
    ├── NotLive             FAILED_PRECONDITION   the version asked for is not serving
    ├── QueueFull           RESOURCE_EXHAUSTED    try again after `retry_after_s`
    ├── VerdictTimeout      DEADLINE_EXCEEDED     accepted, but not judged in time
    ├── Unavailable         UNAVAILABLE           a part that this needs is away; try again
    └── DataLost            DATA_LOSS             what was stored is not what was written

Each carries a `reason` in capitals (google.rpc.ErrorInfo, domain "vigil.dev") for programs, and a sentence for people.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "vigil.dev"


class VigilError(Exception):
    """Base of all.

    Args:
        reason: What went wrong, in capitals with underscores; programs branch on it.
        message: The same as a sentence that says what to do.
        retry_after_s: Where trying again helps: after how many seconds.
        metadata: Short facts, such as the limit that was passed.
    """

    status: ClassVar[str] = "INTERNAL"

    def __init__(
        self, reason: str, message: str, *, retry_after_s: float | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata = metadata or {}


class InvalidInput(VigilError):
    """The request must change."""

    status = "INVALID_ARGUMENT"


class InvalidBundle(InvalidInput):
    """The bundle can't be trusted or run."""


class Unauthenticated(VigilError):
    """No token, or one that nobody knows."""

    status = "UNAUTHENTICATED"


class Forbidden(VigilError):
    """The token may not do this."""

    status = "PERMISSION_DENIED"


class NotFound(VigilError):
    """No such model, version or frame."""

    status = "NOT_FOUND"


class Conflict(VigilError):
    """The name, version or id is taken."""

    status = "ALREADY_EXISTS"


class Managed(VigilError):
    """Something else decides this, and would undo it."""

    status = "FAILED_PRECONDITION"


class NotLive(VigilError):
    """The version asked for is not serving."""

    status = "FAILED_PRECONDITION"


class QueueFull(VigilError):
    """The queue has no room now."""

    status = "RESOURCE_EXHAUSTED"


class VerdictTimeout(VigilError):
    """Accepted, but not judged in time."""

    status = "DEADLINE_EXCEEDED"


class Unavailable(VigilError):
    """A part that this needs is away."""

    status = "UNAVAILABLE"


class DataLost(VigilError):
    """What was stored is not what was written."""

    status = "DATA_LOSS"
