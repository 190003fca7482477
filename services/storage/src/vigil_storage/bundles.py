"""What publishing needs to know of a bundle."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

from vigil_common.bundle import MANIFEST, open_bundle


@dataclass(frozen=True, slots=True)
class Inspected:
    """Name of the model, runtimes it has artefacts for, and the text of vigil.yaml."""

    name: str
    formats: tuple[str, ...]
    manifest: str


def inspect(bundle: bytes) -> Inspected:
    """Validate a bundle; raises `InvalidBundle`."""
    opened = open_bundle(bundle)
    formats = tuple(sorted(str(runtime) for runtime in opened.manifest.artefacts))
    with tarfile.open(fileobj=io.BytesIO(bundle)) as tar:
        text = tar.extractfile(MANIFEST)
        return Inspected(opened.manifest.name, formats, text.read().decode() if text else "")
