"""Where a ReductStore can be had: a running one, a binary, the official release, else the embedded store."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

VERSION = "1.21.5"
_ASSET = "reductstore.x86_64-unknown-linux-gnu.tar.gz"
_RELEASE_URL = f"https://github.com/reductstore/reductstore/releases/download/v{VERSION}/{_ASSET}"
_API_URL = f"https://api.github.com/repos/reductstore/reductstore/releases/tags/v{VERSION}"
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Store:
    """Which store to use.

    Attributes:
        url: Set where one is running or none needs to.
        binary: Set where ReductStore has to be started.
        description: For people: what it is, and how to get the real one where it isn't.
    """

    url: str | None
    binary: Path | None
    description: str


def cached_binary() -> Path:
    """Where `make reductstore` and the download put the server."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vigil" / f"reductstore-{VERSION}" / "bin" / "reductstore"


def find_store(folder: Path) -> Store:
    """The best store to be had now; may download for a few seconds.

    Args:
        folder: Where the embedded store would keep its files.
    """
    if url := os.environ.get("VIGIL_REDUCT_URL"):
        return Store(url, None, f"ReductStore at {url} (VIGIL_REDUCT_URL)")
    if named := os.environ.get("VIGIL_REDUCT_BINARY"):
        return Store(None, Path(named), f"ReductStore {named} (VIGIL_REDUCT_BINARY)")
    if found := shutil.which("reductstore"):
        return Store(None, Path(found), f"ReductStore {found} (PATH)")
    cached = cached_binary()
    if cached.exists():
        return Store(None, cached, f"ReductStore {VERSION} {cached} (cache)")
    try:
        _download(cached)
    except (OSError, ValueError, tarfile.TarError) as error:
        why = f"{type(error).__name__}: {error}"
        text = f"embedded store in {folder} (no ReductStore: {why}); `make reductstore` builds the real one"
        return Store(f"file://{folder.absolute()}", None, text)
    return Store(None, cached, f"ReductStore {VERSION} {cached} (official release)")


def _download(target: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError("the official release is fetched for x86_64 Linux only")
    with urllib.request.urlopen(_API_URL, timeout=_TIMEOUT_S) as answer:
        assets = json.load(answer)["assets"]
    digest = next((asset.get("digest") for asset in assets if asset["name"] == _ASSET), None)
    if not digest:
        raise ValueError("GitHub states no digest for the release, so it can't be verified")
    with urllib.request.urlopen(_RELEASE_URL, timeout=_TIMEOUT_S) as answer:
        archive = answer.read()
    if f"sha256:{hashlib.sha256(archive).hexdigest()}" != digest:
        raise ValueError("the release is not what its digest says")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = next((found for found in tar if Path(found.name).name == "reductstore" and found.isfile()), None)
        body = tar.extractfile(member) if member is not None else None
        if body is None:
            raise ValueError("the release holds no reductstore")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        part.write_bytes(body.read())
        part.chmod(0o755)
        part.replace(target)
