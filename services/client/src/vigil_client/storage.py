"""What the storage service keeps: frames and models."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import tarfile
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING

from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil.types.v1 import types_pb2

from vigil_client import convert
from vigil_client.channel import Connected
from vigil_client.types import Failure, Model, ServiceError, StoredFrame, new_frame_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from datetime import datetime

    import grpc

    from vigil_client.types import Annotation, HumanLabel, ReviewedFrame, ReviewItem

_CHUNK_BYTES = 1024 * 1024
_BUFFER_BYTES = 16 * 1024 * 1024
_PAGE_SIZE = 500
# A publication may take its bundle's size over this longer than other calls.
_LEAST_BYTES_PER_S = 2**20
_NAME = re.compile(rb"^name: *([a-z0-9-]+) *$", re.MULTILINE)


class StorageClient(Connected):
    """Asks storage; every method raises `ServiceError` with the service's code, reason and message.

    Times that are asked for are local where they have no zone, as a frame's are.

    Args:
        address: Storage as "host:port".
        channel_credentials: For TLS; where None as the environment says, see `vigil_client.channel.connect`.
        token: Sent as a bearer token.
        timeout_s: For each call.
    """

    def __init__(
        self,
        address: str,
        *,
        channel_credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        super().__init__(address, channel_credentials, token)
        self._timeout_s = timeout_s

    @property
    def _frames(self) -> storage_pb2_grpc.FrameServiceAsyncStub:
        return storage_pb2_grpc.FrameServiceStub(self.channel)

    @property
    def _models(self) -> storage_pb2_grpc.ModelServiceAsyncStub:
        return storage_pb2_grpc.ModelServiceStub(self.channel)

    async def frames_query(
        self,
        model: str,
        *,
        camera: str | None = None,
        start: datetime | None = None,
        stop: datetime | None = None,
        version: int | None = None,
        anomalous: bool | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        failed: bool = False,
        human_label: HumanLabel | None = None,
        reviewed: bool | None = None,
        disagreement: bool | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[StoredFrame]:
        """Stored frames that match, oldest first, page by page as they are taken.

        Of `labels` each is one that a client sent the frame with, and has exactly this value.
        """
        label = {
            None: types_pb2.LABEL_UNSPECIFIED,
            False: types_pb2.LABEL_NORMAL,
            True: types_pb2.LABEL_ANOMALOUS,
        }[anomalous]
        request = storage_pb2.QueryRequest(
            model=model,
            camera=camera or "",
            version=version or 0,
            label=label,
            min_score=min_score,
            max_score=max_score,
            failed=failed,
            human_label=convert.HUMAN_LABELS[human_label] if human_label else types_pb2.LABEL_UNSPECIFIED,
            reviewed=reviewed,
            disagreement=disagreement,
            labels=labels,
        )
        if start is not None:
            request.start.FromDatetime(start.astimezone(UTC))
        if stop is not None:
            request.stop.FromDatetime(stop.astimezone(UTC))
        left = limit
        while left is None or left > 0:
            request.page_size = _PAGE_SIZE if left is None else min(_PAGE_SIZE, left)
            with convert.service_errors():
                response = await self._frames.Query(request, metadata=self.metadata, timeout=self._timeout_s)
            for frame in response.frames:
                yield convert.stored_frame(frame)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token
            left = None if left is None else left - len(response.frames)

    async def frames_get(self, model: str, frame_id: str, *, camera: str | None = None) -> tuple[StoredFrame, bytes]:
        """One frame with its encoded image."""
        request = storage_pb2.GetRequest(model=model, frame_id=frame_id, camera=camera or "")
        with convert.service_errors():
            response = await self._frames.Get(request, metadata=self.metadata, timeout=self._timeout_s)
        return convert.stored_frame(response.frame), response.image

    async def frames_history(
        self, model: str, frame_id: str, *, camera: str | None = None, reviewer: str = ""
    ) -> ReviewedFrame:
        """One frame with its encoded image, everything people said of it, and the mask that stands.

        Args:
            model: The model's name.
            frame_id: The frame's id.
            camera: Its camera; spares a search.
            reviewer: Who looks at it, so that the review queue gives it to them no more; empty for nobody.
        """
        request = storage_pb2.GetRequest(model=model, frame_id=frame_id, camera=camera or "", reviewer=reviewer)
        with convert.service_errors():
            response = await self._frames.Get(request, metadata=self.metadata, timeout=self._timeout_s)
        return convert.reviewed_frame(response)

    async def frames_annotate(
        self,
        model: str,
        frame_id: str,
        label: HumanLabel,
        *,
        author: str,
        mask: bytes | None = None,
        note: str = "",
        camera: str | None = None,
        annotation_id: str = "",
    ) -> Annotation:
        """Say what a frame shows; once this returns it can't be lost.

        Args:
            model: The model's name.
            frame_id: The frame's id.
            label: What it shows.
            author: Who says so.
            mask: A PNG of the image's size, grey or 1 bit, white where it is anomalous.
            note: Free text.
            camera: Its camera; spares a search.
            annotation_id: Makes saying it again harmless; a new one where it is empty.
        """
        request = storage_pb2.AnnotateRequest(
            model=model,
            frame_id=frame_id,
            camera=camera or "",
            label=convert.HUMAN_LABELS[label],
            mask=mask or b"",
            note=note,
            author=author,
            annotation_id=annotation_id or f"a{new_frame_id()}",
        )
        with convert.service_errors():
            response = await self._frames.Annotate(request, metadata=self.metadata, timeout=self._timeout_s)
        return convert.annotation(response.annotation)

    async def frames_review_queue(
        self,
        model: str,
        reviewer: str,
        *,
        camera: str | None = None,
        size: int = 20,
        since: datetime | None = None,
        again: bool = False,
        peek: bool = False,
    ) -> list[ReviewItem]:
        """Frames most worth a look, which this reviewer then is not given a second time.

        Args:
            model: The model's name.
            reviewer: Who will look.
            camera: Only this camera.
            size: At most so many.
            since: Only frames stored from then on.
            again: Behind the others also what this reviewer was given before, the longest ago first.
            peek: Do not count them as given before `frames_history` names the reviewer.
        """
        request = storage_pb2.ReviewQueueRequest(
            model=model, camera=camera or "", reviewer=reviewer, size=size, again=again, peek=peek
        )
        if since is not None:
            request.since.FromDatetime(since.astimezone(UTC))
        with convert.service_errors():
            response = await self._frames.ReviewQueue(request, metadata=self.metadata, timeout=self._timeout_s)
        return [convert.review_item(item) for item in response.items]

    async def frames_export(
        self,
        model: str,
        *,
        camera: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        decided: bool = False,
    ) -> AsyncIterator[ReviewedFrame]:
        """Frames that people labelled, oldest first; with `decided` without those they are unsure of."""
        request = storage_pb2.ExportRequest(model=model, camera=camera or "", decided=decided)
        if since is not None:
            request.since.FromDatetime(since.astimezone(UTC))
        if until is not None:
            request.until.FromDatetime(until.astimezone(UTC))
        found: storage_pb2.ExportResponse | None = None
        image = bytearray()
        with convert.service_errors():
            async for message in self._frames.Export(request, metadata=self.metadata):
                if message.HasField("frame"):
                    if found is not None:
                        break
                    found = message
                image += message.image
                if found is not None and len(image) >= found.frame.image_bytes:
                    yield replace(convert.reviewed_frame(found), image=bytes(image))
                    found = None
                    image.clear()
        if found is not None:
            what = f"of the image of {found.frame.header.frame_id} only {len(image)} bytes came"
            raise ServiceError(Failure("DATA_LOSS", "IMAGE_INCOMPLETE", what))

    async def models_publish(self, bundle: bytes | Path, *, name: str = "", version: int = 0) -> Model:
        """Publish a bundle, from memory or from a file that need not fit there.

        Args:
            bundle: The tar.
            name: The model's; read from the bundle where it is empty.
            version: 0 for the next free one.
        """

        def describe() -> storage_pb2.PublishHeader:
            digest, size_bytes = _digest(bundle)
            return storage_pb2.PublishHeader(
                name=name or _name_in(bundle), version=version, digest=f"sha256:{digest}", size_bytes=size_bytes
            )

        header = await asyncio.to_thread(describe)

        async def parts() -> AsyncIterator[storage_pb2.PublishRequest]:
            yield storage_pb2.PublishRequest(header=header)
            chunks = _chunks(bundle)
            while chunk := await asyncio.to_thread(next, chunks, b""):
                yield storage_pb2.PublishRequest(chunk=chunk)

        timeout_s = self._timeout_s + header.size_bytes / _LEAST_BYTES_PER_S
        with convert.service_errors():
            response = await self._models.Publish(parts(), metadata=self.metadata, timeout=timeout_s)
        return convert.model(response.model, created=response.created)

    async def models_deprecate(self, name: str, version: int, reason: str) -> Model:
        """Say why a version should not be used any more."""
        request = storage_pb2.DeprecateRequest(name=name, version=version, reason=reason)
        with convert.service_errors():
            response = await self._models.Deprecate(request, metadata=self.metadata, timeout=self._timeout_s)
        return convert.model(response.model)

    async def models_list(self, name: str = "") -> list[Model]:
        """All versions of one model, or of every model."""
        request = storage_pb2.ListRequest(name=name)
        with convert.service_errors():
            response = await self._models.List(request, metadata=self.metadata, timeout=self._timeout_s)
        return [convert.model(found) for found in response.models]

    async def models_get(self, name: str, version: int = 0) -> Model:
        """What is known of one version; the newest where the version is 0."""
        request = storage_pb2.GetModelRequest(name=name, version=version)
        with convert.service_errors():
            response = await self._models.GetModel(request, metadata=self.metadata, timeout=self._timeout_s)
        return convert.model(response.model)

    async def models_download(self, name: str, version: int = 0) -> tuple[Model, bytes]:
        """One version with its bundle, checked against its digest; the newest where the version is 0."""
        bundle = bytearray()
        found = await self._download(name, version, bundle.extend)
        return found, bytes(bundle)

    async def models_save(self, name: str, version: int, path: Path) -> Model:
        """Write one version's bundle to a file, which appears only once it is whole and checked."""
        partial = path.with_name(path.name + ".partial")
        try:
            with await asyncio.to_thread(partial.open, "wb") as file:
                found = await self._download(name, version, file.write)
            await asyncio.to_thread(partial.replace, path)
        finally:
            await asyncio.to_thread(partial.unlink, missing_ok=True)
        return found

    async def _download(self, name: str, version: int, write: Callable[[bytes], object]) -> Model:
        request = storage_pb2.DownloadRequest(name=name, version=version)
        found: Model | None = None
        digest = hashlib.sha256()
        with convert.service_errors():
            async for part in self._models.Download(request, metadata=self.metadata):
                if part.HasField("model"):
                    found = convert.model(part.model)
                else:
                    digest.update(part.chunk)
                    write(part.chunk)
        if found is None or found.digest != f"sha256:{digest.hexdigest()}":
            raise ServiceError(Failure("DATA_LOSS", "DIGEST_MISMATCH", "the bundle received is not its digest's"))
        return found


def _digest(bundle: bytes | Path) -> tuple[str, int]:
    """SHA-256 of a bundle in hexadecimal, and its length.

    The large buffer does more than save calls: once it is freed, malloc keeps what the chunks leave behind for the next
    ones, instead of taking new pages from the system for each, which is most of the work of sending a bundle.
    """
    digest, size_bytes = hashlib.sha256(), 0
    with io.BytesIO(bundle) if isinstance(bundle, bytes) else bundle.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            size_bytes += read
    return digest.hexdigest(), size_bytes


def _chunks(bundle: bytes | Path) -> Iterator[bytes]:
    with io.BytesIO(bundle) if isinstance(bundle, bytes) else bundle.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _name_in(bundle: bytes | Path) -> str:
    """The model's name in a bundle."""
    try:
        with tarfile.open(fileobj=io.BytesIO(bundle)) if isinstance(bundle, bytes) else tarfile.open(bundle) as tar:
            manifest = tar.extractfile("vigil.yaml")
            found = _NAME.search(manifest.read() if manifest else b"")
    except (tarfile.TarError, KeyError):
        found = None
    if found is None:
        what = bundle if isinstance(bundle, Path) else "what was given"
        message = f"{what} is no bundle; `vigil train` and `vigil model import` make one"
        raise ServiceError(Failure("INVALID_ARGUMENT", "BUNDLE_CORRUPT", message))
    return found[1].decode()
