"""What strangers' bytes reach: functions of bytes that return or raise `VigilError`; anything else is a bug."""

from __future__ import annotations

import asyncio
import io
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError
from open_inference import grpc_predict_v2_pb2 as oip
from vigil.ingest.v1 import ingest_pb2
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.bundle import MANIFEST, BundleCheck, digest, open_bundle
from vigil_common.errors import InvalidBundle, VerdictTimeout, VigilError
from vigil_common.images import inspect
from vigil_common.pixels import decode
from vigil_common.store import labels as gate
from vigil_common.store.ports import StoredRecord
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import QueuedFrame, QueuedOutcome
from vigil_common.streams.redis_routing import route_of
from vigil_common.trace import HEADER
from vigil_ingest.app import Ingest, Limits
from vigil_ingest.open_inference import OpenInferenceServicer
from vigil_ingest.servicer import IngestServicer
from vigil_shadow import convert as shadow_convert
from vigil_storage import convert, domain, masks

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

MODEL = "cells"
MAX_BYTES = 1 << 20
DEADLINE_EXCEEDED = 4
MAX_PIXELS = 1_000_000
MASK_SIZE = (16, 12)


def image_header(data: bytes) -> None:
    found = inspect(data, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    assert 0 < found.width * found.height <= MAX_PIXELS


def image_pixels(data: bytes) -> None:
    pixels = decode(data, max_pixels=MAX_PIXELS)
    assert pixels.dtype == np.uint8
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


def bundle(data: bytes) -> None:
    """Whole or in pieces the same is said."""
    check = BundleCheck(MAX_BYTES)
    piece = 1 + len(data) % 701
    said: Any
    try:
        for start in range(0, len(data), piece):
            check.feed(data[start : start + piece])
        said = check.finish().manifest
    except InvalidBundle as error:
        said = error.reason
    try:
        opened = open_bundle(data, max_bytes=MAX_BYTES)
    except InvalidBundle as error:
        # Several things may be wrong with it: which shows first depends on the pieces.
        _both_refuse(said, error)
        raise
    assert said == opened.manifest
    assert opened.digest == digest(data)


def _both_refuse(said: Any, error: InvalidBundle) -> None:
    assert isinstance(said, str), error.reason


def manifest(data: bytes) -> None:
    """vigil.yaml in a sound tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (("model.onnx", b"x"), (MANIFEST, data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    open_bundle(buffer.getvalue())


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


async def _ingest() -> Ingest:
    streams = MemoryStreams()
    await streams.routing.promote(MODEL, version=1, digest="sha256:1", threshold=None)
    return Ingest(streams.queue, streams.routing, replica="r", limits=Limits(MAX_BYTES, MAX_PIXELS, 0.0))


class _Context:
    """What a servicer asks of a call."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    async def abort_with_status(self, status: Any) -> None:
        raise VigilError(str(status.code), str(status.details))


def ingest_frame(data: bytes) -> str | None:
    """A frame on a stream is answered, whatever is in it."""
    request = _parsed(ingest_pb2.StreamRequest, data)
    if request is None:
        return None

    async def answered() -> Any:
        app = await _ingest()
        servicer = IngestServicer(app, window=1, stopping=asyncio.Event())
        try:
            for other in request.more[:2]:
                response = await servicer._answer([other], "", "fuzz")
                assert response.frame_id == other.frame.frame_id
            return await servicer._answer([request], data[:55].decode("latin-1"), "fuzz")
        finally:
            await app.close()

    response = asyncio.run(answered())
    assert response.frame_id == request.frame.frame_id
    assert response.WhichOneof("outcome") is not None
    if not response.HasField("error"):
        return "answered"
    # Nobody judges here: what waits for its verdict has been taken.
    return "taken" if response.error.code == DEADLINE_EXCEEDED else str(response.error.message)[:30]


def open_inference(data: bytes) -> None:
    request = _parsed(oip.ModelInferRequest, data)
    if request is None:
        return

    async def infer() -> None:
        app = await _ingest()
        context: Any = _Context([(HEADER, "00-x")])
        try:
            await OpenInferenceServicer(app, stopping=asyncio.Event()).ModelInfer(request, context)
        finally:
            await app.close()

    # Nobody judges here: what waits for its verdict has been taken.
    with suppress(VerdictTimeout):
        asyncio.run(infer())


def _stored(outcome: bytes, header: bytes) -> None:
    """Header and outcome as Redis gives them; what passes the gate comes back as it was."""
    record = convert.record_of(MODEL, QueuedOutcome("1-0", outcome, QueuedFrame("1-0", header, b"image")))
    gate.check(record)
    for value in record.labels.values():
        text = gate.encode(value)
        assert text.isascii()
        assert "\n" not in text
        assert gate.decode(text) == value
    size = len(record.body)
    stored = StoredRecord(record.entry, record.timestamp_us, record.labels, size, record.content_type)
    convert.stored_frame(stored).SerializeToString()


def stored_outcome(data: bytes) -> None:
    _stored(data, a_header().SerializeToString())


def stored_header(data: bytes) -> None:
    _stored(an_outcome().SerializeToString(), data)


def a_header() -> types_pb2.FrameHeader:
    """As ingest writes it."""
    header = types_pb2.FrameHeader(
        frame_id="f-1", model=MODEL, camera="c1", labels={"line": "a, b"}, content_type="image/png", width=16, height=12
    )
    header.sha256 = b"s" * 32
    header.captured_at.FromSeconds(1_700_000_000)
    header.received_at.FromSeconds(1_700_000_000)
    return header


def an_outcome() -> types_pb2.Outcome:
    """As a worker writes it."""
    verdict = types_pb2.Verdict(frame_id="f-1", score=0.25, label=types_pb2.LABEL_NORMAL, threshold=0.5)
    verdict.model.name, verdict.model.version, verdict.model.digest = MODEL, 1, "sha256:1"
    verdict.timing.total.FromMilliseconds(40)
    return types_pb2.Outcome(frame_id="f-1", verdict=verdict)


def query(data: bytes) -> None:
    request = _parsed(storage_pb2.QueryRequest, data)
    if request is None:
        return
    convert.filter_of(request)
    if request.page_token:
        token = domain.PageToken.decode(request.page_token)
        assert domain.PageToken.decode(token.encode()) == token


def annotation(data: bytes) -> None:
    request = _parsed(storage_pb2.AnnotateRequest, data)
    if request is not None:
        convert.remark_of(request)


def mask(data: bytes) -> None:
    kept = masks.canonical(data, width=MASK_SIZE[0], height=MASK_SIZE[1])
    assert masks.canonical(kept, width=MASK_SIZE[0], height=MASK_SIZE[1]) == kept


def routing_record(data: bytes) -> None:
    """The hash as somebody with Redis at hand may have left it."""
    parts = data.split(b"\x00")
    route_of(MODEL, dict(zip(parts[::2], parts[1::2], strict=False)))


def shadow_outcome(data: bytes) -> None:
    shadow_convert.said(data)


def shadow_header(data: bytes) -> None:
    shadow_convert.origin(data)


TARGETS: dict[str, Callable[[bytes], str | None]] = {
    target.__name__: target
    for target in (
        image_header,
        image_pixels,
        bundle,
        manifest,
        ingest_frame,
        open_inference,
        stored_outcome,
        stored_header,
        query,
        annotation,
        mask,
        routing_record,
        shadow_outcome,
        shadow_header,
    )
}


# Those whose input is one message.
MESSAGES: dict[str, type[Message]] = {
    "ingest_frame": ingest_pb2.StreamRequest,
    "open_inference": oip.ModelInferRequest,
    "query": storage_pb2.QueryRequest,
    "annotation": storage_pb2.AnnotateRequest,
    "shadow_outcome": types_pb2.Outcome,
    "stored_outcome": types_pb2.Outcome,
    "shadow_header": types_pb2.FrameHeader,
    "stored_header": types_pb2.FrameHeader,
}


def run(target: Callable[[bytes], str | None], data: bytes) -> str:
    """Run one input; says how it ended, in short: what has not been seen before leads somewhere new."""
    try:
        return target(data) or "taken"
    except VigilError as error:
        # Digits out: they repeat the input.
        return f"{error.reason} {''.join(c for c in error.message if not c.isdigit())[:40]}"
