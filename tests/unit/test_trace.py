"""Trace context is carried along where it is valid, and begun where it is not."""

from __future__ import annotations

import pytest
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
