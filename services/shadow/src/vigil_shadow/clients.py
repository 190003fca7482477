"""Storage and candidate workers over gRPC."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable

from vigil_shadow import convert
from vigil_shadow.domain import Failed, Origin, Said
from vigil_shadow.ports import StoredFrame, StoredRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vigil_shadow.report import Report

CALL_S = 30.0
REVIEWS_AGE_S = 10.0
REVIEWS_PAGE = 1_000
# Statuses that may pass by themselves; the worker is busy, or a part is away.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
LABELS = {types_pb2.LABEL_NORMAL: False, types_pb2.LABEL_ANOMALOUS: True}


@contextmanager
def _translated(who: str) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        detail = f"{who}: {error.details()}"
        if error.code() in PASSING:
            raise Unavailable("SERVICE_AWAY", f"{detail}; try again", retry_after_s=1.0) from error
        raise InvalidInput("SERVICE_REFUSED", detail) from error


class StorageArchive:
    """Stored frames, from the storage service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: storage_pb2_grpc.FrameServiceAsyncStub = storage_pb2_grpc.FrameServiceStub(channel)

    async def page(self, model: str, where: StoredRange, *, size: int, token: str) -> tuple[list[StoredFrame], str]:
        """Frames by time, and where the next page begins."""
        request = storage_pb2.QueryRequest(
            model=model,
            camera=where.camera,
            start=convert.from_us(where.start_us),
            stop=convert.from_us(where.stop_us),
            page_size=size,
            page_token=token,
        )
        with _translated("storage"):
            answer = await self._stub.Query(request, timeout=CALL_S)
        return [_stored(frame) for frame in answer.frames], answer.next_page_token

    async def image(self, model: str, frame: StoredFrame) -> bytes | None:
        """A frame's image."""
        request = storage_pb2.GetRequest(model=model, frame_id=frame.frame_id, camera=frame.origin.camera)
        try:
            with _translated("storage"):
                return (await self._stub.Get(request, timeout=CALL_S)).image
        except InvalidInput as error:
            cause = error.__cause__
            if isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise


def _stored(frame: storage_pb2.StoredFrame) -> StoredFrame:
    live: Said | Failed = Failed(frame.failure_reason or "UNKNOWN")
    if frame.HasField("verdict"):
        live = convert.said_of(frame.verdict)
    origin = Origin(frame.header.camera, convert.to_us(frame.header.captured_at))
    return StoredFrame(frame.header.frame_id, origin, convert.to_us(frame.stored_at), live)


class StorageReviews:
    """What people said of the disagreements that storage has."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: storage_pb2_grpc.FrameServiceAsyncStub = storage_pb2_grpc.FrameServiceStub(channel)
        self._known: dict[tuple[str, str], tuple[float, tuple[int, int]]] = {}

    async def counts(self, report: Report) -> tuple[int, int]:
        """In how many of them the candidate is right, and live; at most `REVIEWS_AGE_S` old."""
        key = report.model, report.run
        read_at, counts = self._known.get(key, (float("-inf"), (0, 0)))
        if time.monotonic() - read_at < REVIEWS_AGE_S:
            return counts
        candidate_right = live_right = 0
        request = storage_pb2.QueryRequest(model=report.model, disagreement=True, reviewed=True, page_size=REVIEWS_PAGE)
        while True:
            with _translated("storage"):
                answer = await self._stub.Query(request, timeout=CALL_S)
            for frame in answer.frames:
                people = LABELS.get(frame.annotation.label)
                if people is None or not _of(report, frame):
                    continue
                if people == LABELS.get(frame.verdict.label):
                    live_right += 1
                else:
                    candidate_right += 1
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        self._known[key] = time.monotonic(), (candidate_right, live_right)
        return candidate_right, live_right


def _of(report: Report, frame: storage_pb2.StoredFrame) -> bool:
    """Whether a stored comparison is one of this report's pair of versions, by the thresholds that these have in it.

    A replay has no live version of its own: each stored verdict is live's there.
    """
    labels, live = frame.labels, report.text("live_digest")
    same_candidate = labels.get("candidate_digest") == report.text("candidate_digest") and _same(
        float(labels.get("candidate_threshold") or math.nan), report.threshold("candidate")
    )
    same_live = frame.verdict.model.digest == live and _same(frame.verdict.threshold, report.threshold("live"))
    return same_candidate and (not live or same_live)


def _same(one: float, other: float) -> bool:
    """Whether two thresholds are the same, one of which may have been rounded to 32 bits on its way."""
    return math.isclose(one, other, rel_tol=1e-6)


class WorkerJudge:
    """A candidate's worker, asked directly."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def version(self) -> tuple[str, int, str]:
        """Model, version and digest that it has."""
        with _translated("the candidate's worker"):
            answer = await self._stub.Describe(inference_pb2.DescribeRequest(), timeout=CALL_S)
        return answer.model.name, answer.model.version, answer.model.digest

    async def judge(self, frame_id: str, image: bytes) -> Said | Failed:
        """What it says of an image."""
        request = inference_pb2.PredictRequest(image=image, frame_id=frame_id)
        try:
            with _translated("the candidate's worker"):
                answer = await self._stub.Predict(request, timeout=CALL_S)
        except InvalidInput as error:
            return Failed(error.reason)
        return convert.said_of(answer.verdict)

    async def close(self) -> None:
        """Release the connection."""
        await self._channel.close()
