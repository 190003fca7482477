"""Vigil beside what people would use instead: the same graph, images, cores and requests in flight, taking turns.

    python -m tests.bench.peers.bench [--seconds 10] [--rounds 3] [--in-flight 1 8 64] [--peers ...] [--out DIR]

In each round every server runs alone, started for it, in an order that turns. Vigil logs each frame durably; the
others keep nothing. Each peer lives in an environment that uv makes for its script; one that can't be had is left out,
and said. Then each is killed under load: Vigil's worker and ingest, which are started again as Kubernetes would, and
all processes of a peer. What was asked and got an error or no answer is lost; only Vigil's client asks again.
VIGIL_BENCH_EXPORT names folders with Anomalib exports, parted by ":"; the built-in trainer's model is always measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import aiohttp
import grpc
import numpy as np
from open_inference import grpc_predict_v2_pb2 as v2
from open_inference import grpc_predict_v2_pb2_grpc as v2_grpc
from vigil_cli.local.process import free_port
from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, StorageClient, VigilClient
from vigil_common.bundle import open_bundle
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import import_export, train

from tests.bench.bench import CAMERAS, MODEL, drained
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HERE = Path(__file__).parent
PEERS = ("mlserver", "litserve", "bentoml", "ray")
START_S = 180.0
ANSWER_S = 30.0


class Target(Protocol):
    """Something that judges images."""

    def pids(self) -> list[int]:
        """Every process of it."""
        ...

    async def load(self, images: list[bytes], in_flight: int, seconds: float) -> Load:
        """Keep so many requests in flight for so long."""
        ...

    async def crash(self) -> None:
        """Kill what judges and what takes requests, and start it again."""
        ...


@dataclass(slots=True)
class Load:
    """What came of some requests."""

    took_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    lost: int = 0


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    below = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            below += [one for child in children.read_text().split() for one in tree(int(child))]
    return below


def cpu_s(pids: list[int]) -> float:
    """CPU seconds used by processes that still are."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_mb(pids: list[int]) -> float:
    """Resident memory; shared pages count in each process."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


class Peer:
    """A peer's server, and how it is asked."""

    def __init__(self, name: str, env: dict[str, str], log: Path) -> None:
        self.name = name
        self.version = ""
        self._env = {**os.environ, **env, "PYTHONPATH": str(HERE)}
        self._env.pop("VIRTUAL_ENV", None)
        self._log = log
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._disconnect()
        self._kill()

    async def _start(self) -> None:
        uv = shutil.which("uv") or "uv"
        command = [uv, "run", "--no-project", "--script", str(HERE / f"{self.name}_peer.py"), str(self._port)]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, env=self._env, stdout=asyncio.subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self._process.stdout is not None
        said = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        if not said.startswith(b"{"):
            raise RuntimeError(f"{self.name} did not start, see {self._log}: {said!r}")
        self.version = json.loads(said)["version"]
        self._draining = asyncio.create_task(self._process.stdout.read())
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S))
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}")
        deadline = time.monotonic() + START_S
        image = load_cells().normal[0]
        while not await self.ask(image):
            if time.monotonic() > deadline or self._process.returncode is not None:
                raise RuntimeError(f"{self.name} did not come up, see {self._log}")
            await asyncio.sleep(0.2)

    async def _disconnect(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._channel is not None:
            await self._channel.close()

    def pids(self) -> list[int]:
        return tree(self._process.pid) if self._process is not None else []

    def _kill(self) -> None:
        for pid in reversed(self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def crash(self) -> None:
        self._kill()
        assert self._process is not None
        await self._process.wait()

    async def ask(self, image: bytes) -> bool:
        """Whether the image got its score."""
        try:
            return await (self._ask_grpc(image) if self.name == "mlserver" else self._ask_http(image))
        except (aiohttp.ClientError, TimeoutError, grpc.aio.AioRpcError):
            return False

    async def _ask_grpc(self, image: bytes) -> bool:
        request = v2.ModelInferRequest(model_name="peer")
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(image)
        assert self._channel is not None
        stub: Any = v2_grpc.GRPCInferenceServiceStub(self._channel)
        answer = await stub.ModelInfer(request, timeout=ANSWER_S)
        return bool(np.isfinite(answer.outputs[0].contents.fp32_contents[0]))

    async def _ask_http(self, image: bytes) -> bool:
        assert self._session is not None
        path, body = "/", image
        data: Any = body
        if self.name != "ray":
            path = "/judge" if self.name == "bentoml" else "/predict"
            data = aiohttp.FormData()
            data.add_field("image", body, filename="image.png", content_type="image/png")
        async with self._session.post(f"http://127.0.0.1:{self._port}{path}", data=data) as response:
            await response.read()
            return response.status == 200

    async def load(self, images: list[bytes], in_flight: int, seconds: float) -> Load:
        """A closed loop; an unanswered request is lost, as its client has nothing but an error."""
        found = Load()
        began = time.monotonic()
        source = turning(images)

        async def one() -> None:
            while time.monotonic() - began < seconds:
                sent = time.monotonic()
                if await self.ask(next(source)):
                    found.latencies_ms.append((time.monotonic() - sent) * 1000)
                else:
                    found.lost += 1
                    return

        await asyncio.gather(*(one() for _ in range(in_flight)))
        found.took_s = time.monotonic() - began
        return found


def turning(images: list[bytes]) -> Iterator[bytes]:
    """The images over and over."""
    while True:
        yield from images


class Vigil:
    """The whole platform, every frame through its queue and into the store."""

    name = "vigil"
    version = "this tree"

    def __init__(self, bundle: bytes, folder: Path) -> None:
        self._bundle = bundle
        self._stack = LocalStack(folder, log_level="WARNING")
        self._streams: RedisStreams | None = None
        self._worker = ""

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        async with StorageClient(self._stack.storage_address) as storage:
            model = await storage.models_publish(self._bundle, name=MODEL)
        self._streams = await RedisStreams.connect(self._stack.redis_url)
        await self._streams.routing.promote(MODEL, version=model.version, digest=model.digest, threshold=None)
        await self._stack.stop("shadow")  # nothing is compared here
        self._worker = await self._stack.add_worker(MODEL, model.version)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._streams is not None:
            await self._streams.close()
        await self._stack.close()

    def pids(self) -> list[int]:
        names = ("valkey", "reductstore", "storage", "ingest", self._worker)
        return [pid for name in names if (pid := self._stack.pid(name)) is not None]

    async def settle(self) -> None:
        """Until everything is in the store."""
        assert self._streams is not None
        await drained(self._stack, self._streams)

    async def crash(self) -> None:
        self._stack.kill("ingest")
        self._stack.kill(self._worker)
        await asyncio.gather(self._stack.start("ingest"), self._stack.start(self._worker))

    async def load(self, images: list[bytes], in_flight: int, seconds: float) -> Load:
        """A closed loop of the client library, which sends again what a lost connection left unanswered."""
        found = Load()
        began = time.monotonic()

        async def frames() -> AsyncIterator[Frame]:
            for index, image in enumerate(turning(images)):
                if time.monotonic() - began >= seconds:
                    return
                yield Frame(image, MODEL, camera=CAMERAS[index % len(CAMERAS)])

        async with VigilClient(self._stack.ingest_address, window=in_flight) as client:
            async for result in client.stream(frames()):
                if result.verdict is None:
                    found.lost += 1
                else:
                    found.latencies_ms.append(result.latency_s * 1000)
        found.took_s = time.monotonic() - began
        return found


async def measure(target: Any, images: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Each number in flight, then a crash under load."""
    found: dict[str, Any] = {"version": target.version}
    await target.load(images, 4, 2.0)
    for in_flight in options.in_flight:
        pids = target.pids()
        before, own = cpu_s(pids), time.process_time()
        load = await target.load(images, in_flight, options.seconds)
        if isinstance(target, Vigil):
            await target.settle()  # its cost is part of what was asked
        done = max(1, len(load.latencies_ms))
        p50, p99 = np.percentile(load.latencies_ms or [float("nan")], [50, 99])
        found[str(in_flight)] = {
            "per_s": len(load.latencies_ms) / load.took_s,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "cpu_ms": (cpu_s(pids) - before) / done * 1000,
            "client_cpu_ms": (time.process_time() - own) / done * 1000,
            "memory_mb": memory_mb(target.pids()),
            "frames": len(load.latencies_ms),
            "errors": load.lost,
        }
    under_load = asyncio.create_task(target.load(images, 64, 3.0))
    await asyncio.sleep(1.0)
    await target.crash()
    found["lost_when_killed"] = (await under_load).lost
    return found


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    first = rounds[0]
    result: dict[str, Any] = {"version": first["version"]}
    result["lost_when_killed"] = [one["lost_when_killed"] for one in rounds]
    for in_flight in (key for key in first if key.isdigit()):
        result[in_flight] = {key: statistics.median(one[in_flight][key] for one in rounds) for key in first[in_flight]}
    return result


async def compare(name: str, bundle: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """All on one model."""
    images = load_cells().test_images
    opened = open_bundle(bundle)
    manifest = opened.manifest
    rounds: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    names = ["vigil", *options.peers]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        opened.extract(folder)
        env = {
            "PEER_MODEL": str(folder / manifest.artefacts["onnxruntime"].path),
            "PEER_INPUT": manifest.input.name,
            "PEER_SCORE": manifest.outputs.score,
            "PEER_BATCH": str(manifest.fixed_batch or 1),
        }
        for number in range(options.rounds):
            turn = number % len(names)
            for one in names[turn:] + names[:turn]:
                if one in left_out:
                    continue
                target: Any
                if one == "vigil":
                    target = Vigil(bundle, folder / f"stack-{number}")
                else:
                    target = Peer(one, env, options.out / f"{one}.log")
                try:
                    async with target:
                        found = await measure(target, images, options)
                except (RuntimeError, TimeoutError) as error:
                    if one == "vigil":
                        raise
                    left_out[one] = str(error) or type(error).__name__
                    print(f"{one} is left out: {left_out[one]}")
                    continue
                rounds.setdefault(one, []).append(found)
                rates = ", ".join(f"{key}: {found[key]['per_s']:.1f}/s" for key in found if key.isdigit())
                lost = found["lost_when_killed"]
                print(f"{name} round {number + 1} {one}: {rates}, lost when killed {lost}", flush=True)
    return {"model": name, "left_out": left_out, "targets": {one: merged(found) for one, found in rounds.items()}}


def table(result: dict[str, Any]) -> str:
    """A line per server and number in flight."""
    lines = [
        f"| {result['model']} | in flight | images/s | p50 ms | p99 ms | CPU ms | client's | MB | lost when killed |"
    ]
    lines.append("| --- | " + "--- | " * 8)
    for name, found in result["targets"].items():
        for key in (key for key in found if key.isdigit()):
            one = found[key]
            latency = f"{one['p50_ms']:.1f} | {one['p99_ms']:.1f}"
            lines.append(
                f"| {name} {found['version']} | {key} | {one['per_s']:.1f} | {latency} | "
                f"{one['cpu_ms']:.1f} | {one['client_cpu_ms']:.1f} | {one['memory_mb']:.0f} | "
                f"{'/'.join(str(lost) for lost in found['lost_when_killed'])} |"
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Images per second by number in flight, a picture per model."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for name, found in result["targets"].items():
            keys = [key for key in found if key.isdigit()]
            axis.plot(keys, [found[key]["per_s"] for key in keys], marker="o", label=name)
        axis.set(title=result["model"], xlabel="in flight", ylabel="images/s", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)


def last_line(results: list[dict[str, Any]], most: str, least: str) -> str:
    """The best peer by throughput with the first model; ratios of Vigil to it."""
    targets = results[0]["targets"]
    peers = {name: found for name, found in targets.items() if name != "vigil"}
    if not peers:
        return "peers: none could be had"
    best = max(peers, key=lambda name: float(peers[name][most]["per_s"]))
    quickest = min(float(found[least]["p99_ms"]) for found in peers.values())
    throughput = targets["vigil"][most]["per_s"] / peers[best][most]["per_s"]
    p99 = targets["vigil"][least]["p99_ms"] / quickest
    return f"peers: best={best} throughput_vs_best={throughput:.2f} p99_vs_best={p99:.2f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=Path("out/bench-peers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    models = {"built-in": train(load_cells().train[:100], name=MODEL).bundle}
    for export in filter(None, os.environ.get("VIGIL_BENCH_EXPORT", "").split(os.pathsep)):
        models[Path(export).name] = import_export(Path(export), name=MODEL)
    results = [asyncio.run(compare(name, bundle, options)) for name, bundle in models.items()]
    made = {
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": sys.version.partition(" ")[0],
        "results": results,
    }
    (options.out / "peers.json").write_text(json.dumps(made, indent=2))
    plot(results, options.out / "peers.png")
    for result in results:
        print(table(result))
    print(f"{made['at']}, {made['machine']}; details in {options.out}/peers.json")
    print(last_line(results, str(max(options.in_flight)), str(min(options.in_flight))))


if __name__ == "__main__":
    main()
