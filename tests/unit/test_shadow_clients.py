"""Which reviews are counted for a comparison, and what a worker's answer says of an image."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput
from vigil_shadow import clients
from vigil_shadow.clients import StorageReviews, WorkerJudge
from vigil_shadow.domain import Failed, Said
from vigil_shadow.report import Report

if TYPE_CHECKING:
    from vigil.inference.v1 import inference_pb2

LIVE, CANDIDATE = (f"sha256:{letter * 64}" for letter in "ab")


class Storage:
    """Answers with these frames."""

    def __init__(self, *frames: storage_pb2.StoredFrame) -> None:
        self._frames = frames

    async def Query(self, _: storage_pb2.QueryRequest, timeout: float) -> storage_pb2.QueryResponse:  # noqa: ASYNC109, N802 - as gRPC's stub
        assert timeout
        return storage_pb2.QueryResponse(frames=self._frames)


def reviewed(live_threshold: float, candidate_threshold: float) -> storage_pb2.StoredFrame:
    """A false alarm of the candidate."""
    frame = storage_pb2.StoredFrame()
    frame.verdict.model.digest = LIVE
    frame.verdict.threshold = live_threshold
    frame.verdict.label = frame.annotation.label = types_pb2.LABEL_NORMAL
    frame.labels.update({"candidate_digest": CANDIDATE, "candidate_threshold": repr(candidate_threshold)})
    return frame


async def counted(fields: dict[str, str], *frames: storage_pb2.StoredFrame) -> tuple[int, int]:
    async with grpc.aio.insecure_channel("localhost:1") as channel:
        reviews = StorageReviews(channel)
        stub: Any = Storage(*frames)
        reviews._stub = stub
        return await reviews.counts(Report("cells", "12", {"candidate_digest": CANDIDATE, **fields}))


@pytest.mark.parametrize(
    ("live_threshold", "candidate_threshold", "expected"),
    [(0.5, 0.6, 1), (0.5, 0.6000000238418579, 1), (0.5, 0.3, 0), (0.4, 0.6, 0)],
)
async def test_reviews_count_where_both_versions_had_the_thresholds_of_this_comparison(
    live_threshold: float, candidate_threshold: float, expected: int
) -> None:
    fields = {"live_digest": LIVE, "live_threshold_used": "0.5", "candidate_threshold_used": "0.6"}
    assert await counted(fields, reviewed(live_threshold, candidate_threshold)) == (0, expected)


async def test_before_the_first_pair_no_review_counts() -> None:
    assert await counted({"live_digest": LIVE, "candidate_threshold": "0.6"}, reviewed(0.5, 0.6)) == (0, 0)


async def test_a_replay_counts_reviews_whatever_live_was() -> None:
    assert await counted({"candidate_threshold_used": "0.6"}, reviewed(0.4, 0.6), reviewed(0.5, 0.3)) == (0, 1)


class Slow(Storage):
    """Answers when it is let, and remembers what it was asked."""

    def __init__(self, *frames: storage_pb2.StoredFrame) -> None:
        super().__init__(*frames)
        self.let, self.asked = asyncio.Event(), list[storage_pb2.QueryRequest]()

    async def Query(self, request: storage_pb2.QueryRequest, timeout: float) -> storage_pb2.QueryResponse:  # noqa: ASYNC109, N802
        self.asked.append(request)
        await self.let.wait()
        return await super().Query(request, timeout)


async def test_a_look_goes_on_when_who_asked_has_given_up_and_later_reports_do_not_wait_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "REVIEWS_AGE_S", 0.0)
    monkeypatch.setattr(clients, "RESTS", 0)
    monkeypatch.setattr(clients, "QUICK_S", 0.01)
    fields = {"live_digest": LIVE, "live_threshold_used": "0.5", "candidate_threshold_used": "0.6"}
    report = Report("cells", "12", {"candidate_digest": CANDIDATE, "started_at_ms": "7200000", **fields})
    storage = Slow(reviewed(0.5, 0.6))
    async with grpc.aio.insecure_channel("localhost:1") as channel:
        reviews = StorageReviews(channel)
        stub: Any = storage
        reviews._stub = stub
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reviews.counts(report), 0.01)
        storage.let.set()
        assert await reviews.counts(report) == (0, 1)
        storage.let.clear()
        assert await reviews.counts(report) == (0, 1)
        storage.let.set()
    assert len(storage.asked) == 2
    assert storage.asked[0].start.ToMilliseconds() == 3_600_000


class Worker:
    """Refuses every image in this way."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    async def Predict(self, _: inference_pb2.PredictRequest, timeout: float) -> inference_pb2.PredictResponse:  # noqa: ASYNC109, N802 - as gRPC's stub
        assert timeout
        raise grpc.aio.AioRpcError(self._code, grpc.aio.Metadata(), grpc.aio.Metadata(), "no")


async def test_what_a_worker_says_of_an_image_is_told_from_what_it_says_of_a_token() -> None:
    async with grpc.aio.insecure_channel("localhost:1") as channel:
        judge = WorkerJudge(channel)

        async def judged(code: grpc.StatusCode) -> Said | Failed:
            worker: Any = Worker(code)
            judge._stub = worker
            return await judge.judge("f1", b"image")

        for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN):
            assert isinstance(await judged(code), Failed)
        for code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            with pytest.raises(InvalidInput, match="the candidate's worker: no"):
                await judged(code)
