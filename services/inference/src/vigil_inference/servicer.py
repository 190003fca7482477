"""vigil.inference.v1: convert in, await, convert out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_common.access import authorize
from vigil_common.errors import QueueFull
from vigil_common.streams.ports import check_threshold

from vigil_inference import convert

if TYPE_CHECKING:
    import grpc
    from vigil.types.v1 import types_pb2

    from vigil_inference.pipeline import Pipeline
    from vigil_inference.worker import Worker


# Calls that wait for the model or their pictures, each with its image in memory.
MAX_WAITING = 64
RETRY_AFTER_S = 0.5


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Predict and Describe."""

    def __init__(
        self,
        pipeline: Pipeline,
        worker: Worker,
        version: types_pb2.ModelVersion,
        *,
        threads: int,
    ) -> None:
        self._pipeline = pipeline
        self._worker = worker
        self._version = version
        self._threads = threads
        self._waiting = 0

    async def Predict(
        self, request: inference_pb2.PredictRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.PredictResponse:
        """Judge one image now; WORKER_BUSY where too many wait already."""
        authorize(self._version.name)
        threshold = request.threshold if request.HasField("threshold") else self._worker.threshold
        check_threshold(threshold)
        if self._waiting >= MAX_WAITING:
            raise QueueFull(
                "WORKER_BUSY", f"{MAX_WAITING} images wait for this worker; try again", retry_after_s=RETRY_AFTER_S
            )
        pictures = convert.wants_pictures(request.outputs)
        received_us = time.time_ns() // 1000
        self._waiting += 1
        try:
            judged = await self._pipeline.judge(request.image, pictures=pictures)
            found = convert.verdict(
                judged,
                frame_id=request.frame_id,
                model=self._version,
                threshold=threshold,
                received_us=received_us,
                read_us=received_us,
            )
            if pictures:
                await convert.draw(found, judged, request.outputs)
        finally:
            self._waiting -= 1
        return inference_pb2.PredictResponse(verdict=found)

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.DescribeResponse:
        """What is loaded."""
        authorize(self._version.name)
        return convert.description(
            self._pipeline.model,
            self._version,
            threads=self._threads,
            batch_size=self._pipeline.batch_size,
            runs=self._pipeline.runs,
            role=self._worker.role,
        )
