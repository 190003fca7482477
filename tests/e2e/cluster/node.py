"""The full profile: a real single-node Kubernetes on a Debian machine, without a Docker engine, in its own network.

etcd, the control plane, containerd, kubelet, kube-proxy and CoreDNS run in one network namespace, so that no firewall
rule, route or port of the machine changes; a client that must reach the cluster runs in there too. The default storage
class makes a folder of the machine for each volume claim. Network policies are accepted, not enforced. Needs root.
State lives under VIGIL_CLUSTER_DIR (default /var/tmp/vigil-cluster).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.cluster import programs
from tests.e2e.cluster.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIR = Path(os.environ.get("VIGIL_CLUSTER_DIR", "/var/tmp/vigil-cluster"))  # noqa: S108 - kept over a reboot, unlike /tmp
KUBECONFIG = DIR / "admin.kubeconfig"
VOLUMES = Path("/tmp/hostpath_pv")  # noqa: S108 - where the controller manager's host-path provisioner makes its folders
NETNS = "vigil"
NODE_NAME = "vigil"
NODE_IP = "10.10.0.1"
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
API_URL = f"https://{NODE_IP}:6443"
PAUSE_IMAGE = "localhost/pause:vigil"
# What the services' Dockerfile starts from.
BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 5.0
NEEDED = ("containerd", "runc", "buildah", "conntrack", "debootstrap", "iptables", "openssl", "xz")
DEBIAN_PACKAGES = (
    *("containerd", "runc", "containernetworking-plugins", "iptables", "conntrack", "iproute2", "openssl"),
    *("buildah", "debootstrap", "xz-utils", "gcc", "libc6-dev"),
)
RUNNING = (
    *("coredns", "kube-proxy", "kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver"),
    *("volume-opener", "containerd", "etcd"),
)
PAUSE_SOURCE = """
#include <unistd.h>
#include <signal.h>
#include <stdlib.h>
static void leave(int signal_number) { exit(0); }
int main(void) {
  signal(SIGTERM, leave); signal(SIGINT, leave); signal(SIGCHLD, SIG_IGN);
  for (;;) pause();
}
"""


def inside(*command: str | Path) -> list[str]:
    """The command, moved into the cluster's network; mounts and cgroups stay the machine's."""
    return ["nsenter", f"--net=/run/netns/{NETNS}", *map(str, command)]


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """Run kubectl inside as the administrator; what it prints.

    Raises:
        RuntimeError: It failed; the message is kubectl's own.
    """
    command = inside(programs.ensure("kubectl"), "--kubeconfig", KUBECONFIG, *arguments)
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _run(*command: str | Path) -> str:
    """Run a command; its output only matters where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- programs and images


def install_packages() -> None:
    """The Debian packages."""
    if any(shutil.which(program) is None for program in NEEDED):
        _run("apt-get", "update", "-q")
        _run("apt-get", "install", "-y", "-q", "--no-install-recommends", *DEBIAN_PACKAGES)


def install() -> None:
    """The Debian packages and every program."""
    install_packages()
    for program in ("nodebox", "coredns", "helm", "kubectl"):
        programs.ensure(program)


def make_base_image() -> None:
    """Stand-in for the official slim Python image out of Debian's packages, where no image registry can be reached."""
    if _succeeds("buildah", "inspect", "--type=image", BASE_IMAGE):
        return
    root = DIR / "base-image"
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    include = "--include=python3,python3-venv,python3-pip,ca-certificates"
    _run("debootstrap", "--variant=minbase", include, "bookworm", root)
    for leftover in (root / "var/cache/apt/archives", root / "var/lib/apt/lists"):
        shutil.rmtree(leftover, ignore_errors=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    container = _run("buildah", "from", "scratch")
    _run("buildah", "add", "--quiet", container, root, "/")
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    _run("buildah", "config", "--cmd", "python3", "--env", path, container)
    _run("buildah", "commit", "--quiet", container, BASE_IMAGE)
    _run("buildah", "rm", container)
    shutil.rmtree(root)


def build_image(arguments: Sequence[str]) -> None:
    """`buildah build` with this machine's certificates and pip settings at hand, and nothing pulled."""
    settings = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
    volumes = [part for path in settings for part in ("--volume", f"{path}:{path}:ro")]
    options = ("--isolation=chroot", "--network=host", "--pull-never", "--layers")
    subprocess.run(["buildah", "build", *options, *volumes, *arguments], check=True)


def load(images: Sequence[str]) -> None:
    """Hand images from buildah's local storage to the node."""
    for image in images:
        archive = DIR / f"load-{os.getpid()}.tar"
        archive.unlink(missing_ok=True)
        _run("buildah", "push", "--quiet", image, f"docker-archive:{archive}:{image}")
        _run(*_ctr("images", "import", str(archive)))
        archive.unlink()
        print(f"loaded {image}", flush=True)


def _ctr(*arguments: str) -> list[str]:
    return ["ctr", "--address", str(DIR / "containerd.sock"), "--namespace", "k8s.io", *arguments]


def _make_pause_image() -> None:
    """A container that sleeps: the sandbox that holds a pod's network open."""
    archive = DIR / "pause.tar"
    if not archive.exists():
        source = _write(DIR / "pause" / "pause.c", PAUSE_SOURCE)
        binary = source.with_name("pause-bin")
        _run("gcc", "-Os", "-static", "-o", binary, source)
        container = _run("buildah", "from", "scratch")
        _run("buildah", "copy", "--quiet", container, binary, "/pause")
        _run("buildah", "config", "--entrypoint", '["/pause"]', container)
        _run("buildah", "commit", "--quiet", container, PAUSE_IMAGE)
        _run("buildah", "rm", container)
        _run("buildah", "push", "--quiet", PAUSE_IMAGE, f"docker-archive:{archive}:{PAUSE_IMAGE}")
    _run(*_ctr("images", "import", str(archive)))


# --- identities and network


def _make_identities() -> None:
    authority = Authority(DIR / "pki", API_URL)
    authority.create()
    names = ["kubernetes", *(f"kubernetes.default{end}" for end in ("", ".svc", ".svc.cluster.local")), "localhost"]
    addresses = (NODE_IP, API_SERVICE_IP, "127.0.0.1")
    server = ",".join([*(f"DNS:{name}" for name in names), *(f"IP:{address}" for address in addresses)])
    authority.issue("apiserver", "/CN=kube-apiserver", server)
    authority.issue("kubelet", f"/O=system:nodes/CN=system:node:{NODE_NAME}", f"DNS:{NODE_NAME},IP:{NODE_IP}")
    clients = {
        "admin": "/O=system:masters/CN=admin",
        "apiserver-kubelet": "/O=system:masters/CN=kube-apiserver-kubelet",
        "controller-manager": "/CN=system:kube-controller-manager",
        "scheduler": "/CN=system:kube-scheduler",
        "proxy": "/CN=system:kube-proxy",
        "front-proxy": "/CN=front-proxy",
        "coredns": "/O=system:masters/CN=coredns",
    }
    for name, subject in clients.items():
        authority.issue(name, subject)
    for name in ("admin", "kubelet", "controller-manager", "scheduler", "proxy", "coredns"):
        authority.kubeconfig(name, DIR / f"{name}.kubeconfig")


def _make_network() -> None:
    _succeeds("ip", "netns", "add", NETNS)
    for command in (
        "ip link set lo up",
        "ip link add node0 type bridge",
        f"ip addr add {NODE_IP}/32 dev node0",
        "ip link set node0 up",
        # No packet leaves the namespace; the route only gives the service addresses a way to the firewall rules.
        "ip route add default dev node0",
        "sysctl -qw net.ipv4.ip_forward=1",
    ):
        _succeeds(*inside(*command.split()))
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_CIDR}]],
        "dataDir": str(DIR / "ipam"),
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [
        {"type": "ptp", "ipMasq": False, "mtu": 65000, "ipam": addresses},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    network = {"cniVersion": "0.4.0", "name": "vigil", "plugins": plugins}
    _write(DIR / "cni" / "10-vigil.conflist", json.dumps(network, indent=1))


# --- processes


def _start(name: str, *command: str | Path) -> None:
    with (DIR / "logs" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            inside(*command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    _write(DIR / "run" / f"{name}.pid", f"{process.pid} {_born(process.pid)}")


def _born(pid: int) -> str:
    """What tells a process from one that gets its number later, also after a reboot; empty once it has ended."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    start_ticks = values[18]
    return "" if state == "Z" else f"{start_ticks} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def running(name: str) -> int | None:
    """The process id of a part while it runs."""
    try:
        pid, born = (DIR / "run" / f"{name}.pid").read_text().split(maxsplit=1)
    except (OSError, ValueError):
        return None
    return int(pid) if born == _born(int(pid)) else None


def _stop(name: str) -> None:
    pid = running(name)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while running(name) is not None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    (DIR / "run" / f"{name}.pid").unlink(missing_ok=True)


def _wait_for(what: str, probe: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not probe():
        if time.monotonic() - started > READY_DEADLINE_S:
            sys.exit(f"{what} did not come up in {READY_DEADLINE_S:.0f} s; see {DIR}/logs")
        time.sleep(0.2)
    print(f"{what} after {time.monotonic() - started:.1f} s", flush=True)


def _start_etcd() -> None:
    url = "http://127.0.0.1:2379"
    urls = ("--listen-client-urls", url, "--advertise-client-urls", url)
    peer = ("--listen-peer-urls", "http://127.0.0.1:2380")
    _start("etcd", programs.component("etcd"), "--data-dir", DIR / "etcd", *urls, *peer, "--unsafe-no-fsync")


def _start_apiserver() -> None:
    pki = DIR / "pki"
    _start(
        "kube-apiserver",
        programs.component("kube-apiserver"),
        *("--etcd-servers=http://127.0.0.1:2379", f"--advertise-address={NODE_IP}", "--secure-port=6443"),
        *(f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key"),
        f"--client-ca-file={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={pki}/service-account.key",
        f"--service-account-signing-key-file={pki}/service-account.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        *(f"--requestheader-client-ca-file={pki}/ca.crt", "--requestheader-allowed-names=front-proxy"),
        *("--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group"),
        "--requestheader-username-headers=X-Remote-User",
        *(f"--proxy-client-cert-file={pki}/front-proxy.crt", f"--proxy-client-key-file={pki}/front-proxy.key"),
        *(f"--service-cluster-ip-range={SERVICE_CIDR}", "--authorization-mode=Node,RBAC", "--allow-privileged=true"),
        "--enable-admission-plugins=NodeRestriction",
    )


def _start_controllers() -> None:
    pki = DIR / "pki"
    alone = ("--leader-elect=false", "--bind-address=127.0.0.1")
    _start(
        "kube-controller-manager",
        programs.component("kube-controller-manager"),
        *(f"--kubeconfig={DIR}/controller-manager.kubeconfig", *alone, "--use-service-account-credentials=true"),
        *(f"--service-account-private-key-file={pki}/service-account.key", f"--root-ca-file={pki}/ca.crt"),
        *(f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key"),
        "--enable-hostpath-provisioner=true",
    )
    scheduler = programs.component("kube-scheduler")
    _start("kube-scheduler", scheduler, f"--kubeconfig={DIR}/scheduler.kubeconfig", *alone)


def _start_containerd() -> None:
    unused = ", ".join(f'"io.containerd.snapshotter.v1.{name}"' for name in ("btrfs", "zfs", "aufs"))
    config = f"""version = 2
root = "{DIR}/containerd"
state = "{DIR}/containerd-state"
disabled_plugins = [{unused}]
[grpc]
  address = "{DIR}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{DIR}/cni"
"""
    _start("containerd", "containerd", "--config", _write(DIR / "containerd.toml", config))


def _start_kubelet() -> None:
    pki = DIR / "pki"
    authentication = {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": f"{pki}/ca.crt"},
    }
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{DIR}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "failCgroupV1": False,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": True,
        "clusterDNS": [NODE_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(_write(DIR / "resolv.conf", "")),
        "tlsCertFile": f"{pki}/kubelet.crt",
        "tlsPrivateKeyFile": f"{pki}/kubelet.key",
        "authentication": authentication,
        "authorization": {"mode": "Webhook"},
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": False,
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "10s",
        "registerNode": True,
        "maxPods": 60,
        "volumePluginDir": str(DIR / "volume-plugins"),
    }
    _start(
        "kubelet",
        programs.component("kubelet"),
        f"--config={_write(DIR / 'kubelet.yaml', json.dumps(config, indent=1))}",
        *(f"--kubeconfig={DIR}/kubelet.kubeconfig", f"--root-dir={DIR}/kubelet"),
        *(f"--hostname-override={NODE_NAME}", f"--node-ip={NODE_IP}", "--v=1"),
    )


def _start_proxy() -> None:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": f"{DIR}/proxy.kubeconfig"},
        "hostnameOverride": NODE_NAME,
        "bindAddress": NODE_IP,
        "clusterCIDR": POD_CIDR,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        # Limits of the machine, not of the namespace: they stay as they are.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "0.1s", "syncPeriod": "30s"},
    }
    path = _write(DIR / "proxy.yaml", json.dumps(config, indent=1))
    _start("kube-proxy", programs.component("kube-proxy"), f"--config={path}")


def _start_dns() -> None:
    corefile = f""".:53 {{
    bind {NODE_IP}
    errors
    health 127.0.0.1:8080
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {DIR}/coredns.kubeconfig vigil
        pods insecure
        ttl 5
    }}
    cache 5
}}
"""
    _start("coredns", programs.ensure("coredns"), "-conf", _write(DIR / "Corefile", corefile))


def _start_volume_opener() -> None:
    """Let pods of any user write: the provisioner's folders are root's, and fsGroup leaves host paths alone."""
    VOLUMES.mkdir(mode=0o750, exist_ok=True)
    find = f"find {VOLUMES} -mindepth 1 -maxdepth 1 -type d ! -perm 0777 -exec chmod 0777 {{}} +"
    _start("volume-opener", "sh", "-c", f"while sleep 0.2; do {find}; done")


def _pod_networks() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("cni-*")}


def _node_ready() -> bool:
    path = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    return "True" in kubectl("get", "node", NODE_NAME, "-o", path, check=False)


def up() -> None:
    """Start everything and wait until the node is ready."""
    if os.geteuid() != 0:
        sys.exit("this needs root: it makes a network namespace, mounts and cgroups")
    if running("kube-apiserver"):
        print(f"already up; KUBECONFIG={KUBECONFIG}")
        return
    started = time.monotonic()
    install()
    for folder in ("logs", "run", "cni"):
        (DIR / folder).mkdir(parents=True, exist_ok=True)
    _write(DIR / "run" / "pod-networks-before", "\n".join(_pod_networks()))
    if not KUBECONFIG.exists():
        _make_identities()
    _make_network()
    _start_etcd()
    _start_containerd()
    _start_apiserver()
    _wait_for("containerd", lambda: _succeeds(*_ctr("version")))
    _make_pause_image()
    _wait_for("kube-apiserver", lambda: kubectl("get", "--raw=/readyz", check=False) == "ok")
    _start_controllers()
    _start_kubelet()
    _start_proxy()
    _start_dns()
    _start_volume_opener()
    _wait_for("node", _node_ready)
    _wait_for("service account", lambda: "default" in kubectl("get", "serviceaccounts", "-o", "name", check=False))
    metadata = {"name": "folder", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
    kind = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": metadata}
    kubectl("apply", "-f", "-", stdin=json.dumps({**kind, "provisioner": "kubernetes.io/host-path"}))
    print(f"up in {time.monotonic() - started:.1f} s; KUBECONFIG={KUBECONFIG}")


def down() -> None:
    """Stop everything that `up` started; remove its network, mounts and state."""
    if running("kube-apiserver"):
        force = ("--force", "--grace-period=0", "--wait=false")
        kubectl("delete", "pods", "--all", "--all-namespaces", *force, check=False)
    _stop("kubelet")
    tasks = subprocess.run(_ctr("tasks", "list", "-q"), capture_output=True, text=True, check=False)
    for task in tasks.stdout.split():
        _succeeds(*_ctr("tasks", "kill", "-s", "SIGKILL", "-a", task))
    for name in RUNNING:
        _stop(name)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{DIR}/")), key=len, reverse=True):
        _succeeds("umount", "--lazy", mount)
    before = DIR / "run" / "pod-networks-before"
    others = set(before.read_text().split()) if before.exists() else _pod_networks()
    for network in {NETNS} | _pod_networks() - others:
        _succeeds("ip", "netns", "delete", network)
    shutil.rmtree(DIR, ignore_errors=True)
    shutil.rmtree(VOLUMES, ignore_errors=True)
    print("down")


def status() -> None:
    """What runs, and what the cluster says."""
    for name in reversed(RUNNING):
        print(f"{name:26} {'running' if running(name) else 'stopped'}")
    print(kubectl("get", "nodes,pods", "--all-namespaces", check=False))
