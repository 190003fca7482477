"""The RPCs: convert in, await, convert out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil_common.errors import InvalidInput

from vigil_storage import convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_storage.app import Storage

CHUNK_BYTES = 1 << 20
MAX_BUNDLE_BYTES = 1 << 30


class FrameServicer(storage_pb2_grpc.FrameServiceServicer):
    """Stored frames."""

    def __init__(self, app: Storage) -> None:
        self._app = app

    async def Query(self, request: storage_pb2.QueryRequest, _context: Any) -> storage_pb2.QueryResponse:
        """Frames that match, oldest first."""
        where = convert.filter_of(request)
        found, token = await self._app.query(where, page_size=request.page_size, token=request.page_token)
        return storage_pb2.QueryResponse(frames=map(convert.stored_frame, found), next_page_token=token)

    async def Get(self, request: storage_pb2.GetRequest, _context: Any) -> storage_pb2.GetResponse:
        """One frame by its id."""
        stored, image = await self._app.get(
            request.model, request.frame_id, request.camera, header_only=request.header_only
        )
        return storage_pb2.GetResponse(frame=convert.stored_frame(stored), image=image)


class ModelServicer(storage_pb2_grpc.ModelServiceServicer):
    """Model versions."""

    def __init__(self, app: Storage) -> None:
        self._app = app

    async def Publish(
        self, request_iterator: AsyncIterator[storage_pb2.PublishRequest], _context: Any
    ) -> storage_pb2.PublishResponse:
        """The header, then the bundle in chunks."""
        header: storage_pb2.PublishHeader | None = None
        bundle = bytearray()
        async for request in request_iterator:
            if request.WhichOneof("part") == "header":
                if header is not None:
                    raise InvalidInput("HEADER_TWICE", "only the first message holds the header")
                header = request.header
                continue
            if header is None:
                raise InvalidInput("HEADER_MISSING", "the first message holds the header")
            if len(bundle) + len(request.chunk) > MAX_BUNDLE_BYTES:
                raise InvalidInput("BUNDLE_TOO_LARGE", f"a bundle has at most {MAX_BUNDLE_BYTES} bytes")
            bundle += request.chunk
        if header is None:
            raise InvalidInput("HEADER_MISSING", "the first message holds the header")
        info, created = await self._app.publish(
            bytes(bundle), name=header.name, version=header.version, digest=header.digest
        )
        return storage_pb2.PublishResponse(model=convert.model_of(info), created=created)

    async def List(self, request: storage_pb2.ListRequest, _context: Any) -> storage_pb2.ListResponse:
        """Versions by name and number."""
        found = await self._app.models.list(request.name or None)
        return storage_pb2.ListResponse(models=map(convert.model_of, found))

    async def GetModel(self, request: storage_pb2.GetModelRequest, _context: Any) -> storage_pb2.GetModelResponse:
        """One version."""
        info = await self._app.models.get(request.name, request.version or None)
        return storage_pb2.GetModelResponse(model=convert.model_of(info))

    async def Download(
        self, request: storage_pb2.DownloadRequest, _context: Any
    ) -> AsyncIterator[storage_pb2.DownloadResponse]:
        """The header, then the bundle in chunks."""
        info = await self._app.models.get(request.name, request.version or None)
        bundle = await self._app.models.download(info.name, info.version)
        yield storage_pb2.DownloadResponse(model=convert.model_of(info))
        for offset in range(0, len(bundle), CHUNK_BYTES):
            yield storage_pb2.DownloadResponse(chunk=bundle[offset : offset + CHUNK_BYTES])
