"""kubectl and helm on the cluster under test, and what the tests ask of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigil_common.streams import acl

from tests.e2e.cluster import node, programs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.5
# All that restricted Pod Security asks of a pod and of its containers.
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def say(text: str) -> None:
    """What a test saw."""
    print(f"    {text}", flush=True)


@dataclass(frozen=True)
class Cluster:
    """A cluster, by its own kubeconfig.

    Attributes:
        prefix: Put before each command, to get into the cluster's network.
        environment: Has KUBECONFIG.
    """

    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def command(self, program: str, *arguments: str) -> list[str]:
        """The whole command line."""
        return [*self.prefix, str(programs.ensure(program)), *arguments]

    def run(self, program: str, *arguments: str, stdin: bytes | str | None = None, check: bool = True) -> str:
        """Run it; its output.

        Raises:
            RuntimeError: It failed; the message is its own.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            self.command(program, *arguments), input=data, capture_output=True, check=False, env=self.environment
        )
        if check and done.returncode:
            told = (done.stderr or done.stdout).decode().strip()
            raise RuntimeError(f"{program} {' '.join(arguments)[:300]}: {told}")
        return done.stdout.decode()

    def kubectl(self, *arguments: str, stdin: bytes | str | None = None, check: bool = True) -> str:
        """Run kubectl."""
        return self.run("kubectl", *arguments, stdin=stdin, check=check)

    def helm(self, *arguments: str, check: bool = True) -> str:
        """Run helm."""
        return self.run("helm", *arguments, check=check)

    def get(self, *arguments: str) -> dict[str, Any]:
        """Kubectl get, as JSON."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Server-side apply."""
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=items)


def wait_until(what: str, condition: Callable[[], Any], deadline_s: float = 120.0) -> Any:
    """Poll until the condition gives something; its value.

    Raises:
        TimeoutError: It did not, in time.
    """
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(POLL_S)
    return found


def own_node() -> Cluster:
    """This project's own node, started if it isn't up; by another process, since its parts outlive who starts them."""
    subprocess.run([sys.executable, "-m", "tests.e2e.cluster", "up"], check=True, cwd=ROOT)
    return Cluster(tuple(node.inside()), {**os.environ, "KUBECONFIG": str(node.KUBECONFIG)})


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class ClientPod:
    """A pod outside of the release that streams and asks, as a camera's computer would."""

    def __init__(self, cluster: Cluster, namespace: str, name: str = "client") -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.name = name

    def start(self, image: str, env: Mapping[str, str], secrets: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Make it, wait until it runs, and hand it its files in /data."""
        volumes: list[dict[str, Any]] = [{"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]
        mounts: list[dict[str, Any]] = [
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        ]
        for folder, secret in secrets.items():
            volumes.append({"name": folder, "secret": {"secretName": secret}})
            mounts.append({"name": folder, "mountPath": f"/etc/vigil/{folder}", "readOnly": True})
        container = {
            "name": "client",
            "image": image,
            "command": ["sleep", "infinity"],
            "env": [{"name": name, "value": value} for name, value in env.items()],
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": mounts,
        }
        spec = {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": POD_SECURITY,
            "containers": [container],
            "volumes": volumes,
        }
        # With the label that the queue's network policy lets in: the tests look at the queue, too.
        labels = {"app.kubernetes.io/name": "vigil-inference"}
        metadata = {"name": self.name, "namespace": self.namespace, "labels": labels}
        self.cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self.cluster.kubectl("wait", "-n", self.namespace, "--for=condition=Ready", f"pod/{self.name}", "--timeout=60s")
        self.cluster.kubectl(*self._exec("tar", "x", "-C", "/data", stdin=True), stdin=archive(files))

    def _exec(self, *command: str, stdin: bool = False) -> list[str]:
        return ["exec", *(["-i"] if stdin else []), "-n", self.namespace, self.name, "--", *command]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in it."""
        return self.cluster.kubectl(*self._exec(*command), check=check)

    def ask(self, *arguments: str) -> Any:
        """Run client.py; its result."""
        return json.loads(self.run("python", "/data/client.py", *arguments).splitlines()[-1])

    def stream(self, model: str, *, count: int, rate: float) -> Stream:
        """Start streaming in the background."""
        self.run("rm", "-f", "/data/stop", "/data/stream.log")
        arguments = ("stream", "--model", model, "--count", str(count), "--rate", str(rate), "--until", "/data/stop")
        command = self.cluster.command("kubectl", *self._exec("python", "/data/client.py", *arguments))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(self.cluster.environment)
        )
        return Stream(self, process)


class Stream:
    """A stream under way."""

    def __init__(self, client: ClientPod, process: subprocess.Popen[bytes]) -> None:
        self._client = client
        self._process = process

    def answers(self) -> int:
        """How many came so far."""
        text = self._client.run("sh", "-c", "wc -l < /data/stream.log 2>/dev/null || echo 0", check=False)
        return int(text or 0)

    def wait_for_answers(self, more: int, deadline_s: float = 120.0) -> None:
        """Until so many more have come."""
        goal = self.answers() + more
        wait_until(
            f"{more} more answers", lambda: self.answers() >= goal or self._process.poll() is not None, deadline_s
        )

    def stop(self) -> dict[str, Any]:
        """Send no more, wait for every answer; the client's account."""
        self._client.run("touch", "/data/stop")
        return self.result()

    def result(self, deadline_s: float = 400.0) -> dict[str, Any]:
        """Wait for the end; the client's account."""
        out, err = self._process.communicate(timeout=deadline_s)
        assert self._process.returncode == 0, err.decode()[-2000:]
        account: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
        return account


def check_account(client: ClientPod, model: str, account: Mapping[str, Any], *, also: Sequence[str] = ()) -> None:
    """Each frame sent was answered once with a verdict and is stored once."""
    say(
        f"sent {len(account['sent'])} in {account['seconds']:.0f} s, by version {account['versions']}, p50 "
        f"{account['p50_s'] * 1e3:.0f} ms, p99 {account['p99_s'] * 1e3:.0f} ms, longest {account['max_s']:.1f} s"
    )
    assert not account["errors"]
    assert not account["unanswered"]
    assert not account["answered_twice"]
    settled = client.ask("settled", "--model", model)
    stored = client.ask("stored", "--model", model)
    ids = [*account["sent"], *also]
    lost = [name for name in ids if name not in stored]
    twice = [name for name in ids if stored.get(name, 0) > 1]
    say(f"stored {len(ids) - len(lost)} of {len(ids)}, twice {len(twice)}, dead letters {settled['dead']}")
    assert not lost
    assert not twice
    assert settled["dead"] == 0


def restricted(namespace: str) -> dict[str, Any]:
    """A Namespace that takes restricted pods alone."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}


def secret(namespace: str, name: str, values: Mapping[str, str]) -> dict[str, Any]:
    """A Secret."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict(values)}


def redis_users(folder: Path) -> dict[str, str]:
    """A Redis user for each service, as values of a Secret."""
    acl.write(folder)
    return {file.name: file.read_text() for file in folder.iterdir()}


def certificates(folder: Path, hosts: Sequence[str]) -> dict[str, str]:
    """`tls.crt` and `tls.key` for these hosts, of an authority made for them alone, and its `ca.crt`."""
    folder.mkdir()
    names = ",".join(f"DNS:{host}" for host in hosts)
    (folder / "extensions").write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for command in (
        ("req", "-x509", *key, "-days", "2", "-subj", "/CN=vigil-test-ca", "-keyout", "ca.key", "-out", "ca.crt"),
        ("req", *key, "-subj", "/CN=vigil", "-keyout", "tls.key", "-out", "tls.csr"),
        (
            *("x509", "-req", "-days", "2", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-extfile", "extensions", "-out", "tls.crt"),
        ),
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return {name: (folder / name).read_text() for name in ("tls.crt", "tls.key", "ca.crt")}
