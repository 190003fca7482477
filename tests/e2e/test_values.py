"""Every ci/*-values.yaml of both charts, really installed where only restricted pods are let in.

What belongs to others (cert-manager, the Prometheus operator, KEDA, a load balancer) is not there: their definitions
are, so that the objects are really made, and what they would make (a Secret, an address) is made here.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import OWN, REGISTRY, TAG, image_settings
from tests.e2e.tools import (
    CONTAINER_SECURITY,
    POD_SECURITY,
    ROOT,
    certificates,
    redis_users,
    restricted,
    say,
    secret,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.tools import Cluster

CHARTS = ROOT / "charts"
DEFINITION = "anomalymodels.vigil.dev"
SERVERS = ("ingest", "storage", "shadow", "review", "valkey", "reductstore")
FOREIGN = (
    ("cert-manager.io", "v1", "Certificate", "certificates"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"),
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
    ("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
)
REDIS = """exec valkey-server --port 0 --tls-port 6379 --tls-auth-clients no --dir /data --appendonly yes \
--tls-cert-file /etc/tls/tls.crt --tls-key-file /etc/tls/tls.key --tls-ca-cert-file /etc/tls/ca.crt \
--protected-mode no --user default off --user vigil on ">$PASSWORD" '~*' '&*' +@all"""


def definition(group: str, version: str, kind: str, plural: str) -> dict[str, Any]:
    """Of somebody else's resource, that takes anything."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": [served]}
    metadata = {"name": f"{plural}.{group}"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": spec,
    }


class Site:
    """One installation: its namespaces, and what was made for it alone, to be removed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespaces: list[str] = []
        self.releases: list[tuple[str, str]] = []
        self.made: list[tuple[str, str]] = []

    def namespace(self, name: str) -> str:
        self.cluster.apply(restricted(name))
        self.namespaces.append(name)
        return name

    def make(self, *objects: dict[str, Any]) -> None:
        """Objects of the whole cluster; those that are there stay as they are."""
        for one in objects:
            kind, name = one["kind"].lower(), one["metadata"]["name"]
            if not self.cluster.kubectl("get", kind, name, "--ignore-not-found", "-o", "name"):
                self.cluster.apply(one)
                self.made.append((kind, name))

    def foreign(self, *kinds: str) -> None:
        """Definitions of other people's resources."""
        self.make(*(definition(*one) for one in FOREIGN if one[2] in kinds))
        for group, _, kind, plural in FOREIGN:
            if kind in kinds:
                condition = ("--for=condition=Established", f"crd/{plural}.{group}")
                self.cluster.kubectl("wait", *condition, "--timeout=30s")

    def install(self, release: str, namespace: str, chart: str, values: str, *settings: str) -> None:
        """Wait until all of it is ready."""
        file = CHARTS / chart / "ci" / f"{values}-values.yaml"
        self.releases.append((release, namespace))
        chosen = [f"--set={setting}" for setting in settings]
        common = ("--namespace", namespace, "--wait", "--timeout", "180s", "--values", str(file))
        self.cluster.helm("install", release, str(CHARTS / chart), *common, *chosen)

    def vigil(self, namespace: str, values: str, *settings: str, release: str = "vigil") -> None:
        self.install(release, namespace, "vigil", values, *image_settings(), *settings)

    def operator(self, namespace: str, values: str, *settings: str) -> None:
        there = self.cluster.kubectl("get", "crd", DEFINITION, "--ignore-not-found", "-o", "name")
        images = (f"image.registry={REGISTRY}", f"image.tag={TAG}")
        kept = ["crd.install=false"] if there else []
        self.install("vigil-operator", namespace, "vigil-operator", values, *images, *kept, *settings)

    def check(self, namespace: str, release: str = "vigil") -> None:
        """Every pod is ready, and the release's own test passes."""

        def all_ready() -> list[str]:
            pods = self.cluster.get("pods", "-n", namespace, "-l", "app.kubernetes.io/part-of=vigil")["items"]
            # The pod of an earlier `helm test` stays, and has ended.
            pods = [pod for pod in pods if pod["status"]["phase"] != "Succeeded"]
            states = [{part["type"]: part["status"] for part in pod["status"]["conditions"]} for pod in pods]
            ready = all(state.get("Ready") == "True" for state in states)
            return [pod["metadata"]["name"] for pod in pods] if ready else []

        names = wait_until("every pod ready", all_ready)
        told = self.cluster.helm("test", release, "--namespace", namespace, "--logs", "--timeout", "120s")
        lines = [line for line in told.splitlines() if line.startswith(("ingest:", "storage:"))]
        say(f"{len(names)} pods ready; {'; '.join(lines)}")
        assert len(lines) == 2, told

    def close(self) -> None:
        for release, namespace in reversed(self.releases):
            self.cluster.helm("uninstall", release, "-n", namespace, "--ignore-not-found", check=False)
        self.cluster.kubectl("delete", "namespace", *self.namespaces, "--timeout=120s", check=False)
        for kind, name in reversed(self.made):
            self.cluster.kubectl("delete", kind, name, "--ignore-not-found", check=False)


@pytest.fixture(scope="module", autouse=True)
def _alone(cluster: Cluster) -> None:
    """No other operator in the cluster that these tests have started."""
    cluster.kubectl("delete", "anomalymodels", "--all", "-n", "vigil-e2e", "--ignore-not-found", check=False)
    for release in ("vigil-operator", "vigil"):
        cluster.helm("uninstall", release, "-n", "vigil-e2e", "--ignore-not-found", "--wait")


@pytest.fixture
def site(cluster: Cluster) -> Iterator[Site]:
    """Removed afterwards."""
    found = Site(cluster)
    try:
        yield found
    finally:
        found.close()


def hosts(full: str, namespace: str) -> list[str]:
    """What NOTES says that the certificate must name, and this machine."""
    return [f"{full}-{part}{end}" for part in SERVERS for end in ("", f".{namespace}.svc")]


def secured(
    namespace: str, files: dict[str, str], tls: str = "vigil-tls", users: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The Secrets that the values name."""
    tokens = {name: secrets.token_hex(32) for name in ("service", "test")}
    roles = {"service": ["serve"], "test": ["stream", "review"]}
    known = [
        {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "roles": roles[name]}
        for name, token in tokens.items()
    ]
    return [
        secret(namespace, tls, files),
        secret(
            namespace, "vigil-redis", {"password": secrets.token_hex(16), "ca.crt": files["ca.crt"], **(users or {})}
        ),
        secret(namespace, "vigil-reduct", {"token": secrets.token_hex(16)}),
        secret(namespace, "vigil-tokens", {"tokens.yaml": json.dumps({"tokens": known})}),
        *(secret(namespace, f"vigil-{name}-token", {"token": token}) for name, token in tokens.items()),
    ]


def speaks_tls() -> list[str]:
    """On the own node the server of the wheel does not."""
    return ["valkey.image.repository=localhost/vigil/redis", "valkey.certificateReloadSeconds=0"] if OWN else []


def test_minimal(site: Site) -> None:
    namespace = site.namespace("values-minimal")
    site.vigil(namespace, "minimal")
    site.operator(namespace, "minimal")
    site.check(namespace)


def test_keda(site: Site) -> None:
    site.foreign("ScaledObject")
    namespace = site.namespace("values-keda")
    site.vigil(namespace, "keda")
    site.check(namespace)
    scaled = site.cluster.get("scaledobject", "vigil-ingest", "-n", namespace)["spec"]
    say(f"ScaledObject is there, no KEDA acts on it: {scaled['minReplicaCount']} to {scaled['maxReplicaCount']} pods")
    assert scaled["scaleTargetRef"]["name"] == "vigil-ingest"


def test_tls(site: Site, tmp_path: Path) -> None:
    namespace = site.namespace("values-tls")
    files = certificates(tmp_path / "tls", hosts("vigil", namespace))
    site.cluster.apply(*secured(namespace, files))
    site.vigil(namespace, "tls", *speaks_tls())
    site.operator(
        namespace,
        "minimal",
        *("secrets.redis=vigil-redis", "secrets.tls=vigil-tls"),
        *("secrets.token=vigil-service-token", "secrets.tokens=vigil-tokens"),
    )
    site.check(namespace)
    # And a Valkey with a password ends when it is told to, not at the end of its 30 s.
    asked = time.monotonic()
    site.cluster.kubectl("delete", "pod", "vigil-valkey-0", "-n", namespace)
    seconds = time.monotonic() - asked
    say(f"Valkey ended within {seconds:.1f} s")
    assert seconds < 20.0
    site.check(namespace)


def server(name: str, image: str, command: list[str], env: list[dict[str, Any]], port: int) -> list[dict[str, Any]]:
    """A Redis or ReductStore of somebody else's, in the namespace data."""
    metadata = {"name": name, "namespace": "data", "labels": {"app": name}}
    container = {
        "name": name,
        "image": image,
        "command": command,
        "env": env,
        "ports": [{"containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tls", "mountPath": "/etc/tls"}],
    }
    volumes = [{"name": "data", "emptyDir": {}}, {"name": "tls", "secret": {"secretName": "tls", "defaultMode": 0o440}}]
    spec = {"securityContext": POD_SECURITY, "containers": [container], "volumes": volumes}
    ports = {"selector": {"app": name}, "ports": [{"port": port}]}
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": ports},
    ]


def test_external(site: Site, tmp_path: Path) -> None:
    # Given a Redis and a ReductStore that are already there, with certificates and passwords
    site.namespace("data")
    files = certificates(tmp_path / "data", ["redis.data.svc", "reduct.data.svc"])
    password, token = secrets.token_hex(16), secrets.token_hex(16)

    def given(name: str, key: str, reference: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": reference, "key": key}}}

    redis, reduct = ("localhost/vigil/redis", "localhost/vigil/reductstore") if OWN else ("", "")
    site.cluster.apply(
        secret("data", "tls", files),
        secret("data", "given", {"password": password, "token": token}),
        *server(
            "redis",
            f"{redis}:{TAG}" if redis else "docker.io/valkey/valkey:9.1.2-bookworm",
            ["sh", "-c", REDIS],
            [given("PASSWORD", "password", "given")],
            6379,
        ),
        *server(
            "reduct",
            f"{reduct}:{TAG}" if reduct else "docker.io/reduct/store:v1.21.5",
            ["reductstore"],
            [
                given("RS_API_TOKEN", "token", "given"),
                {"name": "RS_DATA_PATH", "value": "/data"},
                {"name": "RS_CERT_PATH", "value": "/etc/tls/tls.crt"},
                {"name": "RS_CERT_KEY_PATH", "value": "/etc/tls/tls.key"},
                {"name": "RS_ENGINE_COMPACTION_INTERVAL", "value": "1"},
            ],
            8383,
        ),
    )
    site.cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "-n", "data", "--timeout=60s")
    # when both charts are told of them
    namespace = site.namespace("values-external")
    site.cluster.apply(
        secret(namespace, "vigil-redis", {"password": password, "ca.crt": files["ca.crt"]}),
        secret(namespace, "vigil-redis-ca", {"ca.crt": files["ca.crt"]}),
        secret(namespace, "vigil-reduct", {"token": token}),
        secret(namespace, "vigil-reduct-ca", {"ca.crt": files["ca.crt"]}),
    )
    site.vigil(namespace, "external")
    site.operator(namespace, "external")
    # then everything works with these, and none is brought along
    site.check(namespace)
    assert not site.cluster.get("statefulsets,pvc", "-n", namespace)["items"]


def test_full(site: Site, tmp_path: Path) -> None:
    # Given what the values name
    cluster = site.cluster
    site.foreign("Certificate", "ServiceMonitor", "PodMonitor", "PrometheusRule")
    provisioner = "kubernetes.io/host-path"
    for name in ("fast", "large"):
        kind = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "provisioner": provisioner}
        site.make({**kind, "metadata": {"name": name}})
    priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "production"}}
    site.make({**priority, "value": 1000})
    namespace = site.namespace("vigil")
    for models in ("line-1", "line-2"):
        site.namespace(models)
    files = certificates(tmp_path / "full", hosts("production-vigil", namespace))
    users = redis_users(tmp_path / "redis-users")
    cluster.apply(
        *secured(namespace, files, tls="production-vigil-tls", users=users), secret(namespace, "vigil-tls", files)
    )
    stop = threading.Event()

    def give_addresses() -> None:
        """What a load balancer's controller does."""
        status = json.dumps({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}})
        while not stop.wait(1.0):
            with suppress(RuntimeError):
                service = ("service", "production-vigil-ingest", "-n", namespace)
                cluster.kubectl("patch", *service, "--subresource=status", "--type=merge", "-p", status)
                return

    balancer = threading.Thread(target=give_addresses)
    balancer.start()
    # when both charts are installed with everything at once
    try:
        site.vigil(namespace, "full", "test.model=", *speaks_tls(), release="production")
        site.operator(namespace, "full")
    finally:
        stop.set()
        balancer.join()
    # then every pod is ready, by certificates on both sides, and what is for others is there
    site.check(namespace, "production")
    kinds = "certificate,servicemonitor,podmonitor,prometheusrule,ingress,hpa,pdb"
    found = sorted(f"{one['kind']} {one['metadata']['name']}" for one in cluster.get(kinds, "-n", namespace)["items"])
    say(f"taken, with nobody there to act on the first four: {', '.join(found)}")
    assert {one.split()[0] for one in found} == {
        *("Certificate", "ServiceMonitor", "PodMonitor", "PrometheusRule", "Ingress"),
        *("HorizontalPodAutoscaler", "PodDisruptionBudget"),
    }


def test_no_values_are_left_out() -> None:
    cases = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem.removesuffix("-values") for path in CHARTS.glob("*/ci/*-values.yaml")} <= cases
