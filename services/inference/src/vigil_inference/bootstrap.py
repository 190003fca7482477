"""Wires a worker: every client and clock enters here."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from vigil.inference.v1 import inference_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.access import Role
from vigil_common.bundle import digest
from vigil_common.errors import DataLost, Unauthenticated, Unavailable
from vigil_common.grpc.errors import from_call
from vigil_common.grpc.security import connect
from vigil_common.grpc.server import create_server
from vigil_common.logging import get_logger
from vigil_common.store.open import open_stores
from vigil_common.streams.redis import RedisStreams

from vigil_inference.model import LoadedModel
from vigil_inference.pipeline import Pipeline
from vigil_inference.servicer import InferenceServicer
from vigil_inference.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from vigil_inference.config import Settings

T = TypeVar("T")

ACCESS = {
    "vigil.inference.v1.InferenceService": {
        "Predict": frozenset({Role.STREAM, Role.SERVE}),
        "Describe": frozenset({Role.STREAM, Role.PUBLISH, Role.SERVE}),
    }
}
# What a worker may have in hand: so much work, for what it holds no other can take, and so many frames.
HAND_S, HAND_AT_MOST = 0.16, 16
# Images of one run: what a quick model gets through in so long, so that the first waits little for the last.
BATCH_S, BATCH_AT_MOST = 0.032, 8
# More runs than that of one process would wait for Python's lock, and take memory each.
RUNS_AT_MOST = 8
CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")
DRAIN_S = 20.0
RETRY_S = 1.0
# Within so long a token that was changed has come to the files of both sides: the kubelet looks each minute.
TOKEN_S = 180.0

log = get_logger()


async def fetch(settings: Settings) -> tuple[types_pb2.ModelVersion, bytes]:
    """The bundle, through the storage service or directly.

    Raises:
        Unavailable: Neither can be reached.
        NotFound: No such version.
        Unauthenticated: Storage goes on refusing the token.
        DataLost: DIGEST_MISMATCH: what came is not what was published.
    """
    if settings.storage_address:
        version, bundle = await _fetch_by_grpc(settings)
    elif settings.store_url:
        token = settings.store_token_file.read_text().strip() if settings.store_token_file else None
        frames, models = await open_stores(settings.store_url, token)
        try:
            info = await models.get(settings.model, settings.model_version or None)
            bundle = b"".join([chunk async for chunk in models.download(info)])
        finally:
            await frames.close()
            await models.close()
        version = types_pb2.ModelVersion(name=info.name, version=info.version, digest=info.digest)
    else:
        raise Unavailable("NO_MODEL_SOURCE", "set VIGIL_STORAGE_ADDRESS or VIGIL_STORE_URL to load the model from")
    if digest(bundle) != version.digest:
        raise DataLost("DIGEST_MISMATCH", f"the bundle hashes to {digest(bundle)}, published was {version.digest}")
    return version, bundle


async def _fetch_by_grpc(settings: Settings) -> tuple[types_pb2.ModelVersion, bytes]:
    request = storage_pb2.DownloadRequest(name=settings.model, version=settings.model_version)
    began = time.monotonic()
    async with connect(settings.storage_address or "", settings) as channel:
        stub: storage_pb2_grpc.ModelServiceAsyncStub = storage_pb2_grpc.ModelServiceStub(channel)
        while True:
            version, chunks = types_pb2.ModelVersion(), []
            try:
                async for response in stub.Download(request):
                    if response.HasField("model"):
                        version = response.model.version
                    else:
                        chunks.append(response.chunk)
            except grpc.aio.AioRpcError as error:
                said = from_call(error)
                rotated = isinstance(said, Unauthenticated) and time.monotonic() - began < TOKEN_S
                if error.code() is not grpc.StatusCode.UNAVAILABLE and not rotated:
                    raise said from error
                log.warning("storage_away", reason=said.reason, detail=said.message)
                await asyncio.sleep(RETRY_S)
                continue
            return version, b"".join(chunks)


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """What it gives; None where the process is stopped before."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait((working,))
    return None


def cpus() -> int:
    """CPUs that this process may use: those it may run on, and no more than its control group's share, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no control groups, or "max"
        quota_us, period_us = map(int, CPU_SHARE.read_text().split())
        allowed = min(allowed, -(-quota_us // period_us))
    return max(1, allowed)


def usual_batch_size(model: LoadedModel) -> int:
    """Images of one run; OpenVINO compiles a graph for every size anew, so there one."""
    if model.engine.name == "openvino":
        return 1
    return max(1, min(BATCH_AT_MOST, int(BATCH_S / model.proven.run_s)))


def batch_size_of(model: LoadedModel, asked: int) -> int:
    """Most images of one run: the graph's own number, what is asked for, or what is usual; 1 where it can't do more."""
    if model.manifest.fixed_batch is not None:
        return model.manifest.fixed_batch
    count = asked or usual_batch_size(model)
    if count > 1 and not model.takes(count):
        log.warning("one_image_a_run", asked=count, detail="several of one run fail or do not score as each alone")
        return 1
    return count


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Load, prove, then work until stopped."""
    handle = create_server(settings.inference_bind, access=ACCESS, security=settings)
    fetched = await _unless_stopped(fetch(settings), stop)
    if fetched is None:
        return
    version, bundle = fetched
    if settings.cache_dir:
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir, ignore_cleanup_errors=True) as folder:
        runs = settings.runs or min(RUNS_AT_MOST, max(1, cpus() // settings.threads))
        model = await asyncio.to_thread(
            LoadedModel,
            bundle,
            Path(folder),
            expected_digest=settings.model_digest or version.digest,
            engine=settings.engine,
            threads=settings.threads,
            runs=runs,
            precision=settings.precision,
        )
        del bundle
        batch_size = await asyncio.to_thread(batch_size_of, model, settings.batch_size)
        pipeline = Pipeline(model, settings.max_image_pixels, batch_size, runs)
        pipeline.start()
        streams = await RedisStreams.connect(settings.redis_url, security=settings)
        consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        worker = Worker(
            streams.source(settings.model, consumer),
            streams.candidate(settings.model, consumer, version.digest),
            streams.routing,
            pipeline,
            version=version,
            default_threshold=model.manifest.threshold,
            prefetch=max(2 * batch_size * runs + 2, min(HAND_AT_MOST, int(HAND_S / model.proven.run_s) * runs)),
            claim_idle_ms=settings.claim_idle_ms,
            frame_s=model.proven.run_s,
            hand_s=HAND_S * runs,
            # A batch that is frozen or asked for is to be filled, however long that takes.
            at_least=2 * (batch_size if settings.batch_size or model.manifest.fixed_batch else 1) * runs + 2,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(pipeline, worker, version, threads=settings.threads), handle.server
        )
        await handle.start()
        await handle.ready()
        log.info(
            "ready",
            port=handle.port,
            model=version.name,
            version=version.version,
            engine=model.engine.name,
            runs=runs,
            batch_size=batch_size,
            artefact=model.artefact,
            choice=model.choice,
        )
        await worker.run(stop)
        await handle.drain(DRAIN_S)
        await pipeline.close()
        await streams.close()
    log.info("drained")
