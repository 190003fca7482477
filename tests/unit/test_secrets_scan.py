from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.support.secrets_scan import secrets_in, tracked

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "line",
    [
        "-----BEGIN " + "RSA PRIVATE KEY-----",
        "aws = AKIA" + "IOSFODNN7ABCDEFG",
        f"token = '{secrets.token_urlsafe(32)}'",
        f'"password": "{secrets.token_urlsafe(32)}"',
        "url: redis://vigil:" + "hunter2hunter2@valkey:6379",
        "ghp_" + "a1B2" * 9,
    ],
)
def test_a_secret_is_found(line: str) -> None:
    assert [number for number, _ in secrets_in(f"a line\n{line}\n")] == [2]


@pytest.mark.parametrize("line", ["token: str | None = None", 'token="a" * 40', "VIGIL_TOKEN_FILE=/run/secrets/token"])
def test_what_only_speaks_of_secrets_is_none(line: str) -> None:
    assert list(secrets_in(line)) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_holds_a_secret() -> None:
    assert not [(path, *found) for path in tracked(ROOT) for found in secrets_in(path.read_text(errors="replace"))]
