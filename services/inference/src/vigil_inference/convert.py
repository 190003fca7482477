"""Between protobuf and what the pipeline gives."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from vigil.inference.v1 import inference_pb2
from vigil.types.v1 import types_pb2
from vigil_common.errors import InvalidInput

from vigil_inference import visualize
from vigil_inference.roles import Role

if TYPE_CHECKING:
    from vigil_common.pixels import Pixels

    from vigil_inference.model import LoadedModel
    from vigil_inference.pipeline import Judged

HALF = 128
ROLES = {
    Role.IDLE: inference_pb2.ROLE_UNSPECIFIED,
    Role.LIVE: inference_pb2.ROLE_LIVE,
    Role.CANDIDATE: inference_pb2.ROLE_CANDIDATE,
}


def wants_pictures(options: types_pb2.OutputOptions) -> bool:
    """Whether map or mask are needed at all."""
    return options.anomaly_map or options.mask or options.visualization > types_pb2.VISUALIZATION_NONE


def verdict(
    judged: Judged, *, frame_id: str, model: types_pb2.ModelVersion, threshold: float, received_us: int, read_us: int
) -> types_pb2.Verdict:
    """The verdict without pictures; times in microseconds since 1970, `received_us` 0 where it never queued.

    Raises:
        InvalidInput: SCORE_NOT_FINITE.
    """
    if not math.isfinite(judged.score):
        raise InvalidInput("SCORE_NOT_FINITE", f"the model gave {judged.score} as the score; its graph is broken")
    found = types_pb2.Verdict(
        frame_id=frame_id,
        model=model,
        score=judged.score,
        label=types_pb2.LABEL_ANOMALOUS if judged.score >= threshold else types_pb2.LABEL_NORMAL,
        threshold=threshold,
    )
    timing = found.timing
    timing.decode.FromMicroseconds(round(judged.decode_s * 1e6))
    timing.inference.FromMicroseconds(round(judged.inference_s * 1e6))
    if received_us:
        timing.queue.FromMicroseconds(max(0, read_us - received_us))
        timing.total.FromMicroseconds(max(0, time.time_ns() // 1000 - received_us))
    return found


# A picture of a large image takes a hundred megabytes while it is drawn.
_DRAWING = ThreadPoolExecutor(2, thread_name_prefix="draw")


async def draw(found: types_pb2.Verdict, judged: Judged, options: types_pb2.OutputOptions) -> None:
    """`add_pictures` beside the loop, few at a time."""
    await asyncio.get_running_loop().run_in_executor(_DRAWING, add_pictures, found, judged, options)


def add_pictures(found: types_pb2.Verdict, judged: Judged, options: types_pb2.OutputOptions) -> None:
    """Draw what was asked for into the verdict; slow, so not on the loop."""
    assert judged.pixels is not None  # noqa: S101 - kept because pictures were asked for
    mask = judged.mask
    if mask is None and judged.map is not None:
        mask = judged.map >= found.threshold
    if options.anomaly_map and judged.map is not None:
        _fill(found.anomaly_map, visualize.map_pixels(judged.map))
    if options.mask and mask is not None:
        _fill(found.mask, visualize.mask_pixels(mask))
    drawn: Pixels | None = None
    if options.visualization == types_pb2.VISUALIZATION_SIMPLE and mask is not None:
        drawn = visualize.simple(judged.pixels, mask)
    elif options.visualization == types_pb2.VISUALIZATION_FULL and mask is not None:
        anomaly_map = judged.map if judged.map is not None else mask.astype(np.float32)
        label = "anomalous" if found.label == types_pb2.LABEL_ANOMALOUS else "normal"
        drawn = visualize.full(judged.pixels, anomaly_map, mask, f"{found.score:.3f} {label}")
    if drawn is not None:
        _fill(found.visualization, drawn, jpeg=options.visualization_format == types_pb2.IMAGE_FORMAT_JPEG)


def add_small_pictures(found: types_pb2.Verdict, judged: Judged) -> None:
    """Map and mask as shadow compares them: grey PNGs of at most `visualize.SMALL` pixels a side, some kilobytes."""
    mask = judged.mask
    if judged.map is not None:
        _fill(found.anomaly_map, visualize.small(visualize.map_pixels(judged.map)))
        if mask is None:
            mask = judged.map >= found.threshold
    if mask is not None:
        _fill(found.mask, (visualize.small(visualize.mask_pixels(mask)) >= HALF).astype(np.uint8) * np.uint8(255))


def _fill(picture: types_pb2.Picture, pixels: Pixels, *, jpeg: bool = False) -> None:
    picture.format = types_pb2.IMAGE_FORMAT_JPEG if jpeg else types_pb2.IMAGE_FORMAT_PNG
    picture.data = visualize.encode(pixels, jpeg=jpeg)
    picture.height, picture.width = pixels.shape[:2]


def description(
    model: LoadedModel, version: types_pb2.ModelVersion, *, threads: int, batch_size: int, runs: int, role: Role
) -> inference_pb2.DescribeResponse:
    """What is loaded."""
    manifest = model.manifest
    response = inference_pb2.DescribeResponse(
        model=version,
        engine=model.engine.name,
        engine_version=model.engine.version,
        precision=model.engine.precision,
        artefact=model.artefact,
        choice=model.choice,
        threads=threads,
        runs=runs,
        batch_size=manifest.fixed_batch or batch_size,
        batch_fixed=manifest.fixed_batch is not None,
        input_width=manifest.input.width or 0,
        input_height=manifest.input.height or 0,
        default_threshold=manifest.threshold,
        gives_map=manifest.outputs.map is not None,
        gives_mask=manifest.outputs.mask is not None,
        role=ROLES[role],
        ready=True,
    )
    response.load_time.FromMicroseconds(round(model.proven.load_s * 1e6))
    response.warm_up_time.FromMicroseconds(round(model.proven.warm_up_s * 1e6))
    for sample in model.parity:
        response.parity.add(
            sample=sample.sample,
            expected_score=sample.expected,
            actual_score=sample.actual,
            tolerance=sample.tolerance,
            passed=sample.passed,
        )
    return response
