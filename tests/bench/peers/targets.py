"""What is measured: Vigil, and each peer in an environment of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import grpc
import numpy as np
from open_inference import grpc_predict_v2_pb2 as v2
from open_inference import grpc_predict_v2_pb2_grpc as v2_grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_cli.local.process import free_port
from vigil_cli.local.stack import LocalStack
from vigil_client import Frame, StorageClient, VigilClient
from vigil_common.streams.redis import RedisStreams

from tests.bench.bench import CAMERAS, MODEL, drained
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HERE = Path(__file__).parent
INSTALL_S = 180.0
START_S = 60.0
# Requests that a server with adaptive batching may bring to one run.
TOGETHER = 8
# Longer than 64 requests wait for a model of a third of a second.
ANSWER_S = 30.0
# Its daemons need neither a token on a loopback, nor the environment of the command that started them.
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}


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


def script_of(name: str) -> Path:
    """The server's; what follows a dash is how it is set up."""
    return HERE / f"{name.partition('-')[0]}_peer.py"


class LeftOut(Exception):
    """A peer can't be measured; the message says why."""


async def installed(name: str) -> str:
    """The interpreter of a peer's environment, made where it is missing."""
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` tells what it is
    if uv is None:
        raise LeftOut("uv, which makes its environment, is not on the path")
    script = str(script_of(name))
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
        env = {**RAY, **env, "PEER_TOGETHER": str(TOGETHER if name.endswith("-batching") else 1)}
        self._env = {**os.environ, **env, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
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
        command = [self._python, str(script_of(self.name)), str(self._port)]
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
            return await (self._ask_grpc(image) if self.name.startswith("mlserver") else self._ask_http(image))
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
