"""A bundle, verified, loaded, warmed up and proven on its parity samples."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from vigil_common.bundle import open_bundle
from vigil_common.errors import InvalidBundle
from vigil_common.pixels import Tensor, decode, to_tensor
from vigil_common.scores import moved

from vigil_inference.engine import Engine, Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from vigil_common.bundle import Artefact, Manifest, Runtime

WARM_UP_RUNS = 3
WARM_UP_SIZE = 256
PARITY_MAX_PIXELS = 50_000_000
# Turns in which two artefacts are timed, fewer where they take so long together.
TIMED_RUNS, FEWEST_TIMED_RUNS, TIMED_S = 15, 5, 1.5
# How far off a score may be for the images beside it: by the order of sums, no more.
ALONE_TOLERANCE = 1e-3
# Only what takes less than this share of the time so far is taken instead: less is noise.
ALIKE = 0.95


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artefact that could serve.

    Attributes:
        name: The runtime's, or the variant's.
        runtime: What loads it.
        artefact: Its files.
        precision: Asked of the runtime.
        threshold: Of its own scores, which are moved onto the bundle's; None leaves them.
        expected: Its parity scores and their tolerances, in the order of the bundle's samples.
    """

    name: str
    runtime: Runtime
    artefact: Artefact
    precision: str
    threshold: float | None
    expected: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Proven:
    """An artefact that is loaded, warm and holds its parity; times in seconds, threshold as in `Candidate`.

    `run_s` is what a run with pictures takes once it is warm.
    """

    artefact: str
    engine: Engine
    threshold: float | None
    parity: tuple[Parity, ...]
    load_s: float
    warm_up_s: float
    run_s: float


class LoadedModel:
    """One model version, ready to judge; `judge` is called by as many threads at a time as there may be runs.

    With several artefacts to choose from, "auto" loads, proves and times each on this node and keeps the fastest of
    those that hold their parity; `choice` says what each took. At most two are in memory at a time.

    Args:
        bundle: The tar.
        folder: Where to extract it; must be writable.
        expected_digest: Refuse any other.
        engine: "auto", "onnxruntime" or "openvino".
        threads: For one run.
        runs: How many may go on at a time.
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
        runs: int = 1,
        precision: str = "f32",
    ) -> None:
        opened = open_bundle(bundle, expected_digest=expected_digest)
        self.manifest = opened.manifest
        self.digest = opened.digest
        candidates = _candidates(opened.manifest, engine, precision)
        opened.extract(folder)
        self._threads, self._runs = threads, runs
        # One size serves for all that is timed.
        spec = self.manifest.input
        self._blank = np.zeros((1, 3, spec.height or WARM_UP_SIZE, spec.width or WARM_UP_SIZE), dtype=np.float32)
        self._samples = [to_tensor(decode(opened.files[sample.image], max_pixels=PARITY_MAX_PIXELS), spec)
                         for sample in self.manifest.parity]  # fmt: skip
        self.choice = ""
        self._proven: Proven | None = None
        if len(candidates) == 1:
            self._proven = self._prove(candidates[0], folder)
        else:
            self._choose(candidates, folder)
        self._samples.clear()

    def _choose(self, candidates: Sequence[Candidate], folder: Path) -> None:
        """Take the fastest that holds its parity; the order decides where two are alike."""
        took: dict[str, str] = {}
        refused: InvalidBundle | None = None
        for candidate in candidates:
            try:
                proven = self._prove(candidate, folder)
            except InvalidBundle as error:
                refused = refused or error
                took[candidate.name] = error.reason
                continue
            if self._proven is None:
                self._proven = proven
                continue
            runs_s = self._in_turn(self._proven, proven)
            for name, run_s in zip((self.artefact, proven.artefact), np.median(runs_s, axis=0), strict=True):
                took[name] = f"{run_s * 1000:.2f} ms"
            if np.median(runs_s[:, 1] / runs_s[:, 0]) < ALIKE:
                self._proven = proven
        if self._proven is None:
            assert refused is not None  # noqa: S101 - there is a candidate, and it was not taken
            raise refused
        notes = ", ".join(f"{name} {said}" for name, said in took.items())
        self.choice = f"{self.artefact} is the fastest here that holds its parity: {notes}"

    def _in_turn(self, *rivals: Proven) -> NDArray[np.float64]:
        """Seconds of one image's run [turns, 2]; in turn, because the speed of a node with other work drifts."""
        tensor = self._samples[0] if self._samples else self._blank
        runs_s: list[list[float]] = []
        began = time.perf_counter()
        while len(runs_s) < FEWEST_TIMED_RUNS or (len(runs_s) < TIMED_RUNS and time.perf_counter() - began < TIMED_S):
            runs_s.append([_timed(lambda: self._judge(rival, tensor, pictures=False)) for rival in rivals])  # noqa: B023 - run now
            faster = [second < first * ALIKE for first, second in runs_s]
            if len(runs_s) >= FEWEST_TIMED_RUNS and len(set(faster)) == 1:  # each turn says the same
                break
        return np.array(runs_s)

    def _prove(self, candidate: Candidate, folder: Path) -> Proven:
        """Load an artefact, warm it up, and hold it against its parity samples."""
        began = time.perf_counter()
        engine = _load(candidate, folder, self.manifest, threads=self._threads, runs=self._runs)
        load_s = time.perf_counter() - began
        loaded = Proven(candidate.name, engine, candidate.threshold, (), load_s, 0.0, 0.0)
        runs_s = [_timed(lambda: self._judge(loaded, self._blank, pictures=True)) for _ in range(WARM_UP_RUNS)]
        parity = []
        for sample, tensor, (expected, tolerance) in zip(
            self.manifest.parity, self._samples, candidate.expected, strict=True
        ):
            actual = float(self._judge(loaded, tensor, pictures=False).score[0])
            parity.append(Parity(sample.image, expected, actual, tolerance))
        if failed := [sample for sample in parity if not sample.passed]:
            first = failed[0]
            raise InvalidBundle(
                "PARITY_FAILED",
                f"{len(failed)} of {len(parity)} parity samples came out otherwise on {candidate.name}: "
                f"{first.sample} scored {first.actual:.6f} instead of {first.expected:.6f} ± {first.tolerance:g}",
            )
        return replace(loaded, parity=tuple(parity), warm_up_s=sum(runs_s), run_s=min(runs_s))

    @property
    def proven(self) -> Proven:
        """What serves."""
        assert self._proven is not None  # noqa: S101 - else this was not made
        return self._proven

    @property
    def engine(self) -> Engine:
        """What judges."""
        return self.proven.engine

    @property
    def artefact(self) -> str:
        """The runtime's name for the export itself, or the variant's."""
        return self.proven.artefact

    @property
    def parity(self) -> tuple[Parity, ...]:
        """How the bundle's samples came out."""
        return self.proven.parity

    def takes(self, count: int) -> bool:
        """Whether so many images of one run score as each alone; a graph may be frozen at one and not say so."""
        spec = self.manifest.input
        shape = (2, 3, spec.height or WARM_UP_SIZE, spec.width or WARM_UP_SIZE)
        two = np.random.default_rng(0).random(shape, dtype=np.float32)
        alone = np.concatenate([self.judge(two[index : index + 1], pictures=False).score for index in range(2)])
        try:
            together = self.judge(np.resize(two, (count, *shape[1:])), pictures=True).score
        except Exception:  # noqa: BLE001 - the runtime's own kinds
            return False
        expected = np.resize(alone, count)
        return together.shape == expected.shape and np.allclose(together, expected, rtol=0, atol=ALONE_TOLERANCE)

    def judge(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """Judge N images of one size; a graph frozen at a batch gets its size, padded with the last image."""
        return self._judge(self.proven, batch, pictures=pictures)

    def _judge(self, by: Proven, batch: Tensor, *, pictures: bool) -> Outputs:
        found = self._run(by.engine, batch, pictures=pictures)
        if by.threshold is None:
            return found
        return replace(found, score=moved(found.score, by.threshold, self.manifest.threshold))

    def _run(self, engine: Engine, batch: Tensor, *, pictures: bool) -> Outputs:
        frozen = self.manifest.fixed_batch
        if not frozen or len(batch) == frozen:
            return engine.run(batch, pictures=pictures)
        parts = []
        for start in range(0, len(batch), frozen):
            part = batch[start : start + frozen]
            padding = np.repeat(part[-1:], frozen - len(part), axis=0)
            full = np.concatenate([part, padding]) if len(padding) else part
            found = engine.run(full, pictures=pictures)
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


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _candidates(manifest: Manifest, engine: str, precision: str) -> list[Candidate]:
    """What may serve: the one artefact of the runtime asked for, or with "auto" every artefact and every variant."""
    found = [
        Candidate(
            name, name, artefact, precision, None, tuple((sample.score, sample.tolerance) for sample in manifest.parity)
        )
        for name, artefact in sorted(manifest.artefacts.items())
        if engine in {"auto", name}
    ]
    if not found:
        raise InvalidBundle(
            "ENGINE_MISSING", f"the bundle has no artefact for {engine}, only for {', '.join(manifest.artefacts)}"
        )
    if engine == "auto":
        for name, variant in manifest.variants.items():
            expected = tuple((score, variant.tolerance) for score in variant.scores)
            made = variant.runtime, variant.artefact, variant.precision, variant.threshold
            found.append(Candidate(name, *made, expected))
    return found


def _load(candidate: Candidate, folder: Path, manifest: Manifest, *, threads: int, runs: int) -> Engine:
    # Heavy imports happen for the engine that is used, and in the modules that name them.
    path = folder / candidate.artefact.path
    if candidate.runtime == "onnxruntime":
        from vigil_inference.onnx_engine import OnnxEngine  # noqa: PLC0415

        precision = "int8" if candidate.precision == "int8" else "f32"
        return OnnxEngine(path, manifest, threads=threads, precision=precision)
    from vigil_inference.openvino_engine import OpenVinoEngine  # noqa: PLC0415

    cache = folder / "compiled"
    return OpenVinoEngine(path, manifest, threads=threads, runs=runs, precision=candidate.precision, cache=cache)
