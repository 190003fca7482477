"""Trace context is carried along where it is valid, and begun where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vigil_common import trace
from vigil_common.errors import InvalidInput
from vigil_common.trace import continued, trace_id

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_valid_context_goes_on() -> None:
    assert continued(VALID) == VALID
    assert trace_id(VALID) == "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "00-x",
        VALID.upper(),
        "ff" + VALID[2:],
        VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        VALID + "\n",
    ],
)
def test_anything_else_begins_a_new_trace(bad: str) -> None:
    first, second = continued(bad), continued(bad)
    assert continued(first) == first
    assert trace_id(first) != trace_id(second)


def test_without_a_collector_nothing_is_begun_and_nothing_loaded() -> None:
    script = "import sys, vigil_ingest.bootstrap, vigil_common.lifecycle as l; "
    script += "from vigil_common.trace import traced, begin, wanted\n"
    script += f"with traced('ingest'): assert begin('x', {VALID!r}) is None and not wanted({VALID!r})\n"
    # The Redis client looks for the SDK by itself, for its metrics.
    script += "assert not {'vigil_common.otlp', 'opentelemetry.exporter', 'opentelemetry.sdk.trace'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={})


def test_a_protocol_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(InvalidInput, match="OTLP over grpc"), trace.traced("ingest"):
        pass
