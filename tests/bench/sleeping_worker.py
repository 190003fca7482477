"""A worker whose model sleeps for a set time and says what it was told: for measuring what is not the model.

    python -m tests.bench.sleeping_worker MODEL DIGEST REDIS_URL SLEEP_MS

Everything else is the worker's own: it reads, decodes, emits and acknowledges as with any model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import uvloop
from vigil.types.v1 import types_pb2
from vigil_common.bundle import ModelInput
from vigil_common.logging import configure
from vigil_common.streams.redis import RedisStreams
from vigil_inference.engine import Outputs
from vigil_inference.pipeline import Pipeline
from vigil_inference.worker import Worker

if TYPE_CHECKING:
    from vigil_common.pixels import Tensor
    from vigil_inference.model import LoadedModel


class Sleeping:
    """A model that takes its time and nothing else."""

    manifest: Any = SimpleNamespace(input=ModelInput(), fixed_batch=None)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def judge(self, batch: Tensor, *, pictures: bool) -> Outputs:
        """The same for every image."""
        del pictures
        time.sleep(self._seconds)
        return Outputs(np.full(len(batch), 0.25, dtype=np.float32), None, None)


async def main() -> None:
    """Work until told to stop."""
    model, digest, redis_url, sleep_ms = sys.argv[1:]
    configure("sleeping", "WARNING")
    pipeline = Pipeline(cast("LoadedModel", Sleeping(float(sleep_ms) / 1000)), 1 << 26)
    pipeline.start()
    streams = await RedisStreams.connect(redis_url)
    consumer = f"sleeping-{os.getpid()}"
    worker = Worker(
        streams.source(model, consumer),
        streams.candidate(model, consumer, digest),
        streams.routing,
        pipeline,
        version=types_pb2.ModelVersion(name=model, version=1, digest=digest),
        default_threshold=0.5,
        prefetch=4,
        claim_idle_ms=15_000,
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await pipeline.close()
    await streams.close()


if __name__ == "__main__":
    uvloop.run(main())
