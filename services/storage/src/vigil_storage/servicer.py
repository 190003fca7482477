"""The RPCs: convert in, await, convert out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil_common.access import authorize, may
from vigil_common.audit import audit
from vigil_common.errors import InvalidInput

from vigil_storage import convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_storage.app import Storage
    from vigil_storage.reviews import Reviews
    from vigil_storage.routes import Routes

# Of an exported image in one message: clients take 64 MiB, an image may have more.
IMAGE_PART_BYTES = 4 << 20


class FrameServicer(storage_pb2_grpc.FrameServiceServicer):
    """Stored frames, and what people say of them."""

    def __init__(self, app: Storage, reviews: Reviews) -> None:
        self._app = app
        self._reviews = reviews

    async def Query(self, request: storage_pb2.QueryRequest, _context: Any) -> storage_pb2.QueryResponse:
        """Frames that match, oldest first."""
        authorize(request.model)
        where = convert.filter_of(request)
        found, token = await self._app.query(where, page_size=request.page_size, token=request.page_token)
        return storage_pb2.QueryResponse(frames=map(convert.stored_frame, found), next_page_token=token)

    async def Get(self, request: storage_pb2.GetRequest, _context: Any) -> storage_pb2.GetResponse:
        """One frame by its id."""
        authorize(request.model)
        stored, image = await self._app.get(
            request.model, request.frame_id, request.camera, header_only=request.header_only
        )
        found = await self._reviews.reviewed(stored, image, with_mask=not request.header_only)
        if request.reviewer:
            await self._reviews.shown(stored, request.reviewer)
        said = map(convert.annotation, found.history)
        return storage_pb2.GetResponse(
            frame=convert.stored_frame(stored), image=image, annotations=said, mask=found.mask
        )

    async def Annotate(self, request: storage_pb2.AnnotateRequest, _context: Any) -> storage_pb2.AnnotateResponse:
        """What a person says of a frame."""
        authorize(request.model)
        said, applied = await self._reviews.annotate(convert.remark_of(request))
        audit("annotated", model=request.model, frame_id=request.frame_id, annotation_id=said.annotation_id)
        return storage_pb2.AnnotateResponse(annotation=convert.annotation(said), applied=applied)

    async def ReviewQueue(
        self, request: storage_pb2.ReviewQueueRequest, _context: Any
    ) -> storage_pb2.ReviewQueueResponse:
        """Frames worth a person's look."""
        authorize(request.model)
        where = convert.entry_filter(request.model, request.camera)
        since_us = convert.to_us(request.since) if request.HasField("since") else None
        given = await self._reviews.queue(
            where, request.reviewer, size=request.size, since_us=since_us, again=request.again, peek=request.peek
        )
        return storage_pb2.ReviewQueueResponse(items=(convert.review_item(*one) for one in given))

    async def Export(
        self, request: storage_pb2.ExportRequest, _context: Any
    ) -> AsyncIterator[storage_pb2.ExportResponse]:
        """Labelled frames, a message each, or several where the image is large."""
        authorize(request.model)
        where = convert.export_filter(request)
        async for found in self._reviews.export(where, decided=request.decided):
            yield storage_pb2.ExportResponse(
                frame=convert.stored_frame(found.frame),
                image=found.image[:IMAGE_PART_BYTES],
                annotations=map(convert.annotation, found.history),
                mask=found.mask,
            )
            for start in range(IMAGE_PART_BYTES, len(found.image), IMAGE_PART_BYTES):
                yield storage_pb2.ExportResponse(image=found.image[start : start + IMAGE_PART_BYTES])


class ModelServicer(storage_pb2_grpc.ModelServiceServicer):
    """Model versions."""

    def __init__(self, app: Storage) -> None:
        self._app = app

    async def Publish(
        self, request_iterator: AsyncIterator[storage_pb2.PublishRequest], _context: Any
    ) -> storage_pb2.PublishResponse:
        """The header, then the bundle in chunks."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("HEADER_MISSING", "the first message holds the header")
        header = first.header
        authorize(header.name)

        async def chunks() -> AsyncIterator[bytes]:
            async for request in request_iterator:
                if request.WhichOneof("part") == "header":
                    raise InvalidInput("HEADER_TWICE", "only the first message holds the header")
                if request.chunk:
                    yield request.chunk

        info, created = await self._app.publish(
            chunks(), name=header.name, version=header.version, digest=header.digest, size_bytes=header.size_bytes
        )
        return storage_pb2.PublishResponse(model=convert.model_of(info), created=created)

    async def List(self, request: storage_pb2.ListRequest, _context: Any) -> storage_pb2.ListResponse:
        """Versions by name and number."""
        found = await self._app.models.list(request.name or None)
        return storage_pb2.ListResponse(models=[convert.model_of(info) for info in found if may(info.name)])

    async def GetModel(self, request: storage_pb2.GetModelRequest, _context: Any) -> storage_pb2.GetModelResponse:
        """One version."""
        authorize(request.name)
        info = await self._app.models.get(request.name, request.version or None)
        return storage_pb2.GetModelResponse(model=convert.model_of(info))

    async def Download(
        self, request: storage_pb2.DownloadRequest, _context: Any
    ) -> AsyncIterator[storage_pb2.DownloadResponse]:
        """The header, then the bundle in chunks."""
        authorize(request.name)
        info = await self._app.models.get(request.name, request.version or None)
        yield storage_pb2.DownloadResponse(model=convert.model_of(info))
        async for chunk in self._app.models.download(info):
            yield storage_pb2.DownloadResponse(chunk=chunk)

    async def Deprecate(self, request: storage_pb2.DeprecateRequest, _context: Any) -> storage_pb2.DeprecateResponse:
        """Why a version should not be used any more."""
        authorize(request.name)
        info = await self._app.deprecate(request.name, request.version, request.reason)
        return storage_pb2.DeprecateResponse(model=convert.model_of(info))


class RouteServicer(storage_pb2_grpc.RouteServiceServicer):
    """Which version of a model judges its frames."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    async def ListRoutes(self, request: storage_pb2.ListRoutesRequest, _context: Any) -> storage_pb2.ListRoutesResponse:
        """What is live, of one model or of all that the caller may see."""
        if request.model:
            authorize(request.model)
        routes = await self._routes.current(request.model)
        return storage_pb2.ListRoutesResponse(routes=[convert.route_of(route) for route in routes if may(route.model)])

    async def Promote(self, request: storage_pb2.PromoteRequest, _context: Any) -> storage_pb2.PromoteResponse:
        """Make a version live."""
        authorize(request.model)
        threshold = request.threshold if request.HasField("threshold") else None
        route = await self._routes.promote(request.model, request.version, threshold, force=request.force)
        return storage_pb2.PromoteResponse(route=convert.route_of(route))

    async def StartComparison(
        self, request: storage_pb2.StartComparisonRequest, _context: Any
    ) -> storage_pb2.StartComparisonResponse:
        """Compare a version with live."""
        authorize(request.model)
        threshold = request.threshold if request.HasField("threshold") else None
        fraction = request.sample_fraction if request.HasField("sample_fraction") else 1.0
        route = await self._routes.start_comparison(request.model, request.version, threshold, fraction)
        return storage_pb2.StartComparisonResponse(route=convert.route_of(route))

    async def StopComparison(
        self, request: storage_pb2.StopComparisonRequest, _context: Any
    ) -> storage_pb2.StopComparisonResponse:
        """Compare nothing with live any more."""
        authorize(request.model)
        route = await self._routes.stop_comparison(request.model)
        return storage_pb2.StopComparisonResponse(route=convert.route_of(route))
