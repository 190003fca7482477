"""Builds Vigil's images, prints their sizes, and writes what is in each as CycloneDX.

    python images/build.py [--tag TAG] [--prefix REGISTRY/PREFIX] [--builder docker|buildah|node] [PACKAGE…]

Without --builder: Docker where its daemon answers, else `node`: buildah as the tests' own cluster runs it, on a base
image made of Debian's packages, for machines that reach no image registry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = "docker.io/library/python:3.11-slim-bookworm"
# Over the base image, in MB.
LIMITS_MB = {"ingest": 150, "storage": 150, "shadow": 150, "review": 150, "operator": 150, "inference": 500, "cli": 500}
_UNITS = {"B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3}


def packages() -> list[str]:
    """Those of the limits that this tree has."""
    return [name for name in LIMITS_MB if (ROOT / "services" / name).exists() or (ROOT / name / "src").exists()]


def builder() -> str:
    """What this machine can build with."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:  # noqa: S607
        return "docker"
    return "node"


def build(how: str, arguments: list[str]) -> None:
    """Run one build."""
    commands = {
        "docker": ["docker", "build", "--quiet"],
        "buildah": ["buildah", "build", "--quiet", "--layers"],
        "node": [sys.executable, "-m", "tests.e2e.cluster", "build", "--quiet"],
    }
    subprocess.run([*commands[how], *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603


def size_mb(how: str, image: str) -> float:
    """As the builder tells it."""
    if how == "docker":
        told = _output("docker", "image", "inspect", "--format", "{{.Size}}", image)
        return int(told) / 1e6
    number, unit = _output("buildah", "images", "--format", "{{.Size}}", image).splitlines()[0].split()
    return float(number) * _UNITS[unit.upper()]


def bill_of_materials(package: str, target: Path) -> None:
    """CycloneDX, from the lock that the image is built from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    uv = os.environ.get("UV") or shutil.which("uv") or "uv"
    command = [uv, "export", "--frozen", "--no-dev", "--format", "cyclonedx1.5"]
    text = subprocess.run(  # noqa: S603
        [*command, "--package", f"vigil-{package}"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    target.write_text(json.dumps(json.loads(text), indent=1) + "\n")


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def main() -> None:
    """Build all or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="0.1.0")
    parser.add_argument("--prefix", default="localhost/vigil")
    parser.add_argument("--builder", choices=("docker", "buildah", "node"))
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(packages())}; all if none")
    chosen = parser.parse_args()
    how = chosen.builder or builder()
    if how == "node":
        subprocess.run([sys.executable, "-m", "tests.e2e.cluster", "base"], check=True, cwd=ROOT)
    too_large = []
    for package in chosen.packages or packages():
        image = f"{chosen.prefix}/{package}:{chosen.tag}"
        build(how, ["-f", "Dockerfile", "--build-arg", f"PACKAGE={package}", "-t", image, "."])
        bill_of_materials(package, ROOT / "out" / "images" / f"{package}.cdx.json")
        over_mb = size_mb(how, image) - size_mb(how, BASE)
        print(f"{image:42} {over_mb:6.0f} MB over the base image, at most {LIMITS_MB[package]}", flush=True)
        if over_mb > LIMITS_MB[package]:
            too_large.append(package)
    if too_large:
        sys.exit(f"too large: {', '.join(too_large)}")


if __name__ == "__main__":
    main()
