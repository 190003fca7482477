from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vigil_common.evidence import Gates as EvidenceGates
from vigil_operator import crd
from vigil_operator.config import Settings as OperatorSettings
from vigil_operator.diagnose import last_words, problems_of
from vigil_operator.observed import Published, Resource, resolve
from vigil_operator.plan import gates_of
from vigil_operator.render import WorkerSettings, build_deployment, build_model, build_workers
from vigil_operator.spec import Gates, Numerics, Source, Spec, duration_s

GOLDEN = Path(__file__).parent.parent / "golden"
DIGEST = f"sha256:{'ab' * 32}"
PLAIN = WorkerSettings(
    image="registry.example/vigil/inference:0.1.0",
    redis_url="redis://valkey.vigil:6379/0",
    storage_address="storage.vigil:50053",
)
SECURE = replace(
    PLAIN,
    redis_url="rediss://inference@valkey.vigil:6380/0",
    redis_secret="vigil-redis",  # noqa: S106 - the name of one
    redis_users=True,
    tls_secret="vigil-tls",  # noqa: S106 - the name of one
    token_secret="vigil-token",  # noqa: S106 - the name of one
    tokens_secret="vigil-tokens",  # noqa: S106 - the name of one
    image_pull_policy="IfNotPresent",
    image_pull_secrets=("registry",),
    priority_class="vigil",
    operator_namespace="vigil-system",
    otlp_endpoint="https://collector.monitoring.svc:4317",
    otlp_certificate_file="/etc/vigil/tls/ca.crt",
    keda=True,
)
F32 = Numerics()
MINIMAL: dict[str, Any] = {"source": {"model": "cells", "version": "1"}}
FULL: dict[str, Any] = {
    **MINIMAL,
    "runtime": {"engine": "openvino", "precision": "bf16", "threads": 2, "batchSize": 4},
    "threshold": 0.5,
    "autoscaling": {"min": 2, "max": 8, "targetLag": 20},
    "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}},
    "nodeSelector": {"gpu": "none"},
    "tolerations": [{"key": "edge", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "imagePullSecrets": [{"name": "mine"}],
}


class _Plain(yaml.SafeDumper):
    """Without anchors, which nobody reads well."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - yaml's signature
        return True


def _resource(spec: dict[str, Any]) -> Resource:
    return Resource(
        "solar-cells", "line-1", "00000000-0000-0000-0000-000000000001", 3, Spec.model_validate(spec), None, ""
    )


@pytest.mark.parametrize(
    ("name", "spec", "settings"),
    [("minimal", MINIMAL, PLAIN), ("full", FULL, SECURE), ("full-without-keda", FULL, replace(SECURE, keda=False))],
)
def test_what_a_model_is_in_kubernetes_is_what_was_looked_at(
    name: str, spec: dict[str, Any], settings: WorkerSettings
) -> None:
    resource = _resource(spec)
    numerics = resource.spec.runtime.numerics
    made = [*build_model(resource, settings, DIGEST), *build_workers(resource, settings, 1, DIGEST, numerics)]
    text = yaml.dump_all(made, Dumper=_Plain, sort_keys=False, width=120)
    file = GOLDEN / f"operator-{name}.yaml"
    if os.environ.get("VIGIL_WRITE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text, "set VIGIL_WRITE_GOLDEN=1 to write it anew, then look at the difference"


def test_with_one_redis_password_for_all_everybody_logs_in_as_its_user() -> None:
    settings = replace(SECURE, redis_url="redis://vigil@there:6379", redis_users=False)
    deployment, _, scaled = build_workers(_resource(FULL), settings, 1, DIGEST, F32)
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["redis"]["secret"] == {"secretName": "vigil-redis"}
    assert scaled["spec"]["triggers"][0]["metadata"]["username"] == "vigil"
    (authentication,) = [part for part in build_model(_resource(FULL), settings, DIGEST) if "Trigger" in part["kind"]]
    assert authentication["spec"]["secretTargetRef"][0]["key"] == "password"


@pytest.mark.parametrize("user", [0, 1000650000])
def test_workers_run_as_who_the_chart_says_or_the_cluster_decides(user: int) -> None:
    settings = OperatorSettings(worker_image="a", worker_run_as_user=user).workers()
    made = build_deployment(_resource(MINIMAL), settings, 1, DIGEST, F32)
    security = made["spec"]["template"]["spec"]["securityContext"]
    assert [security.get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user or None] * 3
    assert security["runAsNonRoot"] is True


def test_without_a_live_version_there_is_no_service() -> None:
    kinds = [manifest["kind"] for manifest in build_model(_resource(MINIMAL), PLAIN, None)]
    assert kinds == ["ServiceAccount", "ConfigMap", "NetworkPolicy"]


def test_a_changed_setting_starts_new_pods_and_a_changed_threshold_does_not() -> None:
    def template(spec: dict[str, Any]) -> Any:
        return build_workers(_resource(spec), PLAIN, 1, DIGEST, F32)[0]["spec"]["template"]

    assert template(MINIMAL) == template({**MINIMAL, "threshold": 0.9})
    assert template(MINIMAL) != template({**MINIMAL, "runtime": {"threads": 2}})


def test_versions_of_one_model_may_run_otherwise() -> None:
    resource = _resource({**MINIMAL, "runtime": {"precision": "bf16"}})

    def given(numerics: Numerics) -> dict[str, str]:
        (container,) = build_workers(resource, PLAIN, 1, DIGEST, numerics)[0]["spec"]["template"]["spec"]["containers"]
        return {entry["name"]: entry["value"] for entry in container["env"]}

    assert given(F32)["VIGIL_PRECISION"] == "f32"
    assert given(resource.spec.runtime.numerics)["VIGIL_PRECISION"] == "bf16"
    shared = next(part for part in build_model(resource, PLAIN, DIGEST) if part["kind"] == "ConfigMap")
    assert not {"VIGIL_ENGINE", "VIGIL_PRECISION"} & set(shared["data"])


def test_autoscaling_leaves_the_number_of_workers_to_the_scaler() -> None:
    assert "replicas" not in build_workers(_resource(FULL), SECURE, 1, DIGEST, F32)[0]["spec"]


def test_the_committed_definition_is_up_to_date() -> None:
    assert crd.FILE.read_text() == crd.render()


def _fields(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, part in schema.get("properties", {}).items():
        found += _fields(part, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        found += _fields(schema["items"], f"{path}[]")
    return found


def test_every_field_is_described_for_kubectl_explain() -> None:
    root = crd.build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    for part in ("spec", "status"):
        bare = [path for path, schema in _fields(root[part]) if not schema.get("description") and path[-2:] != "[]"]
        assert not bare


def test_defaults_of_the_resource_are_those_of_the_evidence() -> None:
    assert gates_of(Gates()) == EvidenceGates()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("250ms", 0.25)])
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "spec",
    [
        {"source": {"model": "cells"}},
        {"source": {"model": "cells", "version": "1", "digest": DIGEST}},
        {"source": {"model": "Cells", "version": "1"}},
        {"source": {"model": "cells", "version": "0"}},
        {**MINIMAL, "threshold": 1.5},
        {**MINIMAL, "autoscaling": {"min": 3, "max": 2}},
        {**MINIMAL, "rollout": {"gates": {"maxFlipFraction": -0.1}}},
        {**MINIMAL, "rollout": {"timeout": "tomorrow"}},
        {**MINIMAL, "rollout": {"timeout": "10m"}},
        {**MINIMAL, "sourc": {}},
    ],
)
def test_nonsense_is_refused_without_kubernetes_too(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(spec)


@settings(deadline=None)  # the machine may stall
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), unique_by=lambda found: found[0]))
def test_latest_is_the_greatest_version_that_is_not_deprecated(rows: list[tuple[int, bool]]) -> None:
    versions = tuple(Published(number, f"sha256:{number:064x}", deprecated) for number, deprecated in rows)
    found = resolve(Source(model="cells", version="latest"), versions)
    usable = [number for number, deprecated in rows if not deprecated]
    assert (found.version if found else None) == (max(usable) if usable else None)


# --- what is wrong with pods


def _pod(container: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "w-0"}, "status": {"containerStatuses": [container]}}


def _ended(**terminated: Any) -> dict[str, Any]:
    return {"lastState": {"terminated": {"exitCode": 1, **terminated}}, "restartCount": terminated.pop("n", 0)}


BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff"}}
RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize(
    ("container", "reason", "final"),
    [
        ({"state": {"waiting": {"reason": "ImagePullBackOff"}}}, "ImagePullFailed", False),
        ({"state": {"waiting": {"reason": "CreateContainerConfigError"}}}, "ContainerConfigError", False),
        (_ended(reason="OOMKilled"), "OutOfMemory", False),
        (_ended(reason="OOMKilled") | {"restartCount": 2, "state": BACK_OFF}, "OutOfMemory", True),
        (_ended(reason="Error", message="boom"), "CrashLoop", False),
        (_ended(reason="Error", message="boom") | {"restartCount": 3, "state": BACK_OFF}, "CrashLoop", True),
        (_ended(reason="Error", message="boom") | {"restartCount": 9, "state": RUNNING}, "CrashLoop", False),
        (_ended(reason="OOMKilled") | {"restartCount": 9, "state": RUNNING}, "OutOfMemory", False),
        (
            _ended(message='{"event": "failed", "reason": "PARITY_FAILED", "status": "INVALID_ARGUMENT"}'),
            "ParityFailed",
            True,
        ),
        (_ended(message='{"event": "failed", "reason": "STORE_AWAY", "status": "UNAVAILABLE"}'), "StoreAway", False),
    ],
)
def test_what_is_wrong_is_read_off_a_pod(container: dict[str, Any], reason: str, *, final: bool) -> None:
    (problem,) = problems_of({"status": {}}, [_pod(container)])
    assert (problem.reason, problem.final) == (reason, final)


def test_what_a_ready_pod_has_behind_it_is_no_problem() -> None:
    container = _ended(reason="Error") | {"restartCount": 9, "state": RUNNING, "ready": True}
    assert problems_of({"status": {}}, [_pod(container)]) == ()


def test_pods_that_are_on_their_way_out_do_not_count() -> None:
    pod = _pod(_ended(reason="Error") | {"restartCount": 9})
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert problems_of({"status": {}}, [pod]) == ()


@pytest.mark.parametrize(("ready", "reasons"), [(0, ["Unschedulable", "Evicted"]), (1, [])])
def test_an_evicted_pod_that_was_replaced_is_no_problem(ready: int, reasons: list[str]) -> None:
    # The kubelet leaves it, with its container ended by force.
    evicted = _pod({"state": {"terminated": {"exitCode": 137, "reason": "Error"}}, "restartCount": 0})
    evicted["status"] |= {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    waiting = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    other: dict[str, Any] = {"metadata": {"name": "w-1"}, "status": {} if ready else {"conditions": [waiting]}}
    deployment = {"spec": {"replicas": 1}, "status": {"readyReplicas": ready}}
    assert [problem.reason for problem in problems_of(deployment, [evicted, other])] == reasons


def test_what_the_deployment_says_counts_too() -> None:
    conditions = [
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "violates PodSecurity"},
        {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"},
    ]
    found = problems_of({"status": {"conditions": conditions}}, [])
    assert [problem.reason for problem in found] == ["FailedCreate", "ProgressDeadlineExceeded"]


@given(st.text())
def test_last_words_of_anything_are_read_without_an_error(text: str) -> None:
    assert last_words(text) is None or '"failed"' in text
