"""A bundle, verified, loaded, warmed up and proven on its parity samples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from vigil_common.bundle import Bundle, open_bundle
from vigil_common.errors import InvalidBundle
from vigil_common.pixels import Tensor, decode, to_tensor

from vigil_inference.engine import Engine, Outputs

if TYPE_CHECKING:
    from pathlib import Path

WARM_UP_RUNS = 3
WARM_UP_SIZE = 256
PARITY_MAX_PIXELS = 50_000_000


@dataclass(frozen=True, slots=True)
class Parity:
    """How one parity sample came out."""

    sample: str
    expected: float
    actual: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Within tolerance; never for a score that is no number."""
        return abs(self.actual - self.expected) <= self.tolerance


class LoadedModel:
    """One model version, ready to judge; `judge` is called by one thread at a time.

    Args:
        bundle: The tar.
        folder: Where to extract it; must be writable.
        expected_digest: Refuse any other.
        engine: "auto", "onnxruntime" or "openvino".
        threads: For one run.
        precision: "f32" or "bf16".

    Raises:
        InvalidBundle: As `open_bundle`; ENGINE_MISSING, MODEL_UNLOADABLE, BUNDLE_OUTPUT_MISSING, PARITY_FAILED.
    """

    def __init__(
        self,
        bundle: bytes,
        folder: Path,
        *,
        expected_digest: str | None = None,
        engine: str = "auto",
        threads: int = 1,
        precision: str = "f32",
    ) -> None:
        began = time.perf_counter()
        opened = open_bundle(bundle, expected_digest=expected_digest)
        self.manifest = opened.manifest
        self.digest = opened.digest
        self.engine = _load(opened, folder, engine, threads, precision)
        self.load_s = time.perf_counter() - began
        began = time.perf_counter()
        spec = self.manifest.input
        blank = np.zeros((1, 3, spec.height or WARM_UP_SIZE, spec.width or WARM_UP_SIZE), dtype=np.float32)
        for _ in range(WARM_UP_RUNS):
            self.judge(blank, pictures=True)
        self.warm_up_s = time.perf_counter() - began
        self.parity = [
            Parity(sample.image, sample.score, self._score(opened.files[sample.image]), sample.tolerance)
            for sample in self.manifest.parity
        ]
        if failed := [sample for sample in self.parity if not sample.passed]:
            first = failed[0]
            raise InvalidBundle(
                "PARITY_FAILED",
                f"{len(failed)} of {len(self.parity)} parity samples came out otherwise on {self.engine.name}: "
                f"{first.sample} scored {first.actual:.6f} instead of {first.expected:.6f} ± {first.tolerance:g}",
            )

    def _score(self, image: bytes) -> float:
        tensor = to_tensor(decode(image, max_pixels=PARITY_MAX_PIXELS), self.manifest.input)
        return float(self.judge(tensor, pictures=False).score[0])

    def judge(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """Judge N images of one size; a graph frozen at a batch gets its size, padded with the last image."""
        frozen = self.manifest.fixed_batch
        if not frozen or len(batch) == frozen:
            return self.engine.run(batch, pictures=pictures)
        parts = []
        for start in range(0, len(batch), frozen):
            part = batch[start : start + frozen]
            padding = np.repeat(part[-1:], frozen - len(part), axis=0)
            full = np.concatenate([part, padding]) if len(padding) else part
            found = self.engine.run(full, pictures=pictures)
            keep = len(part)
            parts.append(
                Outputs(
                    found.score[:keep],
                    None if found.map is None else found.map[:keep],
                    None if found.mask is None else found.mask[:keep],
                )
            )
        if len(parts) == 1:
            return parts[0]
        maps = [part.map for part in parts if part.map is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return Outputs(
            np.concatenate([part.score for part in parts]),
            np.concatenate(maps) if maps else None,
            np.concatenate(masks) if masks else None,
        )


def _load(bundle: Bundle, folder: Path, engine: str, threads: int, precision: str) -> Engine:
    """The engine asked for, or the first that the bundle has an artefact for."""
    artefacts = bundle.manifest.artefacts
    # Heavy imports happen for the engine that is used, and in the modules that name them.
    wanted = [engine] if engine != "auto" else ["onnxruntime", "openvino"]
    name = next((name for name in wanted if name in artefacts), None)
    if name is None:
        raise InvalidBundle(
            "ENGINE_MISSING", f"the bundle has no artefact for {' or '.join(wanted)}, only for {', '.join(artefacts)}"
        )
    bundle.extract(folder)
    if name == "onnxruntime":
        from vigil_inference.onnx_engine import OnnxEngine  # noqa: PLC0415

        return OnnxEngine(folder / artefacts["onnxruntime"].path, bundle.manifest, threads=threads)
    from vigil_inference.openvino_engine import OpenVinoEngine  # noqa: PLC0415

    path = folder / artefacts["openvino"].path
    return OpenVinoEngine(path, bundle.manifest, threads=threads, precision=precision, cache=folder / "compiled")
