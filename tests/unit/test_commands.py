"""What the commands say to what makes no sense."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from vigil_cli.main import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "words",
    [
        ["model", "show", "cells", "--version", "-1"],
        ["model", "promote", "cells", "--version", "18446744073709551615"],
        ["frames", "query", "cells", "--version", "0"],
        ["frames", "query", "cells", "--since", "0001-01-01"],
        ["shadow", "start", "cells", "--version", "-1"],
    ],
)
def test_a_number_or_time_that_can_not_be_is_refused_before_anybody_is_asked(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("words", [["annotate", "f1", "--label", "normal"], ["review"]])
def test_a_user_without_a_login_is_asked_for_a_name(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr(getpass, "getuser", nobody)
    result = CliRunner().invoke(app, [*words, "-m", "cells"])
    assert result.exit_code == 2, result.output
    assert "--author" in result.output


async def test_the_local_platform_ends_by_ctrl_c_while_it_is_still_coming_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {**os.environ, "VIGIL_REDUCT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        command = [sys.executable, "-m", "vigil_cli", "local", "up", "--folder", str(tmp_path)]
        up = await asyncio.create_subprocess_exec(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert up.stdout is not None
        async with asyncio.timeout(60):
            await up.stdout.readline()
            up.send_signal(signal.SIGINT)
            said = (await up.communicate())[0].decode()
    assert up.returncode == 130, said
    assert "Traceback" not in said
