"""Storage and candidate workers over gRPC."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.logging import get_logger

from vigil_shadow import convert
from vigil_shadow.domain import Failed, Origin, Said
from vigil_shadow.ports import StoredFrame, StoredRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vigil_shadow.report import Report

CALL_S = 30.0
REVIEWS_AGE_S = 10.0
REVIEWS_PAGE = 1_000
# Looks rest for so many times what one takes; a page of one may lie behind millions of frames.
RESTS = 10
LOOK_S = 900.0
# A report waits for so long to have what is new.
QUICK_S = 0.5
# How much earlier than its comparison a frame that is compared may have been captured, to be looked for.
LATE_MS = 3_600_000
# Statuses that may pass by themselves; the worker is busy, or a part is away.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
# Statuses that say nothing of an image.
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
LABELS = {types_pb2.LABEL_NORMAL: False, types_pb2.LABEL_ANOMALOUS: True}

log = get_logger()


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


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one look found: in how many reviewed disagreements the candidate is right, and live."""

    counts: tuple[int, int]
    at: float
    took_s: float


class StorageReviews:
    """What people said of the disagreements that storage has.

    A look goes through every frame since the comparison began, which takes seconds for each 100,000. So it goes on
    beside the reports, which have what the last one found; only the first is waited for.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: storage_pb2_grpc.FrameServiceAsyncStub = storage_pb2_grpc.FrameServiceStub(channel)
        self._known: dict[tuple[str, str], _Counted] = {}
        self._looks: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def counts(self, report: Report) -> tuple[int, int]:
        """In how many of them the candidate is right, and live.

        Raises:
            Unavailable: Storage is away, and nothing was found before.
        """
        key = report.model, report.run
        known = self._known.get(key)
        if known is not None and time.monotonic() - known.at < max(REVIEWS_AGE_S, RESTS * known.took_s):
            return known.counts
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = asyncio.create_task(self._look(key, report))
            look.add_done_callback(lambda done: self._looked(key, done))
        if known is None:
            await asyncio.shield(look)  # whoever gives up, it goes on
        else:
            await asyncio.wait((look,), timeout=QUICK_S)
        return self._known[key].counts

    def _looked(self, key: tuple[str, str], done: asyncio.Task[None]) -> None:
        del self._looks[key]
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("reviews_not_counted", model=key[0], run=key[1], detail=str(error))

    async def _look(self, key: tuple[str, str], report: Report) -> None:
        began = time.monotonic()
        candidate_right = live_right = 0
        request = storage_pb2.QueryRequest(model=report.model, disagreement=True, reviewed=True, page_size=REVIEWS_PAGE)
        # A replay's frames may be of any time.
        if report.text("live_digest") and (started_ms := report.count("started_at_ms")):
            request.start.FromMilliseconds(max(0, started_ms - LATE_MS))
        while True:
            with _translated("storage"):
                answer = await self._stub.Query(request, timeout=LOOK_S)
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
        now = time.monotonic()
        self._known[key] = _Counted((candidate_right, live_right), now, now - began)


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
        """What it says of an image; an image that it can't judge is a failure, not so a token that it refuses."""
        request = inference_pb2.PredictRequest(image=image, frame_id=frame_id)
        try:
            with _translated("the candidate's worker"):
                answer = await self._stub.Predict(request, timeout=CALL_S)
        except InvalidInput as error:
            cause = error.__cause__
            if isinstance(cause, grpc.aio.AioRpcError) and cause.code() in REFUSED:
                raise
            return Failed(error.reason)
        return convert.said_of(answer.verdict)

    async def close(self) -> None:
        """Release the connection."""
        await self._channel.close()
