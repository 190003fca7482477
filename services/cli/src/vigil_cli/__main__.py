"""Entry point of the image: `python -m vigil_cli`."""

from vigil_cli.main import app

app()
