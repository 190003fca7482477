"""Secrets in tracked files: `python -m tests.support.secrets_scan`, part of `make check`; works offline.

A line that shows a secret's form on purpose says so by ending in `no secret`.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS = {
    "private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})"),
    "Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "password in a URL": re.compile(r"\b[a-z][a-z0-9+]*://[^\s/:@{}$<]*:(?!PASSWORD|secret@)[^\s/@{}$<]{6,}@"),
}
ASSIGNED = re.compile(
    r"""(?i)(?:password|passwd|secret|token|api_?key)["']?\s*[:=]\s*["']([A-Za-z0-9+/_=-]{20,})["']"""
)
# Random base64 has about 5.5 bits a character of 32, English and names under 3.5.
LEAST_ENTROPY_BITS = 3.8
ALLOWED = "no secret"
TOO_LARGE_BYTES = 2 << 20


def entropy_bits(text: str) -> float:
    """Of a character of this text, as its own letters come in it."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())


def secrets_in(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and what stands there."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.rstrip().endswith(ALLOWED):
            continue
        for name, form in FORMS.items():
            if form.search(line):
                yield number, name
        if (found := ASSIGNED.search(line)) and entropy_bits(found[1]) > LEAST_ENTROPY_BITS:
            yield number, "a random value assigned to a secret's name"


def tracked(folder: Path) -> Iterator[Path]:
    """Files that git keeps."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, check=True, capture_output=True).stdout
    for name in listed.split(b"\0"):
        path = folder / name.decode()
        if name and path.is_file() and path.stat().st_size <= TOO_LARGE_BYTES:
            yield path


def main() -> int:
    """Print each; 1 where there is any."""
    found = [
        f"{path}:{number}: {what}"
        for path in tracked(Path())
        for number, what in secrets_in(path.read_text(errors="replace"))
    ]
    print("\n".join(found) or "secrets: none")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
