"""Vigil beside what people would use instead: the same graph, images, cores and requests in flight, taking turns.

    python -m tests.bench.peers.bench [--seconds 4] [--rounds 3] [--minutes 24] [--in-flight 1 8 64] [--peers ...]

In each round every server runs alone, started for it, in an order that turns. Vigil logs each frame durably; the others
keep nothing. "vigil" is the way to the verdict, with the same f32 graph in ONNX Runtime as the peers have: the storage
service, which no verdict waits for, is started after each load and takes the frames from the log. In "vigil-stored" it
works beside the load, so that its CPU is part of the figures. "vigil-auto" is "vigil" with what `engine: auto` takes of
the variants that `vigil model optimise` makes. Each peer lives in an environment that uv makes for its script; one that
can't be had, or does not come up in time, is named in the table with the reason. In the first round each is killed
under load: Vigil's worker and ingest, which are started again as Kubernetes would, and all processes of a peer. What
was asked and got an error or no answer is lost; only Vigil's client asks again. A model's round that would not end
within the minutes is not begun, and what has been measured so far is written after each server.
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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import aiohttp
import grpc
import numpy as np
import uvloop
from open_inference import grpc_predict_v2_pb2 as v2
from open_inference import grpc_predict_v2_pb2_grpc as v2_grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_cli.local.process import free_port
from vigil_cli.local.stack import LocalStack, StackError
from vigil_client import Frame, StorageClient, VigilClient
from vigil_common.bundle import open_bundle, pack
from vigil_common.streams.redis import RedisStreams
from vigil_trainer import import_export, train
from vigil_trainer.graphs import run_graphs
from vigil_trainer.optimise import optimise

from tests.bench.bench import CAMERAS, MODEL, drained
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vigil_common.bundle import Bundle

HERE = Path(__file__).parent
PEERS = ("mlserver", "litserve", "bentoml", "ray")
INSTALL_S = 180.0
START_S = 60.0
# Longer than 64 requests wait for a model of a third of a second.
ANSWER_S = 30.0
# Variants are made of images that nothing else is measured with; of a slower model it would take minutes.
CALIBRATION_IMAGES, MEASURED_IMAGES = 32, 100
OPTIMISED_BELOW_MS = 60.0
# Its daemons need neither a token on a loopback, nor the environment of the command that started them.
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}


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


def session(leader: int) -> list[int]:
    """Every process of a session: also those whose parent has gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(path.parent.name))
    return found


class LeftOut(Exception):
    """A peer can't be measured; the message says why."""


async def installed(name: str) -> str:
    """The interpreter of a peer's environment, made where it is missing."""
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` tells what it is
    if uv is None:
        raise LeftOut("uv, which makes its environment, is not on the path")
    script = str(HERE / f"{name}_peer.py")
    env = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    for command in (["sync", "--quiet", "--script", script], ["python", "find", "--script", script]):
        process = await asyncio.create_subprocess_exec(
            uv, *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            said, wrong = await asyncio.wait_for(process.communicate(), INSTALL_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise LeftOut(f"not installed within {INSTALL_S:.0f} s") from None
        if process.returncode:
            raise LeftOut(f"can't be installed: {wrong.decode().strip().rpartition(chr(10))[2]}")
    return said.decode().strip()


class Peer:
    """A peer's server, and how it is asked."""

    def __init__(self, name: str, python: str, env: dict[str, str], log: Path) -> None:
        self.name = name
        self.version = ""
        self._python = python
        self._env = {**os.environ, **RAY, **env, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
        self._env.pop("VIRTUAL_ENV", None)
        self._log = log
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # some write where they stand
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._disconnect()
        await self.crash()
        self._folder.cleanup()

    async def _start(self) -> None:
        command = [self._python, str(HERE / f"{self.name}_peer.py"), str(self._port)]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=self._env,
                cwd=self._folder.name,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_S):
                said = await self._process.stdout.readline()
                if not said.startswith(b"{"):
                    raise LeftOut(f"did not start: {self._last_words()}")
                self.version = json.loads(said)["version"]
                self._draining = asyncio.create_task(self._process.stdout.read())
                self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S))
                self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}")
                image = load_cells().normal[0]
                while not await self.ask(image):
                    if self._process.returncode is not None:
                        raise LeftOut(f"ended with {self._process.returncode}: {self._last_words()}")
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise LeftOut(f"did not come up within {START_S:.0f} s: {self._last_words()}") from None

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    async def _disconnect(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._channel is not None:
            await self._channel.close()

    def pids(self) -> list[int]:
        if self._process is None:
            return []
        leader = self._process.pid
        return list({*tree(leader), *(one for pid in session(leader) for one in tree(pid))})

    async def crash(self) -> None:
        if self._process is None:
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
    """The platform, every frame through its queue and into the store: after each load, or while it goes on.

    Args:
        bundle: The model's.
        folder: For its parts.
        engine: The worker's.
        stored: Whether storage works beside the load.
    """

    def __init__(self, bundle: bytes, folder: Path, *, engine: str, stored: bool) -> None:
        self.version = "this tree"
        self.stored = stored
        self._bundle = bundle
        self._engine = engine
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
        self._worker = await self._stack.add_worker(MODEL, model.version, ENGINE=self._engine)
        described = await self._describe()
        self.version = f"this tree, {described.artefact}"
        return self

    async def _describe(self) -> inference_pb2.DescribeResponse:
        async with grpc.aio.insecure_channel(self._stack.worker_addresses[self._worker]) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await stub.Describe(inference_pb2.DescribeRequest())

    async def __aexit__(self, *_: object) -> None:
        if self._streams is not None:
            await self._streams.close()
        await self._stack.close()

    def pids(self) -> list[int]:
        names = ("valkey", "reductstore", "storage", "ingest", self._worker)
        return [pid for name in names if (pid := self._stack.pid(name)) is not None]

    async def begin(self) -> None:
        """Before a load whose way to the verdict alone is measured."""
        if not self.stored:
            await self._stack.stop("storage")

    async def settle(self) -> None:
        """Until everything is in the store."""
        assert self._streams is not None
        if self._stack.pid("storage") is None:
            await self._stack.start("storage")
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


async def measure(target: Any, images: list[bytes], options: argparse.Namespace, *, crash: bool) -> dict[str, Any]:
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
        before, own, began = cpu_s(pids), time.process_time(), time.monotonic()
        load = await target.load(images, in_flight, options.seconds)
        own = time.process_time() - own
        if vigil and vigil.stored:
            await vigil.settle()  # its cost is part of what was asked
        used, memory = cpu_s(pids) - before, memory_mb(pids)
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
        target: Any
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
            # One that was measured before keeps what it has.
            self._left_out[one] = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"{self.name}: {one} is left out: {error}", flush=True)
            return
        self._rounds.setdefault(one, []).append(found)
        rates = ", ".join(f"{key}: {found[key]['per_s']:.1f}/s" for key in found if key.isdigit())
        lost = f", lost when killed {found['lost_when_killed']}" if "lost_when_killed" in found else ""
        took = f"up in {up_s:.0f} s, {time.monotonic() - began:.0f} s in all"
        print(f"{self.name} round {number + 1} {one}: {rates}{lost} ({took})", flush=True)

    def result(self) -> dict[str, Any]:
        """What was measured so far."""
        targets = {one: merged(self._rounds[one]) for one in [*self._names] if one in self._rounds}
        return {"model": self.name, "left_out": self._left_out, "targets": targets}


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


def table(result: dict[str, Any]) -> str:
    """A line per server and number in flight, and per peer that is left out."""
    heads = ("in flight", "images/s", "p50 ms", "p99 ms", "CPU ms", "client's", "MB", "lost when killed")
    lines = [f"| {result['model']} | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, found in result["targets"].items():
        for key in (key for key in found if key.isdigit()):
            one = found[key]
            latency = f"{one['p50_ms']:.1f} | {one['p99_ms']:.1f}"
            lines.append(
                f"| {name} {found['version']} | {key} | {one['per_s']:.1f} | {latency} | "
                f"{one['cpu_ms']:.1f} | {one['client_cpu_ms']:.1f} | {one['memory_mb']:.0f} | "
                f"{'-' if found['lost_when_killed'] is None else found['lost_when_killed']} |"
            )
    lines += [f"| {name} | left out: {reason} |" for name, reason in result["left_out"].items()]
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


def ratios(result: dict[str, Any], most: str, least: str) -> tuple[str, float, float, float] | None:
    """The best peer with this model; by how much Vigil, and with its variants, is faster; its p99 over the least."""
    targets = result["targets"]
    peers = {name: found for name, found in targets.items() if name in PEERS}
    if not peers or "vigil" not in targets:
        return None
    best = max(peers, key=lambda name: float(peers[name][most]["per_s"]))
    rate = peers[best][most]["per_s"]
    quickest = min(float(found[least]["p99_ms"]) for found in peers.values())
    auto = targets.get("vigil-auto", targets["vigil"])
    return (
        best,
        targets["vigil"][most]["per_s"] / rate,
        auto[most]["per_s"] / rate,
        (targets["vigil"][least]["p99_ms"] / quickest),
    )


def last_line(results: list[dict[str, Any]], most: str, least: str) -> str:
    """Throughput and p99 with the first model, variants with the second: the first has little to gain by them."""
    first = ratios(results[0], most, least)
    second = ratios(results[min(1, len(results) - 1)], most, least)
    if first is None or second is None:
        return "peers: nothing to compare, see the table"
    best, throughput, _, p99 = first
    return f"peers: best={best} throughput_vs_best={throughput:.2f} auto_vs_best={second[2]:.2f} p99_vs_best={p99:.2f}"


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
