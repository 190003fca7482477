"""The light profile: a real etcd and kube-apiserver alone, as any user, ready in seconds.

There are no controllers and no node: nothing makes pods, nothing collects garbage, and a Deployment's status is what a
test writes into it.
"""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING, Self

from tests.e2e.cluster import programs
from tests.e2e.cluster.pki import Authority

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

READY_DEADLINE_S = 60.0


class LightCluster:
    """etcd and kube-apiserver on free ports of 127.0.0.1, killed at the end.

    Args:
        folder: Data, certificates, logs and the kubeconfig.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "admin.kubeconfig"
        self.server = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self._up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill both: an orderly end of the API server takes 20 s, and nothing of this is kept."""
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._processes.clear()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def pause(self, *, resume: bool = False) -> None:
        """Stop or go on answering, as a server behind a broken network does."""
        self._processes["kube-apiserver"].send_signal(signal.SIGCONT if resume else signal.SIGSTOP)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator and return what it prints.

        Raises:
            RuntimeError: It failed; the message is kubectl's own.
        """
        command = [str(programs.ensure("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def _up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("etcd", "peer", "api"):
            self._ports[name] = _free_port()
        self.server = f"https://127.0.0.1:{self._ports['api']}"
        authority = Authority(self.folder / "pki", self.server)
        if not self.kubeconfig.exists():
            authority.create()
            authority.issue("apiserver", "/CN=kube-apiserver", "DNS:localhost,IP:127.0.0.1,IP:10.96.0.1")
            authority.issue("admin", "/O=system:masters/CN=admin")
        authority.kubeconfig("admin", self.kubeconfig)
        etcd = f"http://127.0.0.1:{self._ports['etcd']}"
        peer = f"http://127.0.0.1:{self._ports['peer']}"
        self._start(
            "etcd",
            *("--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync"),
            *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
        )
        pki = authority.folder
        self._start(
            "kube-apiserver",
            *(f"--etcd-servers={etcd}", f"--secure-port={self._ports['api']}", "--bind-address=127.0.0.1"),
            *(f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key"),
            *(f"--client-ca-file={pki}/ca.crt", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16"),
            f"--service-account-key-file={pki}/service-account.key",
            f"--service-account-signing-key-file={pki}/service-account.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            # Nobody makes the service accounts' default one here.
            "--disable-admission-plugins=ServiceAccount",
        )
        self._wait_ready(pki)

    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [str(programs.component(name)), *arguments]
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait_ready(self, pki: Path) -> None:
        trust = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        trust.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        deadline = time.monotonic() + READY_DEADLINE_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.server}/readyz", timeout=5.0, context=trust):  # noqa: S310 - ours
                    return
            except OSError as error:
                ended = [name for name, process in self._processes.items() if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the API server did not come up ({ended or error}); see {self.folder}/*.log"
                    ) from error
                time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
