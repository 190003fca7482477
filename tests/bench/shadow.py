"""What shadow costs: live's latency with it, without it and with its processes stopped; and the report's own speed.

    python -m tests.bench.shadow [--seconds 8] [--rounds 9] [--pairs 1000000] [--out out/bench]

Live's whole path has one core, candidate and shadow another, as limits give each its share in a cluster. Frames come at
half of what live alone takes, whatever the answers do. The three modes take turns, in another order each round, since a
shared machine's speed drifts and its disk stalls now and then; each figure is the median of its rounds, and beside it
stands that of all frames of a mode together, stalls and all. VIGIL_BENCH_EXPORT is as in `tests.bench.bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vigil_cli.local.stack import LocalStack
from vigil_client import StorageClient, VigilClient
from vigil_common.streams.ports import Candidate, Live
from vigil_common.streams.redis import RedisStreams
from vigil_common.streams.redis_connection import prefix
from vigil_shadow.domain import Compared
from vigil_shadow.pairing import Pairing
from vigil_trainer import train

from tests.bench.bench import MODEL, closed_loop, drained, make_bundle, open_loop
from tests.support.cells import load_cells
from tests.support.cpu import cpu_s
from tests.support.shadow import CANDIDATE, LIVE, Answer, numbered
from tests.support.valkey import ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vigil_client import Model

WINDOW = 8
MODES = ("off", "on", "stopped")
STEP = 256


def pin(pids: Iterable[int | None], core: int) -> None:
    """Keep processes, with all threads they have, on one core."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(task.name), {core})


async def measure_live(seconds: float, rounds: int, folder: Path) -> dict[str, Any]:
    """Latency and throughput of live in each mode."""
    cells = load_cells()
    bundle, what = make_bundle(cells)
    async with LocalStack(folder / "stack", log=print, log_level="WARNING") as stack:
        async with StorageClient(stack.storage_address) as storage:
            live = await storage.models_publish(bundle, name=MODEL)
            other = train(cells.train[100:200], name=MODEL).bundle
            candidate = await storage.models_publish(other, name=MODEL)
        streams = await RedisStreams.connect(stack.redis_url)
        await set_mode(streams, live, None)
        # Each has one core, and knows it.
        workers = [await stack.add_worker(MODEL, model.version, RUNS="1") for model in (live, candidate)]
        beside = [stack.pid(name) for name in ("shadow", workers[1])]
        path = {name: stack.pid(name) for name in ("valkey", "reductstore", "storage", "ingest", workers[0])}
        pin([os.getpid(), *path.values()], 0)
        pin(beside, 1)
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        p50: dict[str, list[float]] = {mode: [] for mode in MODES}
        p99: dict[str, list[float]] = {mode: [] for mode in MODES}
        every: dict[str, list[float]] = {mode: [] for mode in MODES}
        # Milliseconds of CPU for a frame at half load, by part: what other programs on the machine do does not count.
        cpu_ms: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in path} for mode in MODES}
        async with VigilClient(stack.ingest_address, window=WINDOW) as client:
            await closed_loop(client, cells.test_images, 5)
            half = 0.0
            for index in range(rounds):
                turn = index % len(MODES)
                for mode in MODES[turn:] + MODES[:turn]:
                    await set_mode(streams, live, None if mode == "off" else candidate)
                    for pid in beside if mode == "stopped" else ():
                        os.kill(pid or 0, signal.SIGSTOP)
                    try:
                        rates[mode].append((await closed_loop(client, cells.test_images, seconds / 2))["rate"])
                        await drained(stack, streams)
                        half = half or rates["off"][0] / 2
                        used = {name: cpu_s(pid) for name, pid in path.items()}
                        latencies = await open_loop(client, cells.test_images, seconds, half)
                        for name, pid in path.items():
                            cpu_ms[mode][name].append((cpu_s(pid) - used[name]) / len(latencies) * 1000)
                    finally:
                        for pid in beside if mode == "stopped" else ():
                            os.kill(pid or 0, signal.SIGCONT)
                    await drained(stack, streams)
                    every[mode] += latencies
                    p50[mode].append(float(np.percentile(latencies, 50)))
                    p99[mode].append(float(np.percentile(latencies, 99)))
                    print(
                        f"round {index + 1}, shadow {mode}: {rates[mode][-1]:.1f}/s, at {half:.1f}/s "
                        f"p50 {p50[mode][-1]:.1f} ms, p99 {p99[mode][-1]:.1f} ms, CPU a frame "
                        + ", ".join(f"{name} {found[-1]:.2f} ms" for name, found in cpu_ms[mode].items())
                    )
        await streams.close()
    of_all = {mode: float(np.percentile(every[mode], 99)) for mode in MODES}
    medians = {mode: statistics.median(p99[mode]) for mode in MODES}
    return {
        "model": what,
        "half_rate": half,
        "rates": rates,
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_ms_of_all": of_all,
        "cpu_ms_per_frame": cpu_ms,
        "p99_ratio_on": medians["on"] / medians["off"],
        "p99_ratio_stopped": medians["stopped"] / medians["off"],
        "p99_of_all_ratio_on": of_all["on"] / of_all["off"],
        "p99_of_all_ratio_stopped": of_all["stopped"] / of_all["off"],
        "rate_ratio_on": statistics.median(rates["on"]) / statistics.median(rates["off"]),
    }


async def set_mode(streams: RedisStreams, live: Model, candidate: Model | None) -> None:
    """Route with or without a candidate."""
    beside = Candidate(candidate.version, candidate.digest) if candidate else None
    await streams.routing.write(MODEL, live=Live(live.version, live.digest), candidate=beside)


async def measure_report(pairs: int, folder: Path) -> dict[str, Any]:
    """Pairs a second from serialised verdicts into a report in Valkey, and what the report takes there."""
    server = ValkeyProcess(folder / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    pairing = Pairing(Compared(MODEL, LIVE, CANDIDATE), await streams.reports.place(MODEL, "1"))
    rng = random.Random(0)
    paired_s = kept_s = used_s = 0.0
    number = 1
    for start in range(0, pairs, STEP):
        answers = []
        for index in range(start, min(pairs, start + STEP)):
            live = rng.betavariate(2, 4)
            candidate = min(1.0, max(0.0, live + rng.gauss(0, 0.03)))
            answers.append(Answer(f"frame-{index}", candidate=False, score=live, inference_us=rng.randint(8000, 12000)))
            answers.append(
                Answer(f"frame-{index}", candidate=True, score=candidate, inference_us=rng.randint(8000, 12000))
            )
        verdicts = numbered(answers, start=number)
        number += len(verdicts)
        began, cpu = time.perf_counter(), time.process_time()
        step = pairing.step(verdicts)
        paired = time.perf_counter()
        assert await streams.reports.commit(MODEL, "1", step)
        kept_s += time.perf_counter() - paired
        paired_s += paired - began
        used_s += time.process_time() - cpu
    used = 0
    for kind in ("report", "joint", "open", "worst", "details"):
        key = f"{prefix(MODEL)}shadow-{kind}:1"
        used += int(await streams.queue._connection.command("MEMORY", "USAGE", key, "SAMPLES", "0") or 0)
    fields = await streams.reports.fields(MODEL, "1")
    assert int(fields["frames"]) == pairs
    await streams.close()
    server.stop()
    return {
        "pairs": pairs,
        "pairing_per_s": pairs / paired_s,
        "with_valkey_per_s": pairs / (paired_s + kept_s),
        # What another program on the machine takes away does not count here.
        "per_cpu_s": pairs / used_s,
        "report_bytes": used,
        "process_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = asyncio.run(measure_report(options.pairs, Path(name))) if options.pairs else {}
        live = asyncio.run(measure_live(options.seconds, options.rounds, Path(name))) if options.rounds else {}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shadow.json").write_text(json.dumps({"report": report, "live": live}, indent=2))
    for part in (report, live):
        print(" ".join(f"{key}={value:.2f}" for key, value in part.items() if isinstance(value, int | float)))


if __name__ == "__main__":
    main()
