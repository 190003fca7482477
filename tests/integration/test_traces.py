"""Frames' spans, from every process that touches them, as a collector receives them."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from vigil_client import Frame, VigilClient
from vigil_common.trace import traced

from tests.support.cells import load_cells
from tests.support.collector import Collector, Received
from tests.support.platform import MODEL, platform

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


def by_trace(spans: list[Received]) -> dict[bytes, dict[str, Received]]:
    found: dict[bytes, dict[str, Received]] = {}
    for received in spans:
        found.setdefault(received.span.trace_id, {})[received.name] = received
    return found


async def test_each_frame_is_one_trace_from_the_client_to_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = load_cells()
    images = cells.normal[:4] + cells.defective[:4]
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        async with platform(tmp_path) as vigil:
            with traced("client") as tracer:
                assert tracer is not None
                async with VigilClient(vigil.stack.ingest_address, tracer=tracer.sdk) as client:
                    frames = [Frame(image, MODEL, camera="line-1") for image in images]
                    results = {result.frame_id: result async for result in client.stream(frames)}
            await vigil.settled()
            stored, _ = await vigil.storage.frames_get(MODEL, frames[0].frame_id)
        traces = by_trace(await collector.wait_for(4 * len(images)))
    assert len(traces) == len(images)
    for spans in traces.values():
        sent, taken, judged, kept = (spans[name] for name in ("send frame", "take frame", "judge frame", "store frame"))
        assert [span.service for span in (sent, taken, judged, kept)] == [
            *("vigil-client", "vigil-ingest", "vigil-inference", "vigil-storage")
        ]
        assert not sent.span.parent_span_id
        assert taken.follows(sent)
        assert judged.follows(taken)
        assert kept.follows(taken)
        assert [span.span.kind for span in (sent, taken, judged, kept)] == [
            *(Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER, Span.SPAN_KIND_CONSUMER)
        ]
        frame_id = sent.attributes["vigil.frame_id"]
        verdict = results[frame_id].verdict
        assert verdict is not None
        for span in (taken, judged, kept):
            assert span.attributes["vigil.frame_id"] == frame_id
            assert span.attributes["vigil.model"] == MODEL
            assert span.span.end_time_unix_nano > span.span.start_time_unix_nano >= sent.span.start_time_unix_nano
        said = judged.attributes
        assert said["vigil.version"] == verdict.version == taken.attributes["vigil.version"]
        assert said["vigil.score"] == pytest.approx(verdict.score, abs=1e-6)
        assert said["vigil.label"] == ("anomalous" if verdict.anomalous else "normal")
        assert said["vigil.role"] == "live"
        assert taken.attributes["vigil.outcome"] == kept.attributes["vigil.outcome"] == "judged"
        # What the worker did lies within ingest's wait for it.
        assert judged.span.start_time_unix_nano >= taken.span.start_time_unix_nano
        assert judged.span.start_time_unix_nano <= taken.span.end_time_unix_nano
    # and from a stored frame its trace can be found
    assert bytes.fromhex(stored.labels["traceparent"].split("-")[1]) in traces


async def test_a_frame_that_fails_says_why_and_a_sampler_leaves_out_whole_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = load_cells().normal[0]
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        # A client that is traced decides for itself; where a trace begins at ingest, none is taken.
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        async with platform(tmp_path) as vigil:
            async with VigilClient(vigil.stack.ingest_address) as client:
                for _ in range(5):
                    assert (await client.submit(Frame(image, MODEL))).verdict is not None
            monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
            with traced("client") as tracer:
                assert tracer is not None
                async with VigilClient(vigil.stack.ingest_address, tracer=tracer.sdk) as client:
                    assert (await client.submit(Frame(image[:1500], MODEL))).error is not None
                    assert (await client.submit(Frame(image, "nobody"))).error is not None
            await vigil.settled()
        spans = await collector.wait_for(6)
    traces = by_trace(spans)
    assert Counter(len(one) for one in traces.values()) == {4: 1, 2: 1}
    truncated = next(one for one in traces.values() if len(one) == 4)
    assert truncated["judge frame"].span.status.code == Status.STATUS_CODE_ERROR
    assert truncated["judge frame"].span.status.message == "IMAGE_TRUNCATED"
    unknown = next(one for one in traces.values() if len(one) == 2)
    assert unknown["send frame"].attributes["error.type"] == "UNKNOWN_MODEL"
    assert unknown["take frame"].span.status.message == "unknown_model"


async def test_with_the_collector_away_frames_go_on_and_the_queue_of_spans_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = load_cells().normal[0]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    async with platform(tmp_path) as vigil, VigilClient(vigil.stack.ingest_address) as client:
        results = [result async for result in client.stream(Frame(image, MODEL) for _ in range(100))]
        assert all(result.verdict is not None for result in results)
        await vigil.settled()
        logs = (tmp_path / "stack" / "logs" / "ingest.log").read_text()
        assert "Queue full, dropping Span" in logs
        stopping = time.monotonic()
    # and no stop waits for it
    assert time.monotonic() - stopping < 15.0
