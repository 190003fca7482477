"""Whether this machine can run a node of its own: what a platform test is skipped for, found out by trying.

Each trial undoes itself. What is missing is said in a sentence; a failure of ours is not looked for here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.e2e.cluster import node, programs

# Run in a network and mounts of their own, which end with them.
_NETWORK = "ip link add fit0 type bridge && ip link add fit1 type veth peer name fit2 && iptables -t nat -S >/dev/null"
_CGROUP = Path("/sys/fs/cgroup")


def _tried(*command: str) -> str:
    """Empty where it works, else the last line of what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (told[-1] if told else f"exit code {done.returncode}")


def _packages() -> str:
    absent = [program for program in node.NEEDED if shutil.which(program) is None]
    if not absent:
        return ""
    if shutil.which("apt-get") is None:
        return f"{', '.join(absent)} missing, and no apt-get to install them"
    return _tried("sh", "-c", f"apt-get update -q && apt-get install -y -q {' '.join(node.DEBIAN_PACKAGES)} --simulate")


def _overlay() -> str:
    with tempfile.TemporaryDirectory(prefix="vigil-fit-") as folder:
        for part in ("lower", "upper", "work", "merged"):
            (Path(folder) / part).mkdir()
        options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
        mount = f"mount -t overlay overlay -o {options} {folder}/merged && umount {folder}/merged"
        return _tried("unshare", "--mount", "sh", "-c", mount)


def _cgroups() -> str:
    # Version 1 has a folder for each controller.
    parent = _CGROUP if (_CGROUP / "cgroup.controllers").exists() else _CGROUP / "memory"
    return _tried("sh", "-c", f"mkdir {parent}/vigil-fit && rmdir {parent}/vigil-fit")


def missing() -> list[str]:
    """What keeps this machine from running a node, in sentences; installs Debian's packages where all else is there."""
    if os.geteuid() != 0:
        return ["not root: a node makes network namespaces, mounts and cgroups"]
    found = [
        f"{what}: {why}"
        for what, why in (
            ("no network namespaces", _tried("unshare", "--net", "true")),
            ("no overlay file system", _overlay()),
            ("no cgroups of its own", _cgroups()),
            ("no Debian packages", _packages()),
        )
        if why
    ]
    if not found:
        node.install_packages()
        if why := _tried("unshare", "--net", "sh", "-c", _NETWORK):
            found.append(f"no virtual network: {why}")
    if not all(programs.can_have(name) for name in ("nodebox", "coredns", "helm")):
        found.append("no Go to build Kubernetes with, and no VIGIL_KUBE_BIN")
    return found
