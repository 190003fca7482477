"""What conditions say where the plan's tests don't come by."""

from __future__ import annotations

from datetime import UTC, datetime

from vigil_operator.conditions import conditions
from vigil_operator.observed import Observed, Problem, Resource, Workload
from vigil_operator.phases import Phase
from vigil_operator.spec import Spec
from vigil_operator.status import Status, VersionStatus

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "sha256:" + "1" * 64


def test_live_serves_and_says_that_some_of_its_workers_do_not() -> None:
    spec = Spec.model_validate({"source": {"model": "cells", "version": "1"}})
    resource = Resource("cells", "default", "1-2-3", 1, spec, None, "")
    live = VersionStatus(version=1, digest=DIGEST, since=NOW, ready_replicas=1)
    lacks = Problem("EngineMissing", "the bundle has no artefact for openvino", final=True)
    seen = Observed(None, None, {DIGEST: Workload(DIGEST, 2, 1, problems=(lacks,))})
    made = conditions(resource, Status(phase=Phase.LIVE, live=live), seen, None, NOW)
    ready = next(condition for condition in made if condition.type == "Ready")
    assert (ready.status, ready.reason) == ("True", "Serving")
    assert ready.message == (
        "version 1 serves, but not by all of its workers: EngineMissing: the bundle has no artefact for openvino"
    )
