"""Who changed what: one line in the log for each publication, promotion and annotation.

The line's event is "audit"; `by` is the name of the caller's token, never the token.
"""

from __future__ import annotations

from vigil_common.access import principal
from vigil_common.logging import get_logger

log = get_logger()


def audit(action: str, *, model: str, by: str | None = None, **facts: str | float | None) -> None:
    """Write down that something was changed.

    Args:
        action: In the past tense, such as "published".
        model: Whose.
        by: Who did it, where that is not the call under way's principal.
        facts: What else tells it from others, such as the version.
    """
    log.info("audit", action=action, by=by or principal().name, model=model, **facts)
