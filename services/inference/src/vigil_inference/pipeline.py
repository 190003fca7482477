"""Threads that decode and judge: as many as runs of the model may go on at a time.

All threads are alike. Each takes what waits, but no more than its share, decodes it into one tensor and runs the model
on that. So one image alone goes from the event loop to one thread and back, and many at once are handed over together.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from vigil_common.pixels import Pixels, Tensor, decode, tensor_size, to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vigil_inference.engine import Outputs
    from vigil_inference.model import LoadedModel

# Of a run of several images. Larger ones are judged one by one: together they would take memory, and save nothing.
BATCH_PIXELS = 1 << 20


@dataclass(frozen=True, slots=True)
class Judged:
    """What the model says of one image.

    Attributes:
        score: 0 to 1.
        pixels: Decoded; like `map` and `mask` only where pictures were asked for.
        map: [H, W].
        mask: [H, W].
        decode_s: Seconds of decoding and preparing it.
        inference_s: Seconds of its run, or of several images of one run its share; of a frozen batch always the whole.
    """

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
    pixels: Pixels | None = None
    decode_s: float = 0.0


@dataclass(slots=True)
class Pipeline:
    """Threads that decode and judge.

    Args:
        model: Judges batches; called by `runs` threads at a time.
        max_pixels: Larger images are refused before decoding.
        batch_size: Most images of one run; waits for none.
        runs: How many runs may go on at a time.
    """

    model: LoadedModel
    max_pixels: int
    batch_size: int = 1
    runs: int = 1
    _asked: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    _threads: list[threading.Thread] = field(default_factory=list)
    _many: threading.Event = field(default_factory=threading.Event)
    _loop: asyncio.AbstractEventLoop = field(init=False)

    def start(self) -> None:
        """Start the threads; call from the loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self.stand_aside(aside=False)
        for index in range(self.runs):
            work = partial(self._work, helps=index > 0)
            self._threads.append(threading.Thread(target=work, name=f"judge-{index}", daemon=True))
        for thread in self._threads:
            thread.start()

    def stand_aside(self, *, aside: bool) -> None:
        """Have one run at a time, or again all; a thread that waits for images now still takes some once."""
        if aside:
            self._many.clear()
        else:
            self._many.set()

    async def close(self) -> None:
        """Let what is under way end."""
        self.stand_aside(aside=False)
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

    def _work(self, *, helps: bool) -> None:
        tensor: Tensor | None = None
        while True:
            if helps:
                self._many.wait()
            if not (jobs := self._take()):
                return
            tensor = self._judge_all(jobs, tensor)

    def _take(self) -> list[_Job]:
        """Wait for an image, and take with it what else waits, up to this thread's share; none at the end.

        A frozen batch costs the same however full it is, so there the share is all of it.
        """
        first = self._asked.get()
        if first is None:
            return []
        jobs = [first]
        share = self.runs if self.model.manifest.fixed_batch is None and self._many.is_set() else 1
        for _ in range(min(self.batch_size - 1, self._asked.qsize() // share)):
            try:
                job = self._asked.get_nowait()
            except queue.Empty:  # another thread was first
                break
            if job is None:
                self._asked.put(None)
                break
            jobs.append(job)
        return jobs

    def _judge_all(self, jobs: list[_Job], tensor: Tensor | None) -> Tensor | None:
        """Judge what was taken, in one run where it is of one size.

        Args:
            jobs: What was taken.
            tensor: Left by the last call, to be filled again.

        Returns:
            What may be filled by the next call.
        """
        batch: list[_Job] = []
        for job in jobs:
            if job.future.done():  # who asked has gone
                continue
            began = time.perf_counter()
            try:
                pixels = decode(job.image, max_pixels=self.max_pixels)
                size = tensor_size(pixels, self.model.manifest.input)
                if tensor is None or tensor.shape[2:] != size or len(batch) == len(tensor):
                    decoded = time.perf_counter()
                    self._run(batch, tensor)
                    batch = []
                    began += time.perf_counter() - decoded  # the others' run is no part of this one's decoding
                    if tensor is None or tensor.shape[2:] != size:
                        tensor = self._room(size)
                to_tensor(pixels, self.model.manifest.input, out=tensor[len(batch)])
            except Exception as error:  # noqa: BLE001 - carried to who asked
                self._fail([job], error)
                continue
            if job.pictures:
                job.pixels = pixels
            job.decode_s = time.perf_counter() - began
            batch.append(job)
        self._run(batch, tensor)
        # One image as large as that is not held until the next comes.
        return tensor if tensor is not None and tensor[0, 0].size <= BATCH_PIXELS else None

    def _room(self, size: tuple[int, int]) -> Tensor:
        """For a batch of this size."""
        height, width = size
        count = max(1, min(self.batch_size, BATCH_PIXELS // (height * width)))
        return np.empty((count, 3, height, width), dtype=np.float32)

    def _run(self, batch: list[_Job], tensor: Tensor | None) -> None:
        if not batch or tensor is None:
            return
        began = time.perf_counter()
        pictures = any(job.pictures for job in batch)
        try:
            outputs = self.model.judge(tensor[: len(batch)], pictures=pictures)
            inference_s = time.perf_counter() - began
            if self.model.manifest.fixed_batch is None:
                inference_s /= len(batch)
            results = [_judged(job, outputs, index, inference_s) for index, job in enumerate(batch)]
        except Exception as error:  # noqa: BLE001 - the runtime's own kinds, or no memory, carried to who asked
            if len(batch) == 1:
                self._fail(batch, error)
                return
            for index, job in enumerate(batch):  # so that it is one image's alone
                self._run([job], tensor[index : index + 1])
            return
        self._loop.call_soon_threadsafe(_settle, batch, results)

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        def fail() -> None:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)

        self._loop.call_soon_threadsafe(fail)


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
