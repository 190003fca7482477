"""Threads that keep the model busy: the next images are decoded while the model runs on this one.

All threads are alike. Each takes an image, decodes it and lays it among the ready; whoever then finds the model free
judges what is ready, until nothing is. So the model is never idle while something is ready, one image alone goes from
the event loop to one thread and back, and where many come at once one thread judges while the others decode.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from vigil_common.pixels import Pixels, Tensor, decode, to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vigil_inference.engine import Outputs
    from vigil_inference.model import LoadedModel


@dataclass(frozen=True, slots=True)
class Judged:
    """What the model says of one image; `pixels`, `map` and `mask` only where pictures were asked for."""

    score: float
    pixels: Pixels | None
    map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    decode_s: float
    inference_s: float


@dataclass(slots=True, eq=False)
class _Job:
    image: bytes
    pictures: bool
    future: asyncio.Future[Judged]
    tensor: Tensor | None = None
    pixels: Pixels | None = None
    decode_s: float = 0.0


@dataclass(slots=True)
class Pipeline:
    """Threads that decode and judge.

    Args:
        model: Judges batches; called by one thread at a time.
        max_pixels: Larger images are refused before decoding.
        batch_size: Most images of one run; waits for none.
        decoders: How many threads decode while one judges.
    """

    model: LoadedModel
    max_pixels: int
    batch_size: int = 1
    decoders: int = 1
    _asked: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    _ready: deque[_Job] = field(default_factory=deque)
    _free: threading.Lock = field(default_factory=threading.Lock)
    # Decoded images are large: only so many are made ahead of the model.
    _ahead: threading.Semaphore = field(init=False)
    _threads: list[threading.Thread] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop = field(init=False)

    def start(self) -> None:
        """Start the threads; call from the loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._ahead = threading.Semaphore(self.batch_size + self.decoders)
        for index in range(self.decoders + 1):
            self._threads.append(threading.Thread(target=self._work, name=f"judge-{index}", daemon=True))
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        """Let what is under way end."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    async def judge(self, image: bytes, *, pictures: bool) -> Judged:
        """Judge one image.

        Raises:
            InvalidInput: The image can't be read; see `vigil_common.pixels.decode`.
        """
        job = _Job(image, pictures, self._loop.create_future())
        self._asked.put(job)
        return await job.future

    def _work(self) -> None:
        while (job := self._asked.get()) is not None:
            self._ahead.acquire()
            if job.future.done() or not self._decode(job):  # done: who asked has gone
                self._ahead.release()
                continue
            self._ready.append(job)
            # Whoever has the model looks again after letting it go, so nothing stays behind.
            while self._ready and self._free.acquire(blocking=False):
                try:
                    while batch := self._next_batch():
                        self._ahead.release(len(batch))
                        self._judge(batch)
                finally:
                    self._free.release()

    def _decode(self, job: _Job) -> bool:
        began = time.perf_counter()
        try:
            pixels = decode(job.image, max_pixels=self.max_pixels)
            job.tensor = to_tensor(pixels, self.model.manifest.input)
        except Exception as error:  # noqa: BLE001 - carried to who asked
            self._fail([job], error)
            return False
        if job.pictures:
            job.pixels = pixels
        job.decode_s = time.perf_counter() - began
        return True

    def _next_batch(self) -> list[_Job]:
        """What is ready and of one size, up to a batch; only for who has the model."""
        batch: list[_Job] = []
        while self._ready and len(batch) < self.batch_size:
            if batch and _tensor(self._ready[0]).shape != _tensor(batch[0]).shape:
                break
            batch.append(self._ready.popleft())
        return batch

    def _judge(self, batch: list[_Job]) -> None:
        began = time.perf_counter()
        pictures = any(job.pictures for job in batch)
        try:
            tensor = _tensor(batch[0]) if len(batch) == 1 else np.concatenate([_tensor(job) for job in batch])
            outputs = self.model.judge(tensor, pictures=pictures)
        except Exception as error:  # noqa: BLE001 - the runtime's own kinds, or no memory, carried to who asked
            self._fail(batch, error)
            return
        inference_s = time.perf_counter() - began
        results = [_judged(job, outputs, index, inference_s) for index, job in enumerate(batch)]
        self._loop.call_soon_threadsafe(_settle, batch, results)

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        def fail() -> None:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)

        self._loop.call_soon_threadsafe(fail)


def _tensor(job: _Job) -> Tensor:
    assert job.tensor is not None  # noqa: S101 - set before the job is ready
    return job.tensor


def _judged(job: _Job, outputs: Outputs, index: int, inference_s: float) -> Judged:
    return Judged(
        score=float(outputs.score[index]),
        pixels=job.pixels,
        map=outputs.map[index] if job.pictures and outputs.map is not None else None,
        mask=outputs.mask[index] if job.pictures and outputs.mask is not None else None,
        decode_s=job.decode_s,
        inference_s=inference_s,
    )


def _settle(batch: list[_Job], results: list[Judged]) -> None:
    for job, result in zip(batch, results, strict=True):
        if not job.future.done():
            job.future.set_result(result)
