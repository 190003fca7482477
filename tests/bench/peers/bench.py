"""Vigil beside what people would use instead: the same graph, images, cores and requests in flight, taking turns.

    python -m tests.bench.peers.bench [--seconds 4] [--rounds 3] [--minutes 24] [--in-flight 1 8 64] [--peers ...]

In each round every server runs alone, started for it, in an order that turns. Vigil logs each frame durably; the others
keep nothing. Each judges as many images at a time as there are cores, one thread each. "vigil" is the way to the
verdict, with the same f32 graph in ONNX Runtime as the peers have: the storage service, which no verdict waits for, is
started after each load and takes the frames from the log. In "vigil-stored" it works beside the load, so that its CPU
is part of the figures. "vigil-auto" is "vigil" with what `engine: auto` takes of the variants that `vigil model
optimise` makes. Each peer lives in an environment that uv makes for its script; one that can't be had, or does not come
up in time, is named in the table with the reason. In the first round each is killed under load: Vigil's worker and
ingest, which are started again as Kubernetes would, and all processes of a peer. What was asked and got an error or no
answer is lost; only Vigil's client asks again. A model's round that would not end within the minutes is not begun, and
what has been measured so far is written after each server.
VIGIL_BENCH_EXPORT names folders with Anomalib exports, parted by ":"; the built-in trainer's model is always measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop
from vigil_cli.local.stack import StackError
from vigil_common.bundle import open_bundle, pack
from vigil_inference.bootstrap import cpus
from vigil_trainer import import_export, train
from vigil_trainer.graphs import run_graphs
from vigil_trainer.optimise import optimise

from tests.bench.bench import MODEL
from tests.bench.peers.report import PEERS, last_line, plot, ratios, table
from tests.bench.peers.targets import LeftOut, Peer, Vigil, installed, memory_mb
from tests.support.cells import load_cells
from tests.support.cpu import cpu_s_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_common.bundle import Bundle

# Variants are made of images that nothing else is measured with; of a slower model it would take minutes.
CALIBRATION_IMAGES, MEASURED_IMAGES = 32, 100
# Of the image's side, for variants of graphs that resize it themselves: three quarters of what Anomalib's exports take.
INPUT_SIZES = (192,)
OPTIMISED_BELOW_MS = 60.0


async def measure(
    target: Peer | Vigil, images: list[bytes], options: argparse.Namespace, *, crash: bool
) -> dict[str, Any]:
    """Each number in flight, then a crash under load."""
    found: dict[str, Any] = {"version": target.version}
    await target.load(images, 4, 1.0)
    vigil = target if isinstance(target, Vigil) else None
    if vigil:
        await vigil.settle()
    for in_flight in options.in_flight:
        if vigil:
            await vigil.begin()
        pids = target.pids()
        before, own, began = cpu_s_of(pids), time.process_time(), time.monotonic()
        load = await target.load(images, in_flight, options.seconds)
        own = time.process_time() - own
        if vigil and vigil.stored:
            await vigil.settle()  # its cost is part of what was asked
        used, memory = cpu_s_of(pids) - before, memory_mb(pids)
        if vigil:
            await vigil.settle()
        done = max(1, len(load.latencies_ms))
        p50, p99 = np.percentile(load.latencies_ms or [float("nan")], [50, 99])
        found[str(in_flight)] = {
            "per_s": len(load.latencies_ms) / load.took_s,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "cpu_ms": used / done * 1000,
            "client_cpu_ms": own / done * 1000,
            "memory_mb": memory,
            "frames": len(load.latencies_ms),
            "errors": load.lost,
            "until_all_stored_s": time.monotonic() - began,
        }
    if crash:
        began = time.monotonic()
        under_load = asyncio.create_task(target.load(images, 64, 3.0))
        await asyncio.sleep(1.0)
        await target.crash()
        found["lost_when_killed"] = (await under_load).lost
        found["crash_s"] = time.monotonic() - began
    return found


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    first = rounds[0]
    result: dict[str, Any] = {"version": first["version"], "rounds": len(rounds)}
    result["lost_when_killed"] = first.get("lost_when_killed")
    for in_flight in (key for key in first if key.isdigit()):
        result[in_flight] = {key: statistics.median(one[in_flight][key] for one in rounds) for key in first[in_flight]}
    return result


class Comparison:
    """All servers on one model, round by round.

    Args:
        name: The model's.
        bundle: Its bundle.
        faster: The same with variants; None where they would take too long to make.
        pythons: Each peer's interpreter.
        left_out: Peers that can't be had, and why.
        folder: For what is extracted and stored.
        options: The command line's.
    """

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        faster: bytes | None,
        *,
        pythons: dict[str, str],
        left_out: dict[str, str],
        folder: Path,
        options: argparse.Namespace,
    ) -> None:
        self.name = name
        self._bundle = bundle
        self._pythons = pythons
        self._left_out = dict(left_out)
        self._failed: dict[str, str] = {}
        self._folder = folder
        self._options = options
        self._rounds: dict[str, list[dict[str, Any]]] = {}
        self.round_s = 0.0
        plain = pack(bundle.manifest, bundle.files)
        self._bundles = {"vigil": plain, "vigil-stored": plain, **({"vigil-auto": faster} if faster else {})}
        self._names = [*self._bundles, *pythons]
        bundle.extract(folder)
        manifest = bundle.manifest
        self._env = {
            "PEER_MODEL": str(folder / manifest.artefacts["onnxruntime"].path),
            "PEER_INPUT": manifest.input.name,
            "PEER_SCORE": manifest.outputs.score,
            "PEER_BATCH": str(manifest.fixed_batch or 1),
            "PEER_WORKERS": str(cpus()),
        }

    async def round(self, number: int) -> AsyncIterator[None]:
        """Each server once, in an order that turns; yields after each. `round_s` is what it took without the kills."""
        began = time.monotonic()
        turn = number % len(self._names)
        for one in self._names[turn:] + self._names[:turn]:
            await self._measure(one, number)
            yield
        killing_s = sum(found[number].get("crash_s", 0.0) for found in self._rounds.values() if len(found) > number)
        self.round_s = time.monotonic() - began - killing_s

    async def _measure(self, one: str, number: int) -> None:
        """One server in one round."""
        if one in self._left_out:
            return
        target: Peer | Vigil
        if one in self._bundles:
            engine = "auto" if one == "vigil-auto" else "onnxruntime"
            folder = self._folder / f"{one}-{number}"
            target = Vigil(self._bundles[one], folder, engine=engine, stored=one == "vigil-stored")
        else:
            target = Peer(one, self._pythons[one], self._env, self._options.out / f"{one}.log")
        began = time.monotonic()
        try:
            async with target:
                up_s = time.monotonic() - began
                crash = number == 0 and one in ("vigil-stored", *self._pythons)  # of Vigil's the one with every part
                found = await measure(target, load_cells().test_images, self._options, crash=crash)
        except (LeftOut, StackError, TimeoutError) as error:
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            # Once may be the machine's doing. One that was measured before keeps what it has.
            if one in self._failed:
                self._left_out[one] = why
            self._failed[one] = why
            print(f"{self.name} round {number + 1} goes without {one}: {error}", flush=True)
            return
        self._rounds.setdefault(one, []).append(found)
        rates = ", ".join(f"{key}: {found[key]['per_s']:.1f}/s" for key in found if key.isdigit())
        lost = f", lost when killed {found['lost_when_killed']}" if "lost_when_killed" in found else ""
        took = f"up in {up_s:.0f} s, {time.monotonic() - began:.0f} s in all"
        print(f"{self.name} round {number + 1} {one}: {rates}{lost} ({took})", flush=True)

    def result(self) -> dict[str, Any]:
        """What was measured so far."""
        targets = {one: merged(self._rounds[one]) for one in [*self._names] if one in self._rounds}
        return {"model": self.name, "left_out": {**self._failed, **self._left_out}, "targets": targets}


def load_models() -> dict[str, Bundle]:
    """The built-in trainer's, and the exports named."""
    models = {"built-in": train(load_cells().train[:100], name=MODEL).bundle}
    for export in filter(None, os.environ.get("VIGIL_BENCH_EXPORT", "").split(os.pathsep)):
        models[Path(export).name] = import_export(Path(export), name=MODEL)
    return {name: open_bundle(bundle) for name, bundle in models.items()}


def with_variants(name: str, bundle: Bundle) -> tuple[bytes | None, list[dict[str, Any]]]:
    """The bundle with what `vigil model optimise` makes, and what it measured; None for a model that is too slow."""
    cells = load_cells()
    began = [time.monotonic() for _ in run_graphs(bundle.manifest, bundle.files, "onnxruntime", cells.train[:5])]
    if min(np.diff(began)) * 1000 > OPTIMISED_BELOW_MS:
        return None, []
    made = optimise(
        bundle,
        calibration=cells.train[-CALIBRATION_IMAGES:],
        normal=cells.normal[:MEASURED_IMAGES],
        anomalous=cells.defective[:MEASURED_IMAGES],
        input_sizes=INPUT_SIZES,
    )
    for one in made.measured:
        area = "-" if one.auroc is None else f"{one.auroc:.4f}"
        refused = f", refused: {one.refused}" if one.refused else ""
        print(f"{name}: {one.name} {one.run_ms:.2f} ms, AUROC {area}, {one.flips} flips{refused}", flush=True)
    return made.bundle, [asdict(one) for one in made.measured]


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything, within the minutes given."""
    began = time.monotonic()
    pythons: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in options.peers:
        (options.out / f"{name}.log").unlink(missing_ok=True)
        try:
            pythons[name] = await installed(name)
        except LeftOut as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        comparisons, variants = [], []
        for name, bundle in load_models().items():
            faster, measured = await asyncio.to_thread(with_variants, name, bundle)
            folder = Path(place) / name
            folder.mkdir()
            comparison = Comparison(
                name, bundle, faster, pythons=pythons, left_out=left_out, folder=folder, options=options
            )
            comparisons.append(comparison)
            variants.append(measured)
        results: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for comparison in comparisons:
                if time.monotonic() - began + comparison.round_s > options.minutes * 60:
                    print(f"no time for round {number + 1} of {comparison.name}", flush=True)
                    continue
                async for _ in comparison.round(number):
                    results = [
                        {**each.result(), "variants": made} for each, made in zip(comparisons, variants, strict=True)
                    ]
                    write(results, options, time.monotonic() - began)
    return results


def write(results: list[dict[str, Any]], options: argparse.Namespace, took_s: float) -> dict[str, Any]:
    """The JSON."""
    made = {
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "python": sys.version.partition(" ")[0],
        "seconds": options.seconds,
        "took_s": round(took_s),
        "results": results,
    }
    (options.out / "peers.json").write_text(json.dumps(made, indent=2))
    return made


def cpu_name() -> str:
    """As the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=Path("out/bench-peers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results = uvloop.run(run(options))
    plot(results, options.out / "peers.png")
    made = write(results, options, time.monotonic() - began)
    most, least = str(max(options.in_flight)), str(min(options.in_flight))
    page = [f"{made['at']}, {made['machine']}, load {made['load_average']:.1f} at the end, {made['took_s']} s"]
    for result in results:
        page += ["", table(result), ""]
        if found := ratios(result, most, least):
            best, throughput, auto, p99 = found
            what = f"{throughput:.2f} of {best}'s images/s at {most} in flight, {auto:.2f} with variants"
            page.append(f"{result['model']}: {what}, {p99:.2f} of the least p99 at {least}")
    text = "\n".join(page)
    (options.out / "peers.md").write_text(f"{text}\n")
    print(text)
    print(f"details in {options.out}/peers.json, peers.png, peers.md")
    print(last_line(results, most, least))


if __name__ == "__main__":
    main()
