"""The cluster under test: KUBECONFIG's, or this project's own node, started and removed here.

VIGIL_E2E_KEEP=1 leaves node and release as they are, to look at. With KUBECONFIG, the images of VIGIL_E2E_REGISTRY and
VIGIL_E2E_TAG must be there for the cluster's nodes, as `make kind` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.cluster import node
from tests.e2e.tools import ROOT, Cluster, own_node, say
from tests.support.reduct import find_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

# `make e2e` says so: these tests take minutes, and a machine of their own.
collect_ignore = [] if os.environ.get("VIGIL_E2E") else ["test_platform.py", "test_values.py"]

TAG = os.environ.get("VIGIL_E2E_TAG", "e2e")
NEXT_TAG = f"{TAG}-next"
REGISTRY = os.environ.get("VIGIL_E2E_REGISTRY", "localhost")
OWN = "KUBECONFIG" not in os.environ


def image_settings(tag: str = TAG) -> list[str]:
    """Values that name the chart's images: ours, and on the own node its stand-ins for Valkey's and ReductStore's."""
    chosen = [f"image.registry={REGISTRY}", f"image.tag={tag}"]
    if OWN:
        for name in ("valkey", "reductstore"):
            chosen += [f"{name}.image.repository=localhost/vigil/{name}", f"{name}.image.tag={TAG}"]
    return chosen


def _build_images() -> None:
    command = [sys.executable, "images/build.py", "--builder", "node", "--tag", TAG]
    subprocess.run(command, check=True, cwd=ROOT)
    images = [f"localhost/vigil/{name}:{TAG}" for name in _packages()]
    binary = find_binary()
    assert binary is not None, "no ReductStore: run make reductstore"
    folder = ROOT / "out" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(binary, folder / "reductstore")
    for name in ("valkey", "redis", "reductstore"):
        image = f"localhost/vigil/{name}:{TAG}"
        node.build_image(["--quiet", "-f", str(ROOT / f"tests/e2e/images/{name}.Dockerfile"), "-t", image, str(folder)])
        images.append(image)
    for name in ("ingest", "storage", "shadow", "review", "operator", "inference"):
        following = f"localhost/vigil/{name}:{NEXT_TAG}"
        subprocess.run(["buildah", "tag", f"localhost/vigil/{name}:{TAG}", following], check=True)
        images.append(following)
    node.load(images)


def _packages() -> list[str]:
    text = subprocess.run(
        [sys.executable, "-c", "import runpy; print(*runpy.run_path('images/build.py')['packages']())"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return text.split()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Up, with the images at hand."""
    if not OWN:
        yield Cluster()
        return
    kept = os.environ.get("VIGIL_E2E_KEEP") == "1"
    if not kept:
        # A run that was killed leaves its node, and on its disk the releases that this one would meet.
        node.down()
    found = own_node()
    try:
        if not (kept and Path(node.DIR / "images-loaded").exists()):
            _build_images()
            Path(node.DIR / "images-loaded").touch()
        say(f"node up, images loaded: {', '.join(_packages())}, valkey, reductstore")
        yield found
    finally:
        if not kept:
            node.down()
