"""Generates protos/gen from the .proto files, or with --check says whether it is up to date."""

from __future__ import annotations

import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
GENERATED = ROOT / "gen"
PACKAGES = ("vigil", "open_inference")


def generate(out: Path) -> None:
    """Run protoc with the Python, gRPC and mypy plugins into the folder."""
    well_known = str(files("grpc_tools") / "_proto")
    google_rpc = str(Path(status_pb2.__file__).parents[2])
    sources = sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{well_known}",
        f"-I{google_rpc}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed: its message above names the file and line to mend")
    for package in PACKAGES:
        (out / package / "py.typed").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Paths that are not the same on both sides."""

    def listing(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    names = listing(left) | listing(right)
    return sorted(
        name
        for name in names
        if not ((left / name).exists() and (right / name).exists())
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> None:
    """Entry point."""
    if "--check" not in sys.argv[1:]:
        shutil.rmtree(GENERATED, ignore_errors=True)
        generate(GENERATED)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if stale := differences(Path(folder), GENERATED):
            sys.exit(f"generated code is not up to date, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
