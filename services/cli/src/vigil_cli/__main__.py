"""Entry points: `vigil`, in the image `python -m vigil_cli`, and `kubectl vigil`.

Ctrl-C while the rest is still being loaded ends them as quietly as later.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vigil_cli import INTERRUPTED


def main() -> None:
    """Run a command of `vigil`."""
    with _quietly_interrupted():
        from vigil_cli.main import app  # noqa: PLC0415 - see above
    app()


def kubectl() -> None:
    """Run a command of `kubectl vigil`."""
    with _quietly_interrupted():
        from vigil_cli.rollout import kubectl as app  # noqa: PLC0415 - see above
    app()


@contextmanager
def _quietly_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
