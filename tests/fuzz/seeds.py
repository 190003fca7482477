"""Where mutation starts: small sound inputs of our own making, and what once broke a target (`corpus/TARGET/*`)."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from open_inference import grpc_predict_v2_pb2 as oip
from PIL import Image
from vigil.ingest.v1 import ingest_pb2
from vigil.storage.v1 import storage_pb2
from vigil.types.v1 import types_pb2
from vigil_common.bundle import Artefact, Manifest, ModelOutputs, ParitySample, pack
from vigil_storage.domain import PageToken

from tests.fuzz.mutate import mutated, mutated_message
from tests.fuzz.targets import MASK_SIZE, MESSAGES, MODEL, a_header, an_outcome

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

CORPUS = Path(__file__).parent / "corpus"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> list[bytes]:
    """Every format and kind of pixel that is read."""
    values = (np.arange(16 * 12 * 4) * 37 % 256).astype(np.uint8)
    colour = Image.fromarray(values.reshape(12, 16, 4)[:, :, :3].copy())
    grey, alpha = colour.convert("L"), Image.fromarray(values.reshape(12, 16, 4))
    deep = Image.fromarray(np.arange(16 * 12, dtype=np.uint16).reshape(12, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _encoded(colour, "JPEG", exif=exif)
    cmyk, progressive = _encoded(colour.convert("CMYK"), "JPEG"), _encoded(colour, "JPEG", progressive=True)
    palette = _encoded(colour.quantize(8), "PNG")
    tiffs = [_encoded(grey, "TIFF", compression=kind) for kind in ("raw", "tiff_lzw", "packbits", "tiff_deflate")]
    several = _encoded(grey, "TIFF", save_all=True, append_images=[grey])
    plain = [_encoded(one, kind) for one in (colour, grey) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]
    webp = _encoded(alpha, "WEBP", lossless=True)
    return [
        *plain,
        *tiffs,
        several,
        turned,
        cmyk,
        progressive,
        palette,
        _encoded(alpha, "PNG"),
        _encoded(deep, "PNG"),
        webp,
    ]


def _bundles() -> list[bytes]:
    artefact = Artefact(path="model.xml", files=("model.bin",))
    sound = Manifest(
        name=MODEL,
        artefacts={"openvino": artefact},
        outputs=ModelOutputs(score="pred_score", map="anomaly_map"),
        parity=(ParitySample(image="parity/0.png", score=0.5),),
        lineage={"metrics": {"auroc": 0.9}},
    )
    return [pack(sound, {"model.xml": b"<x/>", "model.bin": b"\x00" * 600, "parity/0.png": images()[1]})]


def _manifests() -> list[bytes]:
    return [
        (
            b"name: cells\nartefacts: {onnxruntime: {path: model.onnx, files: []}}\noutputs: {score: pred_score}\n"
            b"threshold: 0.5\ninput: {width: 32, height: 32, value_range: [0.0, 1.0]}\nlineage: {a: [1, &x b, *x]}\n"
        )
    ]


def _frame() -> ingest_pb2.Frame:
    frame = ingest_pb2.Frame(frame_id="f-1", model=MODEL, camera="c1", labels={"line": "a"}, image=images()[0])
    frame.captured_at.FromSeconds(1_700_000_000)
    frame.outputs.visualization = types_pb2.VISUALIZATION_FULL
    return frame


def _infer(*, raw: bool) -> bytes:
    image = images()[1]
    request = oip.ModelInferRequest(model_name=MODEL, model_version="1", id="f-1")
    found = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    if raw:
        request.raw_input_contents.append(len(image).to_bytes(4, "little") + image)
    else:
        found.contents.bytes_contents.append(image)
    request.outputs.add(name="anomaly_map")
    return request.SerializeToString()


def _queries() -> list[bytes]:
    token = PageToken(1_700_000_000_000_000, ("cells/c1",)).encode()
    sound = storage_pb2.QueryRequest(
        model=MODEL, camera="c1", start=Timestamp(seconds=1), version=2, page_token=token, min_score=0.5
    )
    return [sound.SerializeToString()]


def seeds(target: str) -> list[bytes]:
    """What a target starts from."""
    kept = [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]
    grey = Image.fromarray((np.arange(MASK_SIZE[0] * MASK_SIZE[1]).reshape(MASK_SIZE[::-1]) % 256).astype(np.uint8))
    made: dict[str, list[bytes]] = {
        "image_header": images(),
        "image_pixels": images(),
        "bundle": _bundles(),
        "manifest": _manifests(),
        "ingest_frame": [ingest_pb2.StreamRequest(frame=_frame()).SerializeToString()],
        "open_inference": [_infer(raw=False), _infer(raw=True)],
        "stored_outcome": [an_outcome().SerializeToString()],
        "stored_header": [a_header().SerializeToString()],
        "query": _queries(),
        "annotation": [
            storage_pb2.AnnotateRequest(model=MODEL, frame_id="f-1", label=types_pb2.LABEL_NORMAL).SerializeToString()
        ],
        "mask": [_encoded(grey, "PNG"), _encoded(grey.convert("1"), "PNG")],
        "routing_record": [
            (
                b"version\x001\x00digest\x00sha256:1\x00threshold\x00\x00generation\x007\x00comparison\x005\x00"
                b"candidate_version\x002\x00candidate_digest\x00sha256:2\x00candidate_threshold\x000.5\x00sample_fraction\x000.5"
            )
        ],
        "shadow_outcome": [an_outcome().SerializeToString()],
        "shadow_header": [a_header().SerializeToString()],
    }
    return [*made[target], *kept]


def changed(target: str, pool: Sequence[bytes], chance: random.Random) -> bytes:
    """A mutation of one of the pool: of its bytes, or of its fields where it is a message."""
    kind = MESSAGES.get(target)
    if kind is not None and chance.random() < 0.75:
        with suppress(DecodeError):
            return mutated_message(kind, pool, chance)
    return mutated(pool, chance)
