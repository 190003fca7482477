"""What every installation must be, whatever its values: rendered by the real helm, no cluster needed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import yaml
from redis import AuthenticationError, Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from vigil_common.grpc.workers import worker_address
from vigil_common.streams import acl
from vigil_operator.observed import Resource
from vigil_operator.phases import Phase
from vigil_operator.render import GRPC_PORT, server_name
from vigil_operator.spec import Spec

from tests.e2e.cluster import programs
from tests.support.valkey import ValkeyProcess, free_port, server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

CHARTS = Path(__file__).resolve().parents[2] / "charts"
MATRIX = sorted(CHARTS.glob("*/ci/*-values.yaml"))

pytestmark = pytest.mark.skipif(not programs.can_have("helm"), reason="helm is built with Go, which is not installed")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Helm as built from its module does not know which Kubernetes it was made for.
    command = [str(programs.ensure("helm")), *arguments, "--kube-version", "1.29.0"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@lru_cache
def rendered(values: Path) -> tuple[dict[str, Any], ...]:
    done = helm("template", "vigil", str(values.parents[1]), "--namespace", "here", "--values", str(values))
    assert done.returncode == 0, done.stderr
    return tuple(part for part in yaml.safe_load_all(done.stdout) if part)


def refused(chart: str, *settings: str) -> str:
    done = helm("template", "vigil", str(CHARTS / chart), *(f"--set={setting}" for setting in settings))
    assert done.returncode != 0, f"{settings} was taken"
    return done.stderr


def notes(folder: Path, chart: str, *settings: str, release: str = "vigil") -> str:
    """What an installation prints, of which helm shows nothing without a cluster."""
    copy = shutil.copytree(CHARTS / chart, folder / chart, dirs_exist_ok=True)
    text = (copy / "templates" / "NOTES.txt").read_text()
    (copy / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}')
    (copy / "templates" / "_notes.tpl").write_text(f'{{{{ define "notes" }}}}{text}{{{{ end }}}}')
    done = helm(
        *("template", release, str(copy), "--namespace=here", "--show-only=templates/notes.yaml"),
        *(f"--set={setting}" for setting in settings),
    )
    assert done.returncode == 0, done.stderr
    return str(yaml.safe_load(done.stdout)["notes"])


def pods(values: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of everything that runs."""
    for part in rendered(values):
        name = part["metadata"]["name"]
        if part["kind"] == "Pod":
            yield name, part
        elif part["kind"] in ("Deployment", "StatefulSet"):
            yield name, part["spec"]["template"] | {"kind": part["kind"]}


def of_kind(values: Path, kind: str) -> list[dict[str, Any]]:
    return [part for part in rendered(values) if part["kind"] == kind]


each_installation = pytest.mark.parametrize("values", MATRIX, ids=lambda path: f"{path.parents[1].name}/{path.stem}")


@each_installation
def test_helm_finds_nothing_to_complain_about(values: Path) -> None:
    done = helm("lint", "--strict", str(values.parents[1]), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


@each_installation
def test_every_pod_is_restricted_and_has_no_token_it_does_not_need(values: Path) -> None:
    for name, pod in pods(values):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is (name.endswith("operator")), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["requests"], name
            assert container["resources"]["limits"]["memory"], name


def test_every_pod_can_be_given_the_limits_that_a_quota_asks_for() -> None:
    parts = ("ingest", "storage", "shadow", "review", "valkey", "reductstore", "test")
    given = [f"--set={part}.resources.limits.cpu=2" for part in parts]
    done = helm("template", "vigil", str(CHARTS / "vigil"), *given)
    assert done.returncode == 0, done.stderr
    made = [part for part in yaml.safe_load_all(done.stdout) if part]
    seen = [part["spec"] for part in made if part["kind"] == "Pod"]
    seen += [part["spec"]["template"]["spec"] for part in made if part["kind"] in ("Deployment", "StatefulSet")]
    assert [container["resources"]["limits"]["cpu"] for pod in seen for container in pod["containers"]] == [2] * 7


@each_installation
def test_every_running_part_is_probed_in_three_ways(values: Path) -> None:
    for name, pod in pods(values):
        if pod["kind"] == "Pod":
            continue
        for container in pod["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), name


@each_installation
def test_no_secret_is_written_down(values: Path) -> None:
    assert not of_kind(values, "Secret")
    for name, pod in pods(values):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", ()):
                secret = any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "KEY"))
                assert not secret or variable["name"].endswith(("_FILE", "_SECRET", "_PATH")), (name, variable)


@each_installation
def test_services_find_their_pods_and_policies_cover_them(values: Path) -> None:
    labels = [pod["metadata"]["labels"] for _, pod in pods(values)]

    def selects(selector: dict[str, str]) -> bool:
        return any(selector.items() <= found.items() for found in labels)

    for service in of_kind(values, "Service"):
        assert selects(service["spec"]["selector"]), service["metadata"]["name"]
    policies = [policy["spec"]["podSelector"]["matchLabels"] for policy in of_kind(values, "NetworkPolicy")]
    for found in labels:
        assert any(policy.items() <= found.items() for policy in policies), found


@pytest.mark.parametrize(
    "values", [path for path in MATRIX if path.parents[1].name == "vigil"], ids=lambda path: path.stem
)
def test_a_stopping_pod_has_time_to_drain(values: Path) -> None:
    for name, pod in pods(values):
        for container in pod["spec"]["containers"]:
            drain = {variable["name"]: variable.get("value") for variable in container.get("env", ())}.get(
                "VIGIL_DRAIN_S"
            )
            if drain is not None:
                leaving = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
                assert pod["spec"]["terminationGracePeriodSeconds"] >= float(drain) + leaving + 5, name


def test_queue_and_store_volumes_outlive_the_release() -> None:
    sets = of_kind(CHARTS / "vigil" / "ci" / "minimal-values.yaml", "StatefulSet")
    assert {part["metadata"]["name"] for part in sets} == {"vigil-valkey", "vigil-reductstore"}
    for part in sets:
        assert part["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Retain"


def test_a_rollback_replaces_the_pod_of_a_queue_or_store_that_did_not_come_up() -> None:
    # In order, Kubernetes waits for ever for a pod with, say, a tag that is none, whatever the template says by then.
    sets = of_kind(CHARTS / "vigil" / "ci" / "minimal-values.yaml", "StatefulSet")
    assert [part["spec"]["podManagementPolicy"] for part in sets] == ["Parallel", "Parallel"]


def test_a_new_chart_restarts_neither_queue_nor_store(tmp_path: Path) -> None:
    chart = shutil.copytree(CHARTS / "vigil", tmp_path / "vigil")
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump({**about, "version": "9.9.9", "appVersion": "9.9.9"}))
    before = CHARTS / "vigil" / "ci" / "minimal-values.yaml"
    after = chart / "ci" / "minimal-values.yaml"
    for old, new in zip(of_kind(before, "StatefulSet"), of_kind(after, "StatefulSet"), strict=True):
        assert old["spec"] == new["spec"]
        assert old != new
    # What has a new image is started anew all the same.
    old, new = (of_kind(values, "Deployment")[0]["spec"]["template"] for values in (before, after))
    assert old != new


def test_queue_and_store_keep_their_address_when_their_pod_is_replaced() -> None:
    services = of_kind(CHARTS / "vigil" / "ci" / "minimal-values.yaml", "Service")
    kinds = {part["metadata"]["labels"]["app.kubernetes.io/component"]: part["spec"] for part in services}
    for part in ("valkey", "reductstore"):
        assert (kinds[part]["type"], kinds[part].get("clusterIP")) == ("ClusterIP", None)


def valkey_conf(*settings: str) -> str:
    given = ("tls.enabled=true", "tls.existingSecret=ours", *settings)
    done = helm(
        *("template", "vigil", str(CHARTS / "vigil"), "--show-only=templates/valkey.yaml"),
        *(f"--set={setting}" for setting in given),
    )
    return str(next(yaml.safe_load_all(done.stdout))["data"]["valkey.conf"])


def test_valkey_takes_up_a_renewed_certificate(tmp_path: Path) -> None:
    directive = "tls-auto-reload-interval"
    assert f"{directive} 300\n" in valkey_conf()
    # Servers that do not know it would not start.
    assert directive not in valkey_conf("valkey.certificateReloadSeconds=0")
    server = ValkeyProcess(tmp_path, f"--{directive}", "300").start()
    try:
        assert server.ask("CONFIG", "GET", directive).split()[-1] == "300"
    finally:
        server.kill()


def test_who_has_to_restart_for_a_renewed_certificate_is_told(tmp_path: Path) -> None:
    tls = ("tls.enabled=true", "tls.existingSecret=ours")
    restart = "rollout restart -n here statefulset/"
    said = notes(tmp_path, "vigil", *tls).split(restart)
    assert [part.split()[0] for part in said[1:]] == ["vigil-reductstore"]
    assert restart not in notes(tmp_path, "vigil")


def test_valkey_is_told_of_changed_users_as_the_notes_say(tmp_path: Path) -> None:
    restart = "rollout restart -n here statefulset/vigil-valkey"
    passwords = ("valkey.existingSecret=passwords",)
    assert restart not in notes(tmp_path, "vigil")
    assert restart in notes(tmp_path, "vigil", *passwords)
    assert "ACL LOAD" not in notes(tmp_path, "vigil", *passwords)
    said = notes(tmp_path, "vigil", *passwords, "valkey.users=true")
    assert restart in said
    command, user = re.findall(r"(ACL LOAD) as its user (\w+)", said)[0]
    # Given a server with the users of an earlier Vigil
    users = acl.write(tmp_path / "users")
    now = users.read_text()
    users.write_text("".join(line for line in now.splitlines(keepends=True) if "user keda " not in line))
    server = ValkeyProcess(tmp_path / "valkey", "--aclfile", str(users)).start()
    try:
        # when there is a newer file
        users.write_text(now)
        with Redis(port=server.port, username=user, password=(tmp_path / "users" / user).read_text()) as redis:
            assert "keda" not in redis.acl_users()
            # then it knows it by that command.
            redis.execute_command(command)
            assert "keda" in redis.acl_users()
    finally:
        server.kill()


def test_queue_and_store_hear_that_they_are_to_stop(tmp_path: Path) -> None:
    """The first process of a container gets SIGTERM, and a shell would not hand it on."""
    for number, part in enumerate(of_kind(CHARTS / "vigil" / "ci" / "tls-values.yaml", "StatefulSet")):
        (container,) = part["spec"]["template"]["spec"]["containers"]
        root = tmp_path / str(number)
        for folder in ("bin", "etc/vigil/redis", "etc/vigil/store", "run/valkey"):
            (root / folder).mkdir(parents=True)
        (root / "etc/vigil/redis/password").write_text("secret")
        (root / "etc/vigil/store/token").write_text("secret")
        for name in ("valkey-server", "reductstore"):
            (root / "bin" / name).write_text("#!/bin/sh\necho $$\n")
            (root / "bin" / name).chmod(0o755)
        command = [re.sub(r"(?<![\w/])/(?=(etc|run)/)", f"{root}/", word) for word in container["command"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PATH": f"{root}/bin:/usr/bin:/bin"}) as process:
            told, _ = process.communicate(timeout=10)
        assert int(told) == process.pid, command


@pytest.mark.parametrize("password", ["secret", 'a "quoted" one', r"back\slash\n %s $HOME `it's`", "  ünder space\r\n"])
def test_valkey_asks_for_any_password_that_a_secret_holds(tmp_path: Path, password: str) -> None:
    done = helm(
        *("template", "vigil", str(CHARTS / "vigil"), "--show-only=templates/valkey.yaml"),
        "--set=valkey.existingSecret=passwords",
    )
    (server,) = [part for part in yaml.safe_load_all(done.stdout) if part["kind"] == "StatefulSet"]
    (container,) = server["spec"]["template"]["spec"]["containers"]
    for folder in ("bin", "etc/vigil/redis", "etc/valkey", "run/valkey"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/vigil/redis/password").write_text(password)
    port = free_port()
    (tmp_path / "etc/valkey/valkey.conf").write_text(f"bind 127.0.0.1\nport {port}\n")
    (tmp_path / "bin/valkey-server").symlink_to(server_binary())
    command = [re.sub(r"(?<![\w/])/(?=(etc|run)/)", f"{tmp_path}/", word) for word in container["command"]]
    with subprocess.Popen(command, cwd=tmp_path, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}) as process:
        try:
            retry = Retry(ConstantBackoff(0.1), 100)
            with Redis(port=port, password=password.strip(), retry=retry) as redis:
                assert redis.ping()
            with Redis(port=port, retry=Retry(ConstantBackoff(0), 0)) as stranger, pytest.raises(AuthenticationError):
                stranger.ping()
        finally:
            process.kill()


@pytest.mark.parametrize(("values", "users"), [("full", True), ("external", False)])
def test_each_service_sees_its_own_redis_password_alone_where_there_are_several(values: str, users: bool) -> None:  # noqa: FBT001 - pytest's parameter
    seen = {}
    for deployment in of_kind(CHARTS / "vigil" / "ci" / f"{values}-values.yaml", "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        env = {part["name"]: part.get("value", "") for part in container["env"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert ("VIGIL_REDIS_URL" in env) == ("redis" in volumes) == (container["name"] != "review")
        if "redis" in volumes:
            items = volumes["redis"]["secret"].get("items", [])
            seen[container["name"]] = (urlsplit(env["VIGIL_REDIS_URL"]).username, *(item["key"] for item in items))
    names = ("ingest", "storage", "shadow")
    assert seen == {name: (name, name) if users else ("vigil",) for name in names}


def test_the_page_finds_workers_where_the_operator_says_they_are() -> None:
    deployments = of_kind(CHARTS / "vigil" / "ci" / "minimal-values.yaml", "Deployment")
    (page,) = [part for part in deployments if part["metadata"]["name"] == "vigil-review"]
    (container,) = page["spec"]["template"]["spec"]["containers"]
    setting = next(one["value"] for one in container["env"] if one["name"] == "VIGIL_INFERENCE_ADDRESS")
    spec = Spec.model_validate({"source": {"model": "cells", "version": "1"}})
    resource = Resource("solar", "line-1", "1", 1, spec, None, "")
    found = worker_address(setting, resource.spec.source.model, resource.full_name)
    assert found == f"{server_name(resource)}:{GRPC_PORT}"


def certificate_names(*settings: str) -> set[str]:
    given = ("tls.enabled=true", "tls.certManager.enabled=true", "tls.certManager.issuer=ours", *settings)
    done = helm("template", "vigil", str(CHARTS / "vigil"), "--namespace=here", *(f"--set={one}" for one in given))
    (certificate,) = [part for part in yaml.safe_load_all(done.stdout) if part and part["kind"] == "Certificate"]
    return set(certificate["spec"]["dnsNames"])


def test_the_certificate_names_the_workers_as_operator_and_page_know_them() -> None:
    assert "*.here.svc" in certificate_names()
    assert "*.models.svc" in certificate_names("review.modelsNamespace=models")
    assert {"*.here.svc", "*.line-2.svc"} <= certificate_names("tls.certManager.extraDnsNames={*.line-2.svc}")


@pytest.mark.parametrize("user", ["0", "1000650000"])
def test_the_operator_hears_as_whom_workers_run(user: str) -> None:
    settings = (f"--set=workers.runAsUser={user}", "--show-only=templates/deployment.yaml")
    done = helm("template", "vigil", str(CHARTS / "vigil-operator"), *settings)
    assert f'{{name: VIGIL_WORKER_RUN_AS_USER, value: "{user}"}}' in done.stdout


def test_whoever_brings_a_certificate_is_told_that_it_names_the_workers(tmp_path: Path) -> None:
    said = notes(tmp_path, "vigil", "tls.enabled=true", "tls.existingSecret=ours").partition("must name:")[2]
    assert "*.here.svc" in said
    assert "vigil-NAME.NAMESPACE.svc" in said


def test_the_definition_outlives_the_release() -> None:
    (definition,) = of_kind(CHARTS / "vigil-operator" / "ci" / "minimal-values.yaml", "CustomResourceDefinition")
    assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert definition["metadata"]["name"] == "anomalymodels.vigil.dev"


def test_the_operator_may_only_what_it_does() -> None:
    values = CHARTS / "vigil-operator" / "ci" / "minimal-values.yaml"
    (role,) = [
        part for part in of_kind(values, "ClusterRole") if part["metadata"]["name"] == "vigil-vigil-operator"
    ] or [part for part in of_kind(values, "ClusterRole") if "edit" not in part["metadata"]["name"]]
    granted = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert "secrets" not in granted
    assert all("*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"] for rule in role["rules"])
    # In some namespaces only, it has no rights in the cluster.
    namespaced = CHARTS / "vigil-operator" / "ci" / "full-values.yaml"
    # Beyond its namespaces it sees who else leads, and nothing more.
    (binding,) = of_kind(namespaced, "ClusterRoleBinding")
    (seen,) = [r for r in of_kind(namespaced, "ClusterRole") if r["metadata"]["name"] == binding["roleRef"]["name"]]
    assert seen["rules"] == [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["list"]}]
    places = {part["metadata"].get("namespace") for part in of_kind(namespaced, "Role")}
    assert places == {"line-1", "line-2", None}


def test_who_may_view_a_namespace_sees_its_models_and_who_may_edit_it_changes_them() -> None:
    roles = of_kind(CHARTS / "vigil-operator" / "ci" / "minimal-values.yaml", "ClusterRole")

    def granted(to: str) -> set[str]:
        label = f"rbac.authorization.k8s.io/aggregate-to-{to}"
        rules = [rule for role in roles if label in role["metadata"]["labels"] for rule in role["rules"]]
        return {verb for rule in rules if "anomalymodels" in rule["resources"] for verb in rule["verbs"]}

    assert granted("view") == {"get", "list", "watch"}
    assert granted("edit") == granted("admin") == granted("view") | {"create", "update", "patch", "delete"}


def test_the_operator_asks_where_the_platform_is() -> None:
    platform = {
        part["metadata"]["name"] for part in of_kind(CHARTS / "vigil" / "ci" / "minimal-values.yaml", "Service")
    }
    (deployment,) = of_kind(CHARTS / "vigil-operator" / "ci" / "minimal-values.yaml", "Deployment")
    env = {
        part["name"]: part.get("value", "") for part in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    for address in (
        env["VIGIL_STORAGE_ADDRESS"],
        env["VIGIL_SHADOW_ADDRESS"],
        env["VIGIL_REDIS_URL"].partition("//")[2],
    ):
        name, namespace, kind = address.partition(":")[0].split(".")
        assert name in platform
        assert (namespace, kind) == ("default", "svc") or namespace == "here"


def operator_pod(said: str) -> dict[str, Any]:
    """Of an operator that is installed as these notes say."""
    (command,) = re.findall(r"helm install vigil-operator (?:.*\\\n)*.*", said)
    words = shlex.split(command)
    settings = [value for option, value in pairwise(words) if option == "--set"]
    done = helm(
        *("template", "vigil-operator", str(CHARTS / "vigil-operator"), "--namespace=here"),
        *(f"--set={setting}" for setting in settings),
    )
    assert done.returncode == 0, done.stderr
    (deployment,) = [part for part in yaml.safe_load_all(done.stdout) if part and part["kind"] == "Deployment"]
    return dict(deployment["spec"]["template"]["spec"])


def operator_env(said: str) -> dict[str, str]:
    """What it is told."""
    (container,) = operator_pod(said)["containers"]
    return {part["name"]: part.get("value", "") for part in container["env"]}


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize(
    ("release", "named"),
    [
        ("vigil", ()),
        ("prod", ()),
        ("prod-vigil", ()),
        ("prod", ("fullnameOverride=cam",)),
        ("prod", ("fullnameOverride=vigil",)),
        ("prod", ("fullnameOverride=the-vigil-2",)),
        ("vigil", ("fullnameOverride=cam",)),
        ("vigil", ("nameOverride=eye",)),
        ("prod", ("nameOverride=eye",)),
        (f"vigil-{'long' * 11}", ()),
        ("long" * 9, ()),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_operator_that_the_notes_install_finds_a_platform_of_any_name(
    release: str,
    named: tuple[str, ...],
    secured: bool,  # noqa: FBT001 - pytest's parameter
    tmp_path: Path,
) -> None:
    settings = (*named, *(("tls.enabled=true", "tls.existingSecret=ours") if secured else ()))
    env = operator_env(notes(tmp_path, "vigil", *settings, release=release))
    done = helm("template", release, str(CHARTS / "vigil"), *(f"--set={setting}" for setting in settings))
    services = [part for part in yaml.safe_load_all(done.stdout) if part and part["kind"] == "Service"]
    names = {part["metadata"]["labels"]["app.kubernetes.io/component"]: part["metadata"]["name"] for part in services}
    assert env["VIGIL_REDIS_URL"] == f"{'rediss' if secured else 'redis'}://{names['valkey']}.here.svc:6379/0"
    assert env["VIGIL_STORAGE_ADDRESS"] == f"{names['storage']}.here.svc:50053"
    assert env["VIGIL_SHADOW_ADDRESS"] == f"{names['shadow']}.here.svc:50054"


@pytest.mark.parametrize(
    ("settings", "redis"),
    [
        ((), ""),
        (("valkey.existingSecret=passwords",), "passwords"),
        (("tls.enabled=true", "tls.existingSecret=ours"), "ours"),
        (("tls.enabled=true", "tls.existingSecret=ours", "valkey.existingSecret=passwords"), "passwords"),
        (
            ("valkey.enabled=false", "externalRedis.url=rediss://there:6379", "externalRedis.caSecret=theirs"),
            "theirs",
        ),
        (("valkey.existingSecret=passwords", "valkey.users=true"), "passwords"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_operator_is_installed_as_the_notes_say(settings: tuple[str, ...], redis: str, tmp_path: Path) -> None:
    env = operator_env(notes(tmp_path, "vigil", *settings))
    assert env["VIGIL_WORKER_REDIS_SECRET"] == redis
    assert env["VIGIL_WORKER_REDIS_USERS"] == str("valkey.users=true" in settings).lower()
    assert ("VIGIL_REDIS_CA_FILE" in env) == env["VIGIL_REDIS_URL"].startswith("rediss")


@pytest.mark.parametrize("prefix", ["team/vigil", ""])
def test_the_operator_that_the_notes_install_has_its_images_where_the_platform_has(prefix: str, tmp_path: Path) -> None:
    settings = ("image.registry=there", f"image.prefix={prefix}", "image.tag=0.2.0", "image.pullSecrets={a,b}")
    said = notes(tmp_path, "vigil", *settings)
    (container,) = operator_pod(said)["containers"]
    assert container["image"] == "/".join(filter(None, ("there", prefix, "operator:0.2.0")))
    assert operator_pod(said)["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert operator_env(said)["VIGIL_WORKER_IMAGE_PULL_SECRETS"] == "a,b"


def test_the_operators_notes_name_the_secrets_that_workers_read(tmp_path: Path) -> None:
    said = notes(tmp_path, "vigil-operator", "secrets.redis=passwords", "secrets.redisUsers=true")
    assert re.findall(r"the Secret (\S+) \((\w+)\)", said) == [("passwords", "redis")]


def test_spans_go_to_the_collector_and_the_policies_let_them() -> None:
    values = CHARTS / "vigil" / "ci" / "full-values.yaml"
    minimal = CHARTS / "vigil" / "ci" / "minimal-values.yaml"
    senders = set()
    for deployment in of_kind(values, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        env = {part["name"]: part.get("value", "") for part in container["env"]}
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in env:
            senders.add(container["name"])
            assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "https://collector.monitoring.svc:4317"
            assert (env["OTEL_TRACES_SAMPLER"], env["OTEL_TRACES_SAMPLER_ARG"]) == ("parentbased_traceidratio", "0.1")
            assert Path(env["OTEL_EXPORTER_OTLP_CERTIFICATE"]).parent in {
                Path(mount["mountPath"]) for mount in container["volumeMounts"]
            }
    assert senders == {"ingest", "storage"}
    assert "OTEL" not in json.dumps(rendered(minimal))
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    for policy in of_kind(values, "NetworkPolicy"):
        part = policy["metadata"]["labels"]["app.kubernetes.io/component"]
        out = policy["spec"].get("egress", ())
        assert ({"to": [monitoring]} in out) is (part in senders), part
    anywhere = helm("template", "vigil", str(CHARTS / "vigil"), "--set=otlp.endpoint=http://collector.obs:4317").stdout
    assert anywhere.count("- ports: [{port: 4317}]") == len(senders)


@pytest.mark.parametrize(
    ("settings", "scalers"),
    [
        ((), [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}}]),
        (("scalersFrom[0].podSelector.matchLabels.app=scaler",), [{"podSelector": {"matchLabels": {"app": "scaler"}}}]),
        (("scalersFrom=null",), []),
    ],
    ids=["usual", "named", "none"],
)
def test_who_scales_workers_may_reach_valkey_alone(settings: tuple[str, ...], scalers: list[dict[str, Any]]) -> None:
    given = (f"--set=networkPolicy.{setting}" for setting in settings)
    done = helm("template", "vigil", str(CHARTS / "vigil"), "--show-only=templates/networkpolicy.yaml", *given)
    assert done.returncode == 0, done.stderr
    let_in = {
        policy["metadata"]["name"]: [
            peer for rule in policy["spec"].get("ingress", ()) for peer in rule.get("from", ())
        ]
        for policy in yaml.safe_load_all(done.stdout)
    }
    assert let_in.pop("vigil-valkey")[3:] == scalers
    assert all(scaler not in peers for peers in let_in.values() for scaler in scalers)


def alert(name: str, *settings: str) -> dict[str, Any]:
    monitored = ("metrics.prometheusRule.enabled=true", "metrics.serviceMonitor.enabled=true", *settings)
    done = helm(
        *("template", "production", str(CHARTS / "vigil"), "--namespace=here"),
        *("--show-only=templates/monitoring.yaml", *(f"--set={setting}" for setting in monitored)),
    )
    assert done.returncode == 0, done.stderr
    (made,) = [part for part in yaml.safe_load_all(done.stdout) if part["kind"] == "PrometheusRule"]
    (found,) = [rule for group in made["spec"]["groups"] for rule in group["rules"] if rule["alert"] == name]
    return dict(found)


@pytest.mark.parametrize("shadow", ["true", "false"])
def test_a_part_without_any_target_is_down_too(shadow: str) -> None:
    # Prometheus calls a job by its Service, of those with the port that the ServiceMonitor names.
    enabled = f"shadow.enabled={shadow}"
    done = helm("template", "production", str(CHARTS / "vigil"), f"--set={enabled}")
    services = [part for part in yaml.safe_load_all(done.stdout) if part and part["kind"] == "Service"]
    jobs = {
        part["metadata"]["name"] for part in services if "metrics" in {port["name"] for port in part["spec"]["ports"]}
    }
    jobs.remove("production-vigil-review")
    seen, *absent = alert("VigilDown", enabled)["expr"].splitlines()
    # An absent series has the labels that are asked for by equality alone, and the text needs the job.
    assert sorted(absent) == sorted(f'or absent(up{{namespace="here", job="{job}"}})' for job in jobs)
    (pattern,) = re.findall(r'^sum by \(namespace, job\) \(up\{namespace="here", job=~"([^"]+)"\}\) == 0$', seen)
    assert all(re.fullmatch(pattern, job) for job in jobs)
    others = ("other-production-vigil-storage", "production-vigil-review", "production-vigil-storage-2")
    assert not any(re.fullmatch(pattern, job) for job in others)
    # Jobs of another's making have names of another's making.
    assert "absent" not in alert("VigilDown", "metrics.serviceMonitor.enabled=false")["expr"]


def test_an_operator_that_does_not_answer_or_has_no_pod_is_seen_by_its_charts_alert() -> None:
    full = CHARTS / "vigil-operator" / "ci" / "full-values.yaml"
    (service,), (made,) = of_kind(full, "Service"), of_kind(full, "PrometheusRule")
    (rule,) = made["spec"]["groups"][0]["rules"]
    job = service["metadata"]["name"]
    seen, absent = rule["expr"].splitlines()
    assert absent == f'or absent(up{{namespace="here", job="{job}"}})'
    (pattern,) = re.findall(r'^sum by \(namespace, job\) \(up\{namespace="here", job=~"([^"]+)"\}\) == 0$', seen)
    assert re.fullmatch(pattern, job)
    assert not re.fullmatch(pattern, f"other-{job}")
    # Jobs of another's making have names of another's making.
    settings = ("--set=prometheusRule.enabled=true", "--show-only=templates/deployment.yaml")
    assert "absent" not in helm("template", "vigil", str(CHARTS / "vigil-operator"), *settings).stdout


def test_a_failed_rollout_is_seen_by_a_counter_that_grows() -> None:
    expression = alert("VigilRolloutFailed")["expr"]
    (phases,) = re.findall(r'increase\(vigil_operator_transitions_total\{phase=~"([^"]+)"\}\[15m\]\)', expression)
    assert set(phases.split("|")) == {Phase.FAILED, Phase.HELD}


def test_dashboards_ask_for_rates_over_what_holds_two_readings_however_rarely_metrics_are_read() -> None:
    # With metrics.serviceMonitor.interval=1m, Prometheus' own default, a minute holds one: no rate at all.
    for path in (CHARTS / "vigil" / "dashboards").glob("*.json"):
        windows = set(re.findall(r"rate\(vigil_[^\[]+\[([^\]]+)\]", path.read_text()))
        assert windows == {"$__rate_interval", "1h"}


def test_alerts_and_dashboards_ask_for_metrics_that_exist() -> None:
    sources = "".join(
        path.read_text() for folder in ("services", "operator") for path in (CHARTS.parent / folder).rglob("*.py")
    )
    (rules,) = of_kind(CHARTS / "vigil" / "ci" / "full-values.yaml", "PrometheusRule")
    asked = json.dumps(rules) + "".join(path.read_text() for path in (CHARTS / "vigil" / "dashboards").glob("*.json"))
    names = set(re.findall(r"vigil_[a-z_]+", asked))
    assert len(names) >= 8
    for name in names:
        base = name
        for suffix in ("_bucket", "_sum", "_count"):
            base = base.removesuffix(suffix)
        assert f'"{base}"' in sources, name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("valkey.enabled=false",), "No Redis: set externalRedis.url"),
        (("externalRedis.url=redis://there:6379",), "Two Redis"),
        (("reductstore.enabled=false",), "No ReductStore: set externalReductStore.url"),
        (("tls.enabled=true",), "TLS without a certificate"),
        (("tls.enabled=true", "tls.certManager.enabled=true"), "cert-manager without an issuer"),
        (("tls.clientCertificates=true",), "needs tls.enabled"),
        (("auth.enabled=true",), "Tokens without Secrets"),
        (("auth.enabled=true", "auth.tokensSecret=a", "auth.serviceTokenSecret=b"), "auth.enabled needs tls.enabled"),
        (("storage.retention.normalBytes=5",), "storage.retention.normalBytes is too small"),
        (("otlp.endpoint=http://collector",), "/otlp/endpoint"),
        (("otlp.endpoint=http://there:4317", "otlp.certificateFile=/a"), "for a collector at https://"),
        (("storage.confirmAfterSeconds=2",), "must be over twice reductstore.compactionIntervalSeconds"),
        (("ingest.autoscaling.enabled=true", "ingest.autoscaling.minReplicas=9"), "minReplicas is over maxReplicas"),
        (("valkey.enabled=false", "externalRedis.url=redis://user:secret@there:6379"), "/externalRedis/url"),
        (("valkey.users=true",), "set valkey.existingSecret to the Secret with users.acl"),
        (
            ("valkey.enabled=false", "externalRedis.url=redis://there", "externalRedis.users=true"),
            "set externalRedis.existingSecret",
        ),
        (
            (
                *("valkey.enabled=false", "externalRedis.url=redis://me@there"),
                *("externalRedis.users=true", "externalRedis.existingSecret=a"),
            ),
            "leave the one in externalRedis.url out",
        ),
        (("ingest.replica=3",), "replica"),
        (("storage.batchSize=65",), "batchSize"),
        (("valkey.appendfsync=no",), "appendfsync"),
        (("image.pullPolicy=Sometimes",), "pullPolicy"),
        (("podAnnotations.a=1",), "/podAnnotations/a"),
        (("commonLabels.team=1",), "/commonLabels/team"),
        (("commonLabels.team=a team",), "/commonLabels/team"),
        (("nodeSelector.gpu=true",), "/nodeSelector/gpu"),
        (("ingest.service.annotations.a=1",), "/ingest/service/annotations/a"),
        (("review.service.annotations.a=true",), "/review/service/annotations/a"),
        (("review.ingress.annotations.a=1",), "/review/ingress/annotations/a"),
        (("networkPolicy.workerLabels.a=1",), "/networkPolicy/workerLabels/a"),
        (("metrics.serviceMonitor.labels.a=1",), "/metrics/serviceMonitor/labels/a"),
        (("metrics.prometheusRule.labels.a=1",), "/metrics/prometheusRule/labels/a"),
        (("metrics.dashboards.labels.grafana_dashboard=1",), "/metrics/dashboards/labels/grafana_dashboard"),
        (("valkey.persistence.size=10 GB",), "/valkey/persistence/size"),
        (("reductstore.persistence.size=10GB",), "/reductstore/persistence/size"),
        (("reductstore.persistence.size=0Gi",), "/reductstore/persistence/size"),
        (("storage.resources.limits.memory=1 GB",), "/storage/resources/limits/memory"),
        (("storage.resources.limits.cpu=-1",), "/storage/resources/limits/cpu"),
        (("storage.resources.limit.cpu=1",), "/storage/resources"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_work_is_refused_with_a_sentence(settings: tuple[str, ...], says: str) -> None:
    assert says in refused("vigil", *settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("platform.redisUrl=rediss://there:6379",), "Redis over TLS without its authority"),
        (("secrets.token=a",), "secrets.token needs secrets.tls"),
        (("secrets.redisUsers=true",), "set secrets.redis to the Secret that holds them"),
        (
            ("secrets.redisUsers=true", "secrets.redis=a", "platform.redisUrl=redis://me@there:6379"),
            "leave the one in platform.redisUrl out",
        ),
        (("replicas=2",), "replicas"),
        (("podAnnotations.a=1",), "/podAnnotations/a"),
        (("commonLabels.team=1",), "/commonLabels/team"),
        (("nodeSelector.gpu=true",), "/nodeSelector/gpu"),
        (("serviceMonitor.labels.a=1",), "/serviceMonitor/labels/a"),
        (("resources.requests.memory=1 GB",), "/resources/requests/memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_operators_chart_refuses_with_a_sentence(settings: tuple[str, ...], says: str) -> None:
    assert says in refused("vigil-operator", *settings)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster"])
def test_every_redis_that_services_know_is_taken(scheme: str) -> None:
    url = f"{scheme}://there:6379"
    for chart, settings in (
        ("vigil", ("valkey.enabled=false", f"externalRedis.url={url}")),
        ("vigil-operator", (f"platform.redisUrl={url}", "secrets.redis=a")),
    ):
        done = helm("template", "vigil", str(CHARTS / chart), *(f"--set={setting}" for setting in settings))
        assert done.returncode == 0, done.stderr
        assert f'{{name: VIGIL_REDIS_URL, value: "{url}"}}' in done.stdout


@pytest.mark.parametrize("size", ["20Gi", "0.5Ti", "1.5T", ".5G", "1e12", "8589934592", "08Gi"])
def test_every_size_that_kubernetes_knows_is_taken(size: str) -> None:
    done = helm("template", "vigil", str(CHARTS / "vigil"), f"--set-string=valkey.persistence.size={size}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cpu", ["0", "2", "1.5", "500m"])
def test_every_resource_that_kubernetes_knows_is_taken(cpu: str) -> None:
    for given in ("--set", "--set-string"):
        done = helm("template", "vigil", str(CHARTS / "vigil"), f"{given}=ingest.resources.limits.cpu={cpu}")
        assert done.returncode == 0, done.stderr


def open_mappings(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Path of each mapping of the user's own, and what its values are."""
    for name, part in schema.get("properties", {}).items():
        if part["type"] == "object" and not part.get("properties"):
            yield f"{path}{name}", part.get("additionalProperties")
        yield from open_mappings(part, f"{path}{name}.")


def test_the_schema_says_of_every_mapping_what_its_values_are() -> None:
    for chart in ("vigil", "vigil-operator"):
        found = dict(open_mappings(json.loads((CHARTS / chart / "values.schema.json").read_text())))
        assert {path for path, values in found.items() if values is None} == {"affinity", "global"}


def large_numbers(schema: dict[str, Any]) -> dict[str, Any]:
    """Every whole number as large as it may be, or as a user's number of OpenShift."""
    found: dict[str, Any] = {}
    for name, part in schema["properties"].items():
        if part["type"] == "integer":
            found[name] = part.get("maximum", 1_000_660_000)
        elif part.get("properties"):
            found[name] = large_numbers(part)
    return found


@each_installation
def test_a_whole_number_stays_one_however_large_it_is(values: Path, tmp_path: Path) -> None:
    chart = values.parents[1]
    large = large_numbers(json.loads((chart / "values.schema.json").read_text()))
    if chart.name == "vigil":
        large["storage"]["confirmAfterSeconds"] = 3e9
    # Helm reads numbers from a file as floats, and from --set as they are.
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(large))
    done = helm("template", "vigil", str(chart), f"--values={values}", f"--values={tmp_path / 'large.yaml'}")
    assert done.returncode == 0, done.stderr
    assert "runAsUser: 1000660000\n" in done.stdout
    rounded = [line.strip() for line in done.stdout.splitlines() if re.search(r"\de\+\d", line)]
    assert all("VIGIL_CONFIRM_AFTER_S" in line for line in rounded), rounded


def test_every_value_is_documented_and_its_schema_closed() -> None:
    for chart in ("vigil", "vigil-operator"):
        schema = json.loads((CHARTS / chart / "values.schema.json").read_text())
        assert schema["additionalProperties"] is False
    assert "`ingest.replicas`" in (CHARTS / "vigil" / "README.md").read_text()
