"""The Kubernetes objects of a model, each as a plain dict for server-side apply.

A Deployment and a PodDisruptionBudget per version, with what scales it; a ServiceAccount, a ConfigMap, a Service and a
NetworkPolicy per model. All belong to the AnomalyModel, so Kubernetes removes them with it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vigil_operator.spec import GROUP, KIND, VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vigil_operator.observed import Resource
    from vigil_operator.spec import Autoscaling, Numerics, Runtime

MANAGER = "vigil-operator"
MODEL_LABEL = f"{GROUP}/anomalymodel"
DIGEST_LABEL = f"{GROUP}/digest"
DIGEST_ANNOTATION = f"{GROUP}/digest"
VERSION_ANNOTATION = f"{GROUP}/version"
NUMERICS_ANNOTATION = f"{GROUP}/numerics"
GRPC_PORT, METRICS_PORT, HEALTH_PORT = 50052, 9090, 50062
TLS_FOLDER, TOKEN_FOLDER, REDIS_FOLDER = "/etc/vigil/tls", "/etc/vigil/token", "/etc/vigil/redis"
CACHE_FOLDER = "/var/cache/vigil"
# A worker drains for up to 20 s after its last batch.
GRACE_S = 60
DIGEST_CHARACTERS = 8
USER = 65532

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What all workers have in common, from the operator's settings.

    Attributes:
        image: The inference image.
        redis_url: The queue, as workers reach it; without a password.
        storage_address: HOST:PORT of storage, as workers reach it.
        image_pull_policy: As in a Pod; empty for Kubernetes' default.
        image_pull_secrets: Names of Secrets in the models' namespaces.
        redis_secret: A Secret there with `password`, and `ca.crt` for rediss://; empty for none.
        redis_users: Whether it holds a password per user instead, `inference` and, for KEDA, `keda`.
        tls_secret: A Secret there with `tls.crt`, `tls.key` and `ca.crt`; empty for none.
        token_secret: A Secret there with `token`, for calls to storage; empty for none.
        tokens_secret: A Secret there with `tokens.yaml`: who may call the workers; empty for everybody.
        priority_class: The workers' PriorityClass; empty for none.
        run_as_user: The workers' user and group; 0 where the cluster decides, or else their image.
        keda: Whether the cluster has KEDA.
        operator_namespace: Where the operator is, whose calls are let in.
        log_level: Least level logged.
        otlp_endpoint: Where frames' spans go; empty for nowhere.
        otlp_certificate_file: A file in the workers with that collector's authority; empty for the image's own.
    """

    image: str
    redis_url: str
    storage_address: str
    image_pull_policy: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    redis_secret: str = ""
    redis_users: bool = False
    tls_secret: str = ""
    token_secret: str = ""
    tokens_secret: str = ""
    priority_class: str = ""
    run_as_user: int = USER
    keda: bool = False
    operator_namespace: str = ""
    log_level: str = "INFO"
    otlp_endpoint: str = ""
    otlp_certificate_file: str = ""


def revision(body: Manifest) -> int:
    """The revision of an object's state: opaque by older contracts, a growing number in every server there is."""
    text = body["metadata"].get("resourceVersion", "0")
    return int(text) if text.isdigit() else 0


def short(digest: str) -> str:
    """Enough of a digest for names and labels."""
    return digest.removeprefix("sha256:")[:DIGEST_CHARACTERS]


def workers_name(resource: Resource, digest: str) -> str:
    """Name of a version's Deployment."""
    return f"{resource.name}-{short(digest)}"


def service_name(resource: Resource) -> str:
    """Name of what a model has once; a Service's name has at most 63 characters and begins with a letter."""
    return f"vigil-{resource.name}"


def worker_selector(resource: Resource, digest: str | None) -> str:
    """Selects the pods of a version, or of every one."""
    every = f"{MODEL_LABEL}={resource.name}"
    return f"{every},{DIGEST_LABEL}={short(digest)}" if digest else every


def server_name(resource: Resource) -> str:
    """What the workers' certificate is issued for."""
    return f"{service_name(resource)}.{resource.namespace}.svc"


def build_model(resource: Resource, settings: WorkerSettings, live: str | None) -> list[Manifest]:
    """What a model has once; the Service leads to the live version's workers, and is left out while nothing is live."""
    objects = [
        build_service_account(resource, settings),
        build_config_map(resource, settings),
        build_network_policy(resource, settings),
    ]
    if settings.keda and settings.redis_secret and resource.spec.autoscaling is not None:
        objects.append(build_trigger_authentication(resource, settings))
    return [*objects, build_service(resource, live)] if live is not None else objects


def build_workers(
    resource: Resource, settings: WorkerSettings, version: int, digest: str, numerics: Numerics
) -> list[Manifest]:
    """What a version has."""
    objects = [
        build_deployment(resource, settings, version, digest, numerics),
        build_disruption_budget(resource, digest),
    ]
    scaling = resource.spec.autoscaling
    if scaling is None:
        return objects
    scaler = build_scaled_object if settings.keda else build_autoscaler
    return [*objects, scaler(resource, settings, scaling, digest)]


def _labels(resource: Resource, digest: str | None = None) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/name": "vigil-inference",
        "app.kubernetes.io/instance": resource.name,
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/part-of": "vigil",
        MODEL_LABEL: resource.name,
    }
    return {**labels, DIGEST_LABEL: short(digest)} if digest else labels


def _object(resource: Resource, api: str, kind: str, name: str, *, digest: str | None = None, **parts: Any) -> Manifest:
    owner = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": resource.name,
        "uid": resource.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata = {
        "name": name,
        "namespace": resource.namespace,
        "labels": _labels(resource, digest),
        "ownerReferences": [owner],
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **parts}


def build_service_account(resource: Resource, settings: WorkerSettings) -> Manifest:
    """Workers never call Kubernetes: no token."""
    secrets = [{"name": name} for name in settings.image_pull_secrets]
    extra: Manifest = {"imagePullSecrets": secrets} if secrets else {}
    name = service_name(resource)
    return _object(resource, "v1", "ServiceAccount", name, automountServiceAccountToken=False, **extra)


def numerics_environment(numerics: Numerics) -> dict[str, str]:
    """What a version's scores depend on, so each version has its own."""
    return {"VIGIL_ENGINE": numerics.engine, "VIGIL_PRECISION": numerics.precision}


def runtime_environment(runtime: Runtime) -> dict[str, str]:
    """How a worker runs its model, whichever version it is."""
    return {
        "VIGIL_THREADS": str(runtime.threads),
        "VIGIL_RUNS": str(runtime.runs),
        "VIGIL_BATCH_SIZE": str(runtime.batch_size),
    }


def environment(resource: Resource, settings: WorkerSettings) -> dict[str, str]:
    """The workers' settings, those that every version shares."""
    values = {
        "VIGIL_MODEL": resource.spec.source.model,
        "VIGIL_REDIS_URL": settings.redis_url,
        "VIGIL_STORAGE_ADDRESS": settings.storage_address,
        "VIGIL_INFERENCE_BIND": f"0.0.0.0:{GRPC_PORT}",
        "VIGIL_HEALTH_BIND": f"0.0.0.0:{HEALTH_PORT}",
        "VIGIL_METRICS_PORT": str(METRICS_PORT),
        **runtime_environment(resource.spec.runtime),
        "VIGIL_CACHE_DIR": CACHE_FOLDER,
        "VIGIL_LOG_LEVEL": settings.log_level,
    }
    if settings.tls_secret:
        values |= {f"VIGIL_TLS_{key}_FILE": f"{TLS_FOLDER}/tls.{end}" for key, end in (("CERT", "crt"), ("KEY", "key"))}
        values["VIGIL_TLS_CA_FILE"] = f"{TLS_FOLDER}/ca.crt"
    if settings.token_secret:
        values["VIGIL_TOKEN_FILE"] = f"{TOKEN_FOLDER}/token"
    if settings.tokens_secret:
        values["VIGIL_TOKENS_FILE"] = "/etc/vigil/tokens/tokens.yaml"
    if settings.redis_secret:
        values["VIGIL_REDIS_PASSWORD_FILE"] = f"{REDIS_FOLDER}/password"
        if settings.redis_url.startswith("rediss"):
            values["VIGIL_REDIS_CA_FILE"] = f"{REDIS_FOLDER}/ca.crt"
    if settings.otlp_endpoint:
        values["OTEL_EXPORTER_OTLP_ENDPOINT"] = settings.otlp_endpoint
    if settings.otlp_certificate_file:
        values["OTEL_EXPORTER_OTLP_CERTIFICATE"] = settings.otlp_certificate_file
    return values


def build_config_map(resource: Resource, settings: WorkerSettings) -> Manifest:
    """The workers' settings."""
    return _object(resource, "v1", "ConfigMap", service_name(resource), data=environment(resource, settings))


def build_service(resource: Resource, live: str) -> Manifest:
    """Headless, so that gRPC clients balance over the live version's workers themselves."""
    ports = [
        {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "appProtocol": "grpc"},
        {"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"},
    ]
    spec = {
        "clusterIP": "None",
        "selector": {MODEL_LABEL: resource.name, DIGEST_LABEL: short(live)},
        "ports": ports,
    }
    return _object(resource, "v1", "Service", service_name(resource), spec=spec)


def build_deployment(
    resource: Resource, settings: WorkerSettings, version: int, digest: str, numerics: Numerics
) -> Manifest:
    """A version's workers. A change rolls: no worker goes before another has proven itself."""
    spec, user = resource.spec, settings.run_as_user
    values = environment(resource, settings)
    # Settings are read at the start, so a change of them must start new pods.
    settings_hash = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    labels = _labels(resource, digest)
    annotations = {
        DIGEST_ANNOTATION: digest,
        VERSION_ANNOTATION: str(version),
        NUMERICS_ANNOTATION: str(numerics),
        f"{GROUP}/settings": settings_hash,
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
    }
    selector = {MODEL_LABEL: resource.name, DIGEST_LABEL: short(digest)}
    pull_secrets = [*settings.image_pull_secrets, *(secret.name for secret in spec.image_pull_secrets or ())]
    pod: Manifest = {
        "serviceAccountName": service_name(resource),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            **(dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user) if user else {}),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector},
            }
        ],
        "containers": [_container(resource, settings, version, digest, numerics)],
        "volumes": _volumes(settings),
    }
    optional = {
        "priorityClassName": settings.priority_class,
        "imagePullSecrets": [{"name": name} for name in pull_secrets],
        "nodeSelector": spec.node_selector,
        "tolerations": spec.tolerations,
        "affinity": spec.affinity,
    }
    pod |= {key: value for key, value in optional.items() if value}
    body: Manifest = {
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": 600,
        "selector": {"matchLabels": selector},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }
    if spec.autoscaling is None:
        body["replicas"] = spec.replicas
    made = _object(resource, "apps/v1", "Deployment", workers_name(resource, digest), digest=digest, spec=body)
    made["metadata"]["annotations"] = {DIGEST_ANNOTATION: digest, VERSION_ANNOTATION: str(version)}
    return made


def _container(resource: Resource, settings: WorkerSettings, version: int, digest: str, numerics: Numerics) -> Manifest:
    # The server answers once the bundle is proven; loading a large model may take minutes.
    probe = {"grpc": {"port": HEALTH_PORT}, "timeoutSeconds": 5}
    container: Manifest = {
        "name": "inference",
        "image": settings.image,
        "envFrom": [{"configMapRef": {"name": service_name(resource)}}],
        "env": [
            {"name": "VIGIL_MODEL_VERSION", "value": str(version)},
            {"name": "VIGIL_MODEL_DIGEST", "value": digest},
            *({"name": name, "value": value} for name, value in numerics_environment(numerics).items()),
        ],
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
            {"name": "health", "containerPort": HEALTH_PORT},
        ],
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": 600},
        "readinessProbe": {**probe, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**probe, "periodSeconds": 20, "failureThreshold": 6},
        # The reason why a worker can't start is the last line that it logs.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE_FOLDER},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
            *({"name": name, "mountPath": path, "readOnly": True} for name, _, path in _secrets(settings)),
        ],
    }
    if resource.spec.resources:
        container["resources"] = resource.spec.resources
    if settings.image_pull_policy:
        container["imagePullPolicy"] = settings.image_pull_policy
    return container


def _secrets(settings: WorkerSettings) -> list[tuple[str, str, str]]:
    """Volume, Secret, folder."""
    known = (
        ("tls", settings.tls_secret, TLS_FOLDER),
        ("token", settings.token_secret, TOKEN_FOLDER),
        ("tokens", settings.tokens_secret, "/etc/vigil/tokens"),
        ("redis", settings.redis_secret, REDIS_FOLDER),
    )
    return [(name, secret, path) for name, secret, path in known if secret]


def _volumes(settings: WorkerSettings) -> list[Manifest]:
    return [
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        *({"name": name, "secret": _secret(name, secret, settings)} for name, secret, _ in _secrets(settings)),
    ]


def _secret(volume: str, secret: str, settings: WorkerSettings) -> Manifest:
    if volume != "redis" or not settings.redis_users:
        return {"secretName": secret}
    # Of all users' passwords a worker sees its own.
    items = [{"key": "inference", "path": "password"}]
    if settings.redis_url.startswith("rediss"):
        items.append({"key": "ca.crt", "path": "ca.crt"})
    return {"secretName": secret, "items": items}


def build_disruption_budget(resource: Resource, digest: str) -> Manifest:
    """One worker at a time may be moved; with a single one, draining a node must still be possible."""
    selector = {MODEL_LABEL: resource.name, DIGEST_LABEL: short(digest)}
    # One that is not ready serves nobody: it must not keep a node from being drained.
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": selector},
    }
    name = workers_name(resource, digest)
    return _object(resource, "policy/v1", "PodDisruptionBudget", name, digest=digest, spec=spec)


def build_autoscaler(resource: Resource, _: WorkerSettings, scaling: Autoscaling, digest: str) -> Manifest:
    """Without KEDA nothing can tell the stream's lag: by processor time, which needs resources.requests.cpu."""
    name = workers_name(resource, digest)
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
    }
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": scaling.min,
        "maxReplicas": scaling.max,
        "metrics": [metric],
    }
    return _object(resource, "autoscaling/v2", "HorizontalPodAutoscaler", name, digest=digest, spec=spec)


def build_scaled_object(resource: Resource, settings: WorkerSettings, scaling: Autoscaling, digest: str) -> Manifest:
    """By the frames that live has yet to judge. A candidate scales with them too: it gets the same frames."""
    name = workers_name(resource, digest)
    address = urlsplit(settings.redis_url)
    trigger = {
        "address": f"{address.hostname}:{address.port or 6379}",
        "stream": f"vigil:{{{resource.spec.source.model}}}:frames",
        "consumerGroup": "live",
        "lagCount": str(scaling.target_lag),
        "enableTLS": "true" if address.scheme.startswith("rediss") else "false",
    }
    if user := "keda" if settings.redis_users else address.username:
        trigger["username"] = user
    kind = "redis-cluster-streams" if "+cluster" in address.scheme else "redis-streams"
    if kind == "redis-cluster-streams":
        trigger["addresses"] = trigger.pop("address")
    triggers: list[Manifest] = [{"type": kind, "metadata": trigger}]
    if settings.redis_secret:
        triggers[0]["authenticationRef"] = {"name": service_name(resource)}
    spec = {
        "scaleTargetRef": {"name": name},
        "minReplicaCount": scaling.min,
        "maxReplicaCount": scaling.max,
        "pollingInterval": 5,
        "cooldownPeriod": 60,
        "triggers": triggers,
    }
    return _object(resource, "keda.sh/v1alpha1", "ScaledObject", name, digest=digest, spec=spec)


def build_trigger_authentication(resource: Resource, settings: WorkerSettings) -> Manifest:
    """How KEDA gets Redis' password, the authority of its certificate, and one to show it, as workers do."""
    key = "keda" if settings.redis_users else "password"
    targets = [{"parameter": "password", "name": settings.redis_secret, "key": key}]
    if urlsplit(settings.redis_url).scheme.startswith("rediss"):
        targets.append({"parameter": "ca", "name": settings.redis_secret, "key": "ca.crt"})
        if settings.tls_secret:
            own = (("cert", "tls.crt"), ("key", "tls.key"))
            targets += [{"parameter": name, "name": settings.tls_secret, "key": file} for name, file in own]
    spec = {"secretTargetRef": targets}
    return _object(resource, "keda.sh/v1alpha1", "TriggerAuthentication", service_name(resource), spec=spec)


def build_network_policy(resource: Resource, settings: WorkerSettings) -> Manifest:
    """In: gRPC from here, operator and platform, metrics and probes from all. Out: DNS, queue, storage, collector."""
    redis = urlsplit(settings.redis_url).port or 6379
    storage = int(settings.storage_address.rpartition(":")[2])
    collector = urlsplit(settings.otlp_endpoint).port
    callers: list[Manifest] = [{"podSelector": {}}]
    for namespace in sorted({settings.operator_namespace, _namespace_of(settings.storage_address)} - {""}):
        match = {"kubernetes.io/metadata.name": namespace}
        callers.append({"namespaceSelector": {"matchLabels": match}})
    open_ports = [_port(METRICS_PORT), _port(HEALTH_PORT)]
    spec = {
        "podSelector": {"matchLabels": {MODEL_LABEL: resource.name, "app.kubernetes.io/managed-by": MANAGER}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": callers, "ports": [_port(GRPC_PORT)]}, {"ports": open_ports}],
        "egress": [
            {"ports": [_port(53, "UDP"), _port(53)]},
            {"ports": [_port(redis), _port(storage), *([_port(collector)] if collector else [])]},
        ],
    }
    return _object(resource, "networking.k8s.io/v1", "NetworkPolicy", service_name(resource), spec=spec)


def _namespace_of(address: str) -> str:
    """Where a Service is, by its address; empty where that doesn't say."""
    labels = address.rpartition(":")[0].split(".")
    return labels[1] if labels[2:3] == ["svc"] else ""


def _port(number: int, protocol: str = "TCP") -> Mapping[str, Any]:
    return {"port": number, "protocol": protocol}
