"""Entry point: `vigil`, and in the image `python -m vigil_cli`."""

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command; Ctrl-C while the rest is still being loaded ends it as quietly as later."""
    try:
        from vigil_cli.main import app  # noqa: PLC0415 - see above
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    app()


if __name__ == "__main__":
    main()
