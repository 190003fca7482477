"""Storage and workers over gRPC; protobuf in, this package's types out."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING

import grpc
import yaml
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.errors import Unavailable
from vigil_common.grpc.security import connect
from vigil_common.grpc.workers import worker_address

from vigil_review.domain import Detail, Frame, Said, Version

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from vigil_review.config import Settings

CALL_S = 30.0
PREDICT_S = 20.0
PAGE = 1_000
MOST_FRAMES = 10_000
NAMES = {
    types_pb2.LABEL_NORMAL: "normal",
    types_pb2.LABEL_ANOMALOUS: "anomalous",
    types_pb2.LABEL_UNSURE: "unsure",
}
VALUES = {name: value for value, name in NAMES.items()}
REASONS = {
    storage_pb2.REVIEW_REASON_DISAGREEMENT: "live and candidate disagree",
    storage_pb2.REVIEW_REASON_UNCERTAIN: "near the threshold",
    storage_pb2.REVIEW_REASON_RANDOM: "picked by chance",
}


class BackendError(Exception):
    """Storage's or a worker's answer was an error.

    Args:
        code: Of gRPC.
        message: As it was said.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise BackendError(error.code(), error.details() or error.code().name) from error


def _bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")] if token else []


class Backend:
    """Asks storage with the token of whoever looks, and workers with the service's own."""

    def __init__(self, settings: Settings) -> None:
        own = settings.model_copy(update={"token_file": None})
        self._settings = settings
        self._storage = connect(settings.storage_address, own)
        self._frames: storage_pb2_grpc.FrameServiceAsyncStub = storage_pb2_grpc.FrameServiceStub(self._storage)
        self._models: storage_pb2_grpc.ModelServiceAsyncStub = storage_pb2_grpc.ModelServiceStub(self._storage)
        self._routes: storage_pb2_grpc.RouteServiceAsyncStub = storage_pb2_grpc.RouteServiceStub(self._storage)
        self._workers: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Release connections."""
        for channel in (self._storage, *self._workers.values()):
            await channel.close()

    async def models(self, token: str, name: str = "") -> dict[str, list[Version]]:
        """Versions of each model, newest first."""
        with _translated():
            answer = await self._models.List(
                storage_pb2.ListRequest(name=name), metadata=_bearer(token), timeout=CALL_S
            )
        found: dict[str, list[Version]] = {}
        for model in answer.models:
            found.setdefault(model.version.name, []).insert(0, _version(model))
        return found

    async def roles(self, token: str, model: str) -> dict[int, str]:
        """Which version is "live", and which is its "candidate"."""
        found: dict[int, str] = {}
        route = await self._route_of(token, model)
        if route is not None:
            found[route.live.version] = "live"
            if route.HasField("candidate"):
                found[route.candidate.version] = "candidate"
        return found

    async def _route_of(self, token: str, model: str) -> storage_pb2.Route | None:
        """The model's route; None where nothing is live."""
        request = storage_pb2.ListRoutesRequest(model=model)
        with _translated():
            answer = await self._routes.ListRoutes(request, metadata=_bearer(token), timeout=CALL_S)
        return next(iter(answer.routes), None)

    async def queue(
        self, token: str, model: str, reviewer: str, *, size: int, again: bool
    ) -> list[tuple[str, str, str]]:
        """Frames to look at: id, camera and why."""
        request = storage_pb2.ReviewQueueRequest(model=model, reviewer=reviewer, size=size, again=again, peek=True)
        with _translated():
            answer = await self._frames.ReviewQueue(request, metadata=_bearer(token), timeout=CALL_S)
        return [
            (item.frame.header.frame_id, item.frame.header.camera, REASONS.get(item.reason, ""))
            for item in answer.items
        ]

    async def frame(self, token: str, model: str, frame_id: str, camera: str, *, reviewer: str = "") -> Detail:
        """One frame with its image and what was said of it; the queue gives it to the reviewer no more."""
        request = storage_pb2.GetRequest(model=model, frame_id=frame_id, camera=camera, reviewer=reviewer)
        with _translated():
            answer = await self._frames.Get(request, metadata=_bearer(token), timeout=CALL_S)
        return Detail(_frame(answer.frame), answer.image, tuple(map(_said, answer.annotations)), answer.mask)

    async def since(self, token: str, model: str, start: datetime) -> tuple[list[Frame], bool]:
        """Frames stored since then, oldest first, and whether these are all of them."""
        request = storage_pb2.QueryRequest(model=model, page_size=PAGE)
        request.start.FromDatetime(start)
        found: list[Frame] = []
        while len(found) < MOST_FRAMES:
            with _translated():
                answer = await self._frames.Query(request, metadata=_bearer(token), timeout=CALL_S)
            found += map(_frame, answer.frames)
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                return found, True
        return found, False

    async def has_judged(self, token: str, model: str) -> bool:
        """Whether any frame that the model judged is stored."""
        request = storage_pb2.QueryRequest(model=model, min_score=0.0, page_size=1)
        with _translated():
            answer = await self._frames.Query(request, metadata=_bearer(token), timeout=CALL_S)
        return bool(answer.frames)

    async def annotate(
        self,
        token: str,
        model: str,
        frame_id: str,
        *,
        camera: str,
        label: str,
        author: str,
        note: str,
        mask: bytes,
        annotation_id: str,
    ) -> bool:
        """Say something of a frame; whether it shows already."""
        request = storage_pb2.AnnotateRequest(
            model=model,
            frame_id=frame_id,
            camera=camera,
            label=VALUES[label],
            author=author,
            note=note,
            mask=mask,
            annotation_id=annotation_id,
        )
        with _translated():
            answer = await self._frames.Annotate(request, metadata=_bearer(token), timeout=CALL_S)
        return answer.applied

    @property
    def has_workers(self) -> bool:
        """Whether heat maps and masks can be asked for."""
        return bool(self._settings.inference_address)

    async def pictures(self, token: str, model: str, detail: Detail) -> tuple[bytes, bytes]:
        """The live version's heat map over the image, and its mask (PNG); empty where it gives none.

        Where that version judged the frame, it draws what it said then, though another threshold may decide now.
        """
        route = await self._route_of(token, model)
        try:
            address = worker_address(self._settings.inference_address, model, route.managed_by if route else "")
        except Unavailable as error:
            raise BackendError(grpc.StatusCode.UNAVAILABLE, error.message) from error
        if address not in self._workers:
            self._workers[address] = connect(address, self._settings)
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._workers[address]
        )
        outputs = types_pb2.OutputOptions(
            visualization=types_pb2.VISUALIZATION_FULL,
            visualization_format=types_pb2.IMAGE_FORMAT_PNG,
            mask=True,
        )
        request = inference_pb2.PredictRequest(image=detail.image, outputs=outputs)
        if detail.frame.score is not None and route is not None and route.live.version == detail.frame.version:
            request.threshold = detail.frame.threshold
        with _translated():
            answer = await stub.Predict(request, timeout=PREDICT_S)
        return answer.verdict.visualization.data, answer.verdict.mask.data


def _version(model: storage_pb2.Model) -> Version:
    metrics: dict[str, float] = {}
    manifest = yaml.safe_load(model.manifest)
    lineage = manifest.get("lineage") if isinstance(manifest, dict) else None
    measured = lineage.get("metrics") if isinstance(lineage, dict) else None
    if isinstance(measured, dict):
        metrics = {str(name): float(value) for name, value in measured.items() if isinstance(value, int | float)}
    return Version(
        version=model.version.version,
        digest=model.version.digest,
        published_at=model.published_at.ToDatetime(UTC),
        published_by=model.published_by,
        deprecated=model.deprecated,
        metrics=metrics,
    )


def _said(annotation: storage_pb2.Annotation) -> Said:
    return Said(
        label=NAMES.get(annotation.label, ""),
        author=annotation.author,
        at=annotation.annotated_at.ToDatetime(UTC),
        note=annotation.note,
        masked=annotation.masked,
    )


def _frame(stored: storage_pb2.StoredFrame) -> Frame:
    header, verdict, labels = stored.header, stored.verdict, stored.labels
    judged = stored.HasField("verdict")
    candidate = ""
    if "candidate_label" in labels:
        score = float(labels["candidate_score"])
        candidate = f"{labels['candidate_label']} {score:.3f} (version {labels['candidate_version']})"
    return Frame(
        frame_id=header.frame_id,
        camera=header.camera,
        captured_at=header.captured_at.ToDatetime(UTC),
        stored_at=stored.stored_at.ToDatetime(UTC),
        content_type=header.content_type,
        width=header.width,
        height=header.height,
        version=verdict.model.version if judged else 0,
        score=verdict.score if judged else None,
        threshold=verdict.threshold,
        label=NAMES.get(verdict.label, "") if judged else stored.failure_reason,
        candidate=candidate,
        human=NAMES.get(stored.annotation.label, ""),
    )
