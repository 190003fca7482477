"""Publishing a large bundle beside bare reduct-py and the bare disk, and the memory that storage takes for it.

python -m tests.bench.publish [--megabytes 1000] [--rounds 3] [--folder DIR]

All three write the same bytes to the same disk, in alternating rounds. A publication counts until it is answered: sent,
checked, stored, and looked at once more after the store can't lose it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from reduct import Client
from vigil_cli.local.stack import LocalStack
from vigil_client import StorageClient
from vigil_common.bundle import MANIFEST, Artefact, Manifest, ModelOutputs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODEL_PATH = "onnx/model.onnx"
CHUNK_BYTES = 1 << 20
MB = 1_000_000


def write_bundle(path: Path, megabytes: int, seed: bytes) -> None:
    """A bundle whose artefact is noise, written without ever being in memory as a whole."""
    manifest = Manifest(
        name="large",
        artefacts={"onnxruntime": Artefact(path=MODEL_PATH, files=(MODEL_PATH,))},
        outputs=ModelOutputs(score="pred_score"),
        lineage={"seed": seed.hex()},
    )
    text = yaml.safe_dump(manifest.model_dump(mode="json", exclude_none=True)).encode()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(MODEL_PATH)
        member.size = megabytes * MB
        tar.addfile(member, _Noise(seed))  # type: ignore[arg-type]  # only read
        member = tarfile.TarInfo(MANIFEST)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))


class _Noise:
    def __init__(self, seed: bytes) -> None:
        self._block = seed + os.urandom(CHUNK_BYTES)

    def read(self, size: int) -> bytes:
        return (self._block * (size // len(self._block) + 1))[:size]


def peak_mb(pid: int) -> float:
    """The most memory a process has had so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def reset_peak(pid: int) -> float:
    """Forget the peak; gives what the process has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mb(pid)


async def _bare(url: str, path: Path, number: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    async with Client(url, timeout=None) as client:
        bucket = await client.create_bucket("bench-bare", exist_ok=True)
        await bucket.write("bundle", chunks(), timestamp=number, content_length=path.stat().st_size)


def _disk(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(CHUNK_BYTES):
            write.write(chunk)
        write.flush()
        os.fsync(write.fileno())
    target.unlink()


async def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, object]:
    """Rates in MB/s (medians over the rounds), and by how many MB storage grew at most."""
    rates: dict[str, list[float]] = {"publish": [], "bare": [], "disk": []}
    growth: list[float] = []
    async with LocalStack(folder / "stack") as stack, StorageClient(stack.storage_address) as storage:
        pid = stack.pid("storage")
        if pid is None:
            raise RuntimeError("storage is not running")
        for number in range(1, rounds + 1):
            path = folder / "large.tar"
            write_bundle(path, megabytes, number.to_bytes(8, "big"))
            size = path.stat().st_size / MB
            before = reset_peak(pid)
            for name, found_rates in rates.items():
                began = time.perf_counter()
                if name == "publish":
                    await storage.models_publish(path)
                elif name == "bare":
                    await _bare(stack.store_url, path, number)
                else:
                    await asyncio.to_thread(_disk, path, folder / "copy")
                found_rates.append(size / (time.perf_counter() - began))
                if name == "publish":
                    growth.append(peak_mb(pid) - before)
    found: dict[str, object] = {f"{name}_mb_s": round(statistics.median(rate), 1) for name, rate in rates.items()}
    ratio = statistics.median(rates["publish"]) / statistics.median(rates["bare"])
    return {"megabytes": megabytes, **found, "of_bare": round(ratio, 2), "storage_grew_mb": round(max(growth), 1)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = asyncio.run(measure(Path(folder), options.megabytes, options.rounds))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
