"""The whole platform on a real cluster: each test goes on from where the one before it left the cluster."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from vigil_cli.demo_shadow import inverted
from vigil_trainer import train

from tests.e2e.conftest import NEXT_TAG, OWN, REGISTRY, TAG, image_settings
from tests.e2e.tools import (
    ROOT,
    ClientPod,
    Cluster,
    certificates,
    check_account,
    redis_users,
    restricted,
    say,
    secret,
    wait_until,
)
from tests.support.cells import load_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NAMESPACE, RELEASE, MODEL = "vigil-e2e", "vigil", "cells"
MEMORY_LIMIT_MB = 700
# A frame of the built-in model takes some 20 ms of one core, and two cores are shared by all.
RATE = 10.0


class Platform:
    """The release under test, and a client beside it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.client = ClientPod(cluster, NAMESPACE)
        self.ids: list[str] = []

    def install(self, *settings: str, tag: str = TAG, operator: Sequence[str] = ()) -> float:
        """Both charts, or what changed in them; seconds until all is ready."""
        started = time.monotonic()
        common = ("upgrade", "--install", "--namespace", NAMESPACE, "--wait", "--timeout", "150s")
        sizes = ["valkey.persistence.size=1Gi", "reductstore.persistence.size=2Gi", "valkey.maxmemory=512mb"]
        chosen = [f"--set={value}" for value in (*image_settings(tag), *sizes, *settings)]
        self.cluster.helm(*common, RELEASE, str(ROOT / "charts/vigil"), *chosen)
        chosen = [f"--set={value}" for value in (f"image.registry={REGISTRY}", f"image.tag={tag}", *operator)]
        self.cluster.helm(*common, f"{RELEASE}-operator", str(ROOT / "charts/vigil-operator"), *chosen)
        return time.monotonic() - started

    def pods(self, selector: str = "") -> list[dict[str, Any]]:
        """Pods of the namespace that are not on their way out."""
        found = self.cluster.get("pods", "-n", NAMESPACE, *(["-l", selector] if selector else []))["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, selector: str) -> int:
        """How many of them are ready."""
        conditions = [
            {part["type"]: part["status"] for part in pod["status"].get("conditions", ())}
            for pod in self.pods(selector)
        ]
        return sum(states.get("Ready") == "True" for states in conditions)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each pod's processes."""
        script = "cat /proc/[0-9]*/status | awk '/^VmRSS/ {sum += $2} END {print sum}'"
        found = {}
        for pod in self.pods():
            name = pod["metadata"]["name"]
            if pod["status"]["phase"] == "Running" and name != self.client.name:
                told = self.cluster.kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", script)
                found[name] = int(told) / 1024
        return found

    def model(self, version: int, **spec: Any) -> None:
        """Ask for a version."""
        wanted = {"source": {"model": MODEL, "version": str(version)}, **spec}
        metadata = {"name": MODEL, "namespace": NAMESPACE}
        kind = {"apiVersion": "vigil.dev/v1alpha1", "kind": "AnomalyModel"}
        self.cluster.apply({**kind, "metadata": metadata, "spec": wanted})

    def status(self) -> dict[str, Any]:
        """Of the AnomalyModel."""
        found: dict[str, Any] = self.cluster.get("anomalymodel", MODEL, "-n", NAMESPACE).get("status", {})
        return found

    def wait_live(self, version: int, deadline_s: float = 180.0) -> dict[str, Any]:
        """Until a version is live and nothing is under way."""

        def live() -> dict[str, Any] | None:
            status = self.status()
            is_live = status.get("phase") == "Live" and str(status.get("live", {}).get("version")) == str(version)
            return status if is_live else None

        found: dict[str, Any] = wait_until(f"{MODEL} {version} live", live, deadline_s)
        return found

    def start_client(self, env: Mapping[str, str], secrets: Mapping[str, str], **more: bytes) -> None:
        """The client, with the cells; in place of an earlier one."""
        self.cluster.kubectl("delete", "pod", "-n", NAMESPACE, self.client.name, "--ignore-not-found")
        files = {f"cells/{number:03}.png": image for number, image in enumerate(load_cells().test_images)}
        files["client.py"] = (ROOT / "tests/e2e/client.py").read_bytes()
        addresses = {
            "VIGIL_ADDRESS": f"{RELEASE}-ingest:50051",
            "VIGIL_STORAGE_ADDRESS": f"{RELEASE}-storage:50053",
            "VIGIL_REDIS_URL": f"redis://{RELEASE}-valkey:6379/0",
        }
        self.client.start(f"{REGISTRY}/vigil/cli:{TAG}", {**addresses, **env}, secrets, {**files, **more})

    def publish(self, bundle: bytes, name: str) -> None:
        """Hand a bundle to the platform, from the client."""
        self.cluster.kubectl(
            "exec", "-i", "-n", NAMESPACE, self.client.name, "--", "sh", "-c", f"cat > /data/{name}", stdin=bundle
        )
        say(self.client.run("vigil", "model", "publish", f"/data/{name}").strip().splitlines()[-1])


@pytest.fixture(scope="module")
def platform(cluster: Cluster) -> Platform:
    """In a namespace of its own that only takes restricted pods."""
    cluster.apply(restricted(NAMESPACE))
    return Platform(cluster)


def test_both_charts_install_from_nothing_under_restricted_pod_security(platform: Platform) -> None:
    # Given an empty namespace, when both charts are installed
    seconds = platform.install()
    # then every pod is ready
    names = sorted(pod["metadata"]["name"] for pod in platform.pods())
    say(f"ready in {seconds:.0f} s: {', '.join(names)}")
    assert platform.ready("app.kubernetes.io/part-of=vigil") == len(names) >= 7
    # and the idle platform is small
    memory = platform.memory_mb()
    say(", ".join(f"{name} {used:.0f} MB" for name, used in sorted(memory.items())))
    say(f"together {sum(memory.values()):.0f} MB, at most {MEMORY_LIMIT_MB}")
    assert sum(memory.values()) <= MEMORY_LIMIT_MB


def test_cells_streamed_from_another_pod_are_judged_and_kept(platform: Platform) -> None:
    # Given a published model that an AnomalyModel asks for
    platform.start_client({}, {})
    cells = load_cells()
    platform.publish(train(cells.train[:80], name=MODEL).bundle, "v1.tar")
    started = time.monotonic()
    platform.model(1)
    platform.wait_live(1)
    say(f"live {time.monotonic() - started:.1f} s after kubectl apply")
    # when 300 cells are streamed
    account = platform.client.stream(MODEL, count=300, rate=50.0).result()
    # then each has its verdict and is stored once
    assert len(account["sent"]) == 300
    check_account(platform.client, MODEL, account)
    platform.ids += account["sent"]
    # and helm test sends an image and finds it again
    platform.install(f"test.model={MODEL}")
    told = platform.cluster.helm("test", RELEASE, "--namespace", NAMESPACE, "--logs", "--timeout", "120s")
    lines = [line for line in told.splitlines() if line.startswith(("verdict:", "storage: keeps"))]
    say("; ".join(lines))
    assert len(lines) == 2


def test_a_better_version_is_promoted_and_a_broken_one_is_not_under_a_running_stream(platform: Platform) -> None:
    # Given version 1 live under a running stream, and version 2 published
    second = train(load_cells().train[60:200], name=MODEL).bundle
    platform.publish(second, "v2.tar")
    stream = platform.client.stream(MODEL, count=100_000, rate=RATE)
    stream.wait_for_answers(20)
    # when version 2 is asked for
    gates = {"minFrames": 60, "minAnomalous": 3, "minDuration": "3s", "maxFlipFraction": 0.4}
    # On so few frames no candidate could be shown to fail less often than the default asks.
    gates |= {"maxErrorFraction": 0.1, "maxLatencyRatio": 10}
    asked = time.monotonic()
    platform.model(2, rollout={"gates": gates})
    # then it runs in shadow, passes its gates, and is promoted
    wait_until("shadow", lambda: platform.status().get("phase") == "Shadowing")
    status = platform.wait_live(2)
    say(f"version 2 live {time.monotonic() - asked:.0f} s after kubectl apply; {len(status['history'])} in its history")
    platform.cluster.kubectl(
        "wait", "--for=condition=Promoted", "-n", NAMESPACE, f"anomalymodel/{MODEL}", "--timeout=10s"
    )
    stream.wait_for_answers(20)
    # And when a version that says the opposite is asked for, it fails and version 2 stays
    platform.publish(inverted(second), "v3.tar")
    platform.model(3, rollout={"gates": gates})

    def failure() -> dict[str, Any] | None:
        status = platform.status()
        failed = status.get("phase") != "Shadowing" and status.get("lastFailure")
        return status if failed else None

    status = wait_until("version 3 to fail", failure, 180.0)
    say(f"version 3: {status['phase']}, {status['lastFailure']['reason']}: {status['lastFailure']['message'][:150]}")
    assert str(status["live"]["version"]) == "2"
    stream.wait_for_answers(20)
    # And when a person goes back, version 1 is live again
    platform.model(2, rollout={"gates": gates})
    platform.wait_live(2)
    request = f"vigil.dev/request=rollback - {time.time_ns()}"
    platform.cluster.kubectl("annotate", "--overwrite", "-n", NAMESPACE, f"anomalymodel/{MODEL}", request)

    def back() -> bool:
        return str(platform.status().get("live", {}).get("version")) == "1"

    asked = time.monotonic()
    wait_until("version 1 live again", back)
    say(f"back at version 1 after {time.monotonic() - asked:.1f} s")
    stream.wait_for_answers(20)
    # and no frame was lost by any of it
    account = stream.stop()
    check_account(platform.client, MODEL, account)
    assert set(account["versions"]) == {"1", "2"}
    platform.ids += account["sent"]
    platform.model(1)
    platform.wait_live(1)


def test_workers_scale_from_one_to_three_and_back_under_load(platform: Platform) -> None:
    # Given one worker under a running stream
    workers = f"vigil.dev/anomalymodel={MODEL}"
    assert platform.ready(workers) == 1
    stream = platform.client.stream(MODEL, count=100_000, rate=RATE)
    stream.wait_for_answers(30)
    # when there are three and then one again
    for replicas in (3, 1):
        platform.cluster.kubectl("scale", "-n", NAMESPACE, f"anomalymodel/{MODEL}", f"--replicas={replicas}")

        def settled(wanted: int = replicas) -> bool:
            return platform.ready(workers) == wanted == len(platform.pods(workers))

        wait_until(f"{replicas} workers", settled)
        stream.wait_for_answers(60)
        say(f"{replicas} workers, {stream.answers()} answers so far")
    # then no frame was lost
    account = stream.stop()
    check_account(platform.client, MODEL, account, also=platform.ids)
    platform.ids += account["sent"]


COLLECT = """
import json, pathlib, sys, time
sys.path.insert(0, "/data")
from collector import Collector
with Collector("0.0.0.0:4317") as collector:
    pathlib.Path("/data/collecting").touch()
    while not pathlib.Path("/data/collected").exists():
        time.sleep(0.1)
print(json.dumps([(one.service, one.name, one.span.trace_id.hex(), one.span.parent_span_id.hex() != "")
                  for one in collector.spans]))
"""


def test_a_frame_is_one_trace_across_the_pods(platform: Platform) -> None:
    # Given a collector beside the platform, which both charts are told of
    client = platform.client
    platform.start_client({}, {}, **{"collector.py": (ROOT / "tests/support/collector.py").read_bytes()})
    address = platform.cluster.get("pod", client.name, "-n", NAMESPACE)["status"]["podIP"]
    endpoint = f"otlp.endpoint=http://{address}:4317"
    command = platform.cluster.command("kubectl", "exec", "-n", NAMESPACE, client.name, "--", "python", "-c", COLLECT)
    collector = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(platform.cluster.environment))
    wait_until("the collector", lambda: not client.run("sh", "-c", "test -e /data/collecting || echo not yet"))
    workers = f"vigil.dev/anomalymodel={MODEL}"

    def settings() -> list[str]:
        return [pod["metadata"]["annotations"]["vigil.dev/settings"] for pod in platform.pods(workers)]

    (before,) = settings()
    platform.install(endpoint, "otlp.sampleRatio=1", operator=(endpoint,))
    wait_until("a worker that knows of it", lambda: before not in settings() and platform.ready(workers) == 1)
    # when frames are streamed
    account = client.stream(MODEL, count=30, rate=RATE).result()
    check_account(client, MODEL, account)
    platform.ids += account["sent"]
    platform.install()
    client.run("touch", "/data/collected")
    spans = json.loads(collector.communicate(timeout=60)[0])
    # then each frame is one trace, of ingest, worker and storage
    traces: dict[str, set[str]] = {}
    for service, name, trace, has_parent in spans:
        traces.setdefault(trace, set()).add(f"{service} {name}")
        assert has_parent is (name != "take frame")
    say(f"{len(spans)} spans of {len(traces)} traces: {', '.join(sorted(set().union(*traces.values())))}")
    assert len(traces) == 30
    whole = {"vigil-ingest take frame", "vigil-inference judge frame", "vigil-storage store frame"}
    assert all(found == whole for found in traces.values())


@pytest.mark.parametrize(
    "selector",
    [
        "app.kubernetes.io/component=ingest",
        f"vigil.dev/anomalymodel={MODEL}",
        "app.kubernetes.io/component=storage",
        "app.kubernetes.io/component=valkey",
        "app.kubernetes.io/component=reductstore",
        "app.kubernetes.io/component=shadow",
        "app.kubernetes.io/name=vigil-operator",
    ],
)
def test_pods_killed_under_load_lose_nothing(platform: Platform, selector: str) -> None:
    # Given a running stream
    before = len(platform.pods(selector))
    stream = platform.client.stream(MODEL, count=100_000, rate=RATE)
    stream.wait_for_answers(20)
    # when every pod of a kind is killed at once
    killed = time.monotonic()
    force = ("--force", "--grace-period=0", "--wait=false")
    platform.cluster.kubectl("delete", "pod", "-n", NAMESPACE, "-l", selector, *force)
    # then it comes back, the stream goes on
    wait_until(f"{selector} ready again", lambda: platform.ready(selector) == before)
    say(f"{before} pods killed, all ready again after {time.monotonic() - killed:.1f} s")
    stream.wait_for_answers(60)
    # and each accepted frame is stored once
    account = stream.stop()
    check_account(platform.client, MODEL, account)
    platform.ids += account["sent"]


def test_an_upgrade_under_load_loses_nothing(platform: Platform) -> None:
    # Given a running stream
    stream = platform.client.stream(MODEL, count=100_000, rate=RATE)
    stream.wait_for_answers(20)
    # when values and image tag change, of the platform, the operator and the workers
    seconds = platform.install("storage.batchSize=16", "ingest.window=128", tag=NEXT_TAG)
    workers = f"vigil.dev/anomalymodel={MODEL}"

    def rolled() -> bool:
        images = {pod["spec"]["containers"][0]["image"] for pod in platform.pods(workers)}
        return images == {f"{REGISTRY}/vigil/inference:{NEXT_TAG}"} and platform.ready(workers) == 1

    wait_until("workers of the next version", rolled)
    images = {pod["spec"]["containers"][0]["image"] for pod in platform.pods("app.kubernetes.io/part-of=vigil")}
    say(f"upgraded in {seconds:.0f} s; images {', '.join(sorted(images))}")
    assert f"{REGISTRY}/vigil/ingest:{NEXT_TAG}" in images
    assert f"{REGISTRY}/vigil/ingest:{TAG}" not in images
    stream.wait_for_answers(60)
    # then no frame is lost
    account = stream.stop()
    check_account(platform.client, MODEL, account)
    platform.ids += account["sent"]


def test_what_was_uninstalled_finds_everything_again(platform: Platform) -> None:
    # Given all frames of the tests before, when both releases go
    cluster = platform.cluster
    for release in (RELEASE, f"{RELEASE}-operator"):
        cluster.helm("uninstall", release, "--namespace", NAMESPACE, "--wait", "--timeout", "120s")
    # then the definition, the models and the volumes stay
    cluster.kubectl("get", "crd", "anomalymodels.vigil.dev")
    cluster.kubectl("get", "anomalymodel", MODEL, "-n", NAMESPACE)
    claims = [claim["metadata"]["name"] for claim in cluster.get("pvc", "-n", NAMESPACE)["items"]]
    say(f"kept: {', '.join(claims)}")
    assert len(claims) == 2
    # and once installed again the frames are there, and more can come
    platform.install()
    platform.wait_live(1)
    stored = platform.client.ask("stored", "--model", MODEL)
    lost = [name for name in platform.ids if name not in stored]
    say(f"{len(platform.ids) - len(lost)} of {len(platform.ids)} frames found again")
    assert not lost
    check_account(platform.client, MODEL, platform.client.stream(MODEL, count=50, rate=RATE).result())


def test_with_tls_and_tokens_only_who_is_known_gets_in(platform: Platform, tmp_path: Path) -> None:
    # Given certificates of one authority, tokens, and a Redis user for each service, in Secrets
    parts = ("ingest", "storage", "shadow", "review", "valkey", "reductstore")
    hosts = [f"{RELEASE}-{part}{end}" for part in parts for end in ("", f".{NAMESPACE}.svc")]
    files = certificates(tmp_path / "ours", [*hosts, f"vigil-{MODEL}.{NAMESPACE}.svc", "localhost"])
    stranger = certificates(tmp_path / "theirs", hosts)
    tokens = {name: secrets.token_hex(32) for name in ("service", "client")}
    known = [
        {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "roles": roles}
        for (name, token), roles in zip(tokens.items(), (["serve"], ["admin"]), strict=True)
    ]
    platform.cluster.apply(
        secret(NAMESPACE, "vigil-tls", files),
        secret(NAMESPACE, "vigil-redis", {**redis_users(tmp_path / "redis-users"), "ca.crt": files["ca.crt"]}),
        secret(NAMESPACE, "vigil-reduct", {"token": secrets.token_hex(16)}),
        secret(NAMESPACE, "vigil-tokens", {"tokens.yaml": json.dumps({"tokens": known})}),
        secret(NAMESPACE, "vigil-service-token", {"token": tokens["service"]}),
        secret(NAMESPACE, "vigil-client-token", {"token": tokens["client"]}),
    )
    # when everything is installed with them, on the volume of images and without that of the queue
    platform.cluster.helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "120s")
    platform.cluster.kubectl("delete", "pvc", "-n", NAMESPACE, f"data-{RELEASE}-valkey-0")
    server = ["valkey.image.repository=localhost/vigil/redis", "valkey.certificateReloadSeconds=0"] if OWN else []
    seconds = platform.install(
        *server,
        *("tls.enabled=true", "tls.existingSecret=vigil-tls", "valkey.existingSecret=vigil-redis"),
        "valkey.users=true",
        *("reductstore.existingSecret=vigil-reduct", "auth.enabled=true", "auth.tokensSecret=vigil-tokens"),
        *("auth.serviceTokenSecret=vigil-service-token", "test.tokenSecret=vigil-client-token", f"test.model={MODEL}"),
        operator=(
            *("secrets.redis=vigil-redis", "secrets.redisUsers=true", "secrets.tls=vigil-tls"),
            *("secrets.token=vigil-service-token", "secrets.tokens=vigil-tokens"),
        ),
    )
    say(f"all ready with TLS after {seconds:.0f} s")
    platform.start_client(
        {
            "VIGIL_REDIS_URL": f"rediss://admin@{RELEASE}-valkey:6379/0",
            "VIGIL_REDIS_PASSWORD_FILE": "/etc/vigil/redis/admin",
            "VIGIL_REDIS_CA_FILE": "/etc/vigil/redis/ca.crt",
            "VIGIL_TLS_CA_FILE": "/etc/vigil/redis/ca.crt",
            "VIGIL_TOKEN_FILE": "/etc/vigil/token/token",
        },
        {"redis": "vigil-redis", "token": "vigil-client-token"},
        **{"stranger.crt": stranger["ca.crt"].encode()},
    )
    # then the operator writes the lost route anew, which the status of before does not tell
    platform.wait_live(1)
    asked = f"vigil check --model {MODEL} 2>&1 || true"
    wait_until("the route", lambda: "keeps frame" in platform.client.run("sh", "-c", asked), 120.0)
    # and who has a token streams
    check_account(platform.client, MODEL, platform.client.stream(MODEL, count=50, rate=RATE).result())
    platform.cluster.helm("test", RELEASE, "--namespace", NAMESPACE, "--timeout", "120s")
    # who has none is told so
    told = platform.client.run("sh", "-c", "VIGIL_TOKEN_FILE= vigil check 2>&1 || true")
    say(told.strip().splitlines()[-1])
    assert "TOKEN_MISSING" in told
    # and who trusts another authority does not even connect
    told = platform.client.run("sh", "-c", "VIGIL_TLS_CA_FILE=/data/stranger.crt vigil check --deadline 5 2>&1 || true")
    say(" ".join(told.split())[:200])
    assert "CERTIFICATE_VERIFY_FAILED" in told or "UNAVAILABLE" in told
    assert "answers" not in told
