"""A large bundle goes through storage, and storage stays small."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vigil_cli.local.stack import LocalStack
from vigil_client import StorageClient

from tests.bench.publish import peak_mb, reset_peak, write_bundle

if TYPE_CHECKING:
    from pathlib import Path

MOST_MB = 64


async def test_storage_holds_a_fraction_of_a_large_bundle_going_in_and_coming_out(tmp_path: Path) -> None:
    path, fetched = tmp_path / "large.tar", tmp_path / "fetched.tar"
    write_bundle(path, 250, b"seed")
    async with LocalStack(tmp_path / "stack") as stack, StorageClient(stack.storage_address) as storage:
        pid = stack.pid("storage")
        assert pid is not None
        before = reset_peak(pid)
        model = await storage.models_publish(path)
        assert (model.name, model.version, model.size_bytes) == ("large", 1, path.stat().st_size)
        assert peak_mb(pid) - before < MOST_MB
        await storage.models_save("large", 1, fetched)
        assert peak_mb(pid) - before < MOST_MB
    assert digest(fetched) == digest(path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
