"""Open Inference Protocol v2: the standard's clients send encoded images as BYTES and read scores."""

from __future__ import annotations

import asyncio
import struct
import uuid
from typing import TYPE_CHECKING, Any

from grpc_status import rpc_status
from open_inference import grpc_predict_v2_pb2 as oip
from open_inference import grpc_predict_v2_pb2_grpc
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput, NotFound, VigilError
from vigil_common.trace import begin, continued

from vigil_ingest.app import FRAMES
from vigil_ingest.convert import DEFAULT_CAMERA, client, traceparent
from vigil_ingest.domain import Submission, is_frame_id

if TYPE_CHECKING:
    import grpc

    from vigil_ingest.app import Ingest

INPUT = "image"
PICTURES = ("anomaly_map", "mask", "visualization")
OUTPUTS = ("score", "label", "threshold", *PICTURES)
VISUALIZATIONS = {
    "none": types_pb2.VISUALIZATION_NONE,
    "simple": types_pb2.VISUALIZATION_SIMPLE,
    "full": types_pb2.VISUALIZATION_FULL,
}
MAX_IMAGES = 64
MAX_DIGITS = 20  # of 64 bits
LENGTH = struct.Struct("<I")


class OpenInferenceServicer(grpc_predict_v2_pb2_grpc.GRPCInferenceServiceServicer):
    """The standard's service on ingest's port."""

    def __init__(self, app: Ingest, *, stopping: asyncio.Event) -> None:
        self._app = app
        self._stopping = stopping

    async def ServerLive(
        self,
        request: oip.ServerLiveRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> oip.ServerLiveResponse:
        """Whether the process serves."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(
        self,
        request: oip.ServerReadyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> oip.ServerReadyResponse:
        """Whether it takes frames."""
        return oip.ServerReadyResponse(ready=not self._stopping.is_set())

    async def ModelReady(
        self,
        request: oip.ModelReadyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> oip.ModelReadyResponse:
        """Whether the model, or the version asked for, is live."""
        try:
            await self._app.route(request.name, _version(request.version))
        except VigilError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self,
        request: oip.ServerMetadataRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> oip.ServerMetadataResponse:
        """Who this is."""
        return oip.ServerMetadataResponse(name="vigil", version="0.1.0")

    async def ModelMetadata(
        self,
        request: oip.ModelMetadataRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> oip.ModelMetadataResponse:
        """Inputs and outputs."""
        route = await self._app.route(request.name, _version(request.version))
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=route.model,
            versions=[str(route.live.version)],
            platform="vigil",
            inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                tensor(name="score", datatype="FP32", shape=[-1]),
                tensor(name="label", datatype="BOOL", shape=[-1]),
                tensor(name="threshold", datatype="FP32", shape=[-1]),
                *(tensor(name=name, datatype="BYTES", shape=[-1]) for name in PICTURES),
            ],
        )

    async def ModelInfer(
        self, request: oip.ModelInferRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> oip.ModelInferResponse:
        """Judge each image of the batch; one bad image fails the call with its reason."""
        brought = traceparent(context)
        span = begin("take frames", brought)
        error = "ABORTED"
        try:
            response = await self._infer(request, context, span.traceparent if span else continued(brought))
            error = ""
        except VigilError as failure:
            error = failure.reason
            if isinstance(failure, InvalidInput):
                await asyncio.sleep(self._app.clients.refusal_delay_s(client(context)))
            raise
        finally:
            if span is not None:
                span.end({"vigil.model": request.model_name[:64], "vigil.request_id": request.id[:64]}, error=error)
        return response

    async def _infer(
        self, request: oip.ModelInferRequest, context: grpc.aio.ServicerContext[Any, Any], trace: str
    ) -> oip.ModelInferResponse:
        images = _images(request)
        wanted = [output.name for output in request.outputs]
        outputs = _options(request, wanted)
        who = client(context)
        ids = _frame_ids(request.id, len(images))
        frames = [
            Submission(
                frame_id=frame_id,
                model=request.model_name,
                model_version=_version(request.model_version),
                camera=request.parameters["camera"].string_param or DEFAULT_CAMERA
                if "camera" in request.parameters
                else DEFAULT_CAMERA,
                captured_at_us=None,
                labels={},
                image=image,
                traceparent=trace,
                client=who,
            )
            for frame_id, image in zip(ids, images, strict=True)
        ]
        verdicts = []
        with self._app.clients.call(who):
            try:
                async with asyncio.TaskGroup() as group:
                    judging = [group.create_task(self._judge(frame, outputs)) for frame in frames]
            except* VigilError as errors:
                raise _first(errors) from None
        for outcome in (task.result() for task in judging):
            if outcome.HasField("failure"):
                await context.abort_with_status(rpc_status.to_status(outcome.failure))
            verdicts.append(outcome.verdict)
        return _response(request, request.id or ids[0], verdicts, wanted)

    async def _judge(self, frame: Submission, outputs: types_pb2.OutputOptions) -> types_pb2.Outcome:
        try:
            received_at_us, future = await self._app.accept(frame, outputs, wait=True)
            assert future is not None  # noqa: S101 - asked for by wait=True
            outcome = await self._app.outcome(frame, future, received_at_us)
        except VigilError as error:
            FRAMES.labels(error.reason.lower()).inc()
            raise
        FRAMES.labels("judged" if outcome.HasField("verdict") else "failed").inc()
        return outcome


def _first(errors: BaseExceptionGroup[VigilError]) -> VigilError:
    found = errors.exceptions[0]
    return found if isinstance(found, VigilError) else _first(found)


def _frame_ids(request_id: str, count: int) -> list[str]:
    """The request's own id where a frame may be called so: the same request again is then judged once."""
    ids = [request_id] if count == 1 else [f"{request_id}.{index}" for index in range(count)]
    if all(map(is_frame_id, ids)):
        return ids
    return [str(uuid.uuid4()) for _ in range(count)]


def _version(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise NotFound("UNKNOWN_VERSION", f"versions are numbers, not {text[:32]!r}")
    return int(text)


def _images(request: oip.ModelInferRequest) -> list[bytes]:
    """The encoded images, from typed or raw contents (length-prefixed, little-endian)."""
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT or request.inputs[0].datatype != "BYTES":
        raise InvalidInput("INPUT_INVALID", f'give exactly one input, "{INPUT}" of type BYTES with encoded images')
    if not request.raw_input_contents:
        images = list(request.inputs[0].contents.bytes_contents)
    else:
        images, raw, position = [], request.raw_input_contents[0], 0
        while position < len(raw):
            if position + LENGTH.size > len(raw):
                raise InvalidInput("INPUT_INVALID", "raw BYTES contents end within a length")
            (length,) = LENGTH.unpack_from(raw, position)
            position += LENGTH.size
            if position + length > len(raw):
                raise InvalidInput("INPUT_INVALID", "raw BYTES contents end within an image")
            images.append(raw[position : position + length])
            position += length
    if not 1 <= len(images) <= MAX_IMAGES:
        raise InvalidInput("INPUT_INVALID", f"a request holds 1 to {MAX_IMAGES} images, this one has {len(images)}")
    return images


def _options(request: oip.ModelInferRequest, wanted: list[str]) -> types_pb2.OutputOptions:
    if unknown := next((name for name in wanted if name not in OUTPUTS), None):
        raise InvalidInput("OUTPUT_UNKNOWN", f"outputs are {', '.join(OUTPUTS)}, not {unknown[:32]!r}")
    named = request.parameters["visualization"].string_param if "visualization" in request.parameters else "none"
    if named not in VISUALIZATIONS:
        raise InvalidInput("INPUT_INVALID", f"parameter visualization is none, simple or full, not {named[:32]!r}")
    visualization = VISUALIZATIONS[named]
    if named == "none" and "visualization" in wanted:
        visualization = types_pb2.VISUALIZATION_FULL
    return types_pb2.OutputOptions(
        visualization=visualization, anomaly_map="anomaly_map" in wanted, mask="mask" in wanted
    )


def _response(
    request: oip.ModelInferRequest, frame_id: str, verdicts: list[types_pb2.Verdict], wanted: list[str]
) -> oip.ModelInferResponse:
    count = len(verdicts)
    tensors: list[tuple[str, str, bytes]] = [
        ("score", "FP32", struct.pack(f"<{count}f", *(verdict.score for verdict in verdicts))),
        ("label", "BOOL", bytes(verdict.label == types_pb2.LABEL_ANOMALOUS for verdict in verdicts)),
        ("threshold", "FP32", struct.pack(f"<{count}f", *(verdict.threshold for verdict in verdicts))),
    ]
    for name in PICTURES:
        pictures = [getattr(verdict, name).data for verdict in verdicts]
        if any(pictures):
            tensors.append((name, "BYTES", b"".join(LENGTH.pack(len(data)) + data for data in pictures)))
    tensors = [tensor for tensor in tensors if not wanted or tensor[0] in wanted]
    response = oip.ModelInferResponse(
        model_name=request.model_name,
        model_version=str(verdicts[0].model.version),
        id=frame_id,
        raw_output_contents=[data for _, _, data in tensors],
    )
    for name, datatype, _ in tensors:
        response.outputs.add(name=name, datatype=datatype, shape=[count])
    return response
