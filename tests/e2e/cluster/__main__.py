"""A real Kubernetes for trying and for tests, on a machine without a Docker engine.

    python -m tests.e2e.cluster light      etcd and the API server alone, as any user, until Ctrl-C
    python -m tests.e2e.cluster fit        whether this machine can run a whole node; if not, why, and exit code 3
    python -m tests.e2e.cluster install    the node's Debian packages and programs (found, or built with Go)
    python -m tests.e2e.cluster up         start a whole node and wait until it is ready (root)
    python -m tests.e2e.cluster base       make the image that the services' Dockerfile starts from
    python -m tests.e2e.cluster build …    `buildah build …` with this machine's certificates and pip settings at hand
    python -m tests.e2e.cluster load IMG…  hand images from buildah's local storage to the node
    python -m tests.e2e.cluster exec CMD…  run a command in the cluster's network, with KUBECONFIG and PATH set
    python -m tests.e2e.cluster status     what runs, and what the cluster says
    python -m tests.e2e.cluster down       stop and remove everything that `up` started

`up` takes 11 s and 0.8 GB on 2 cores once the programs are there.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.e2e.cluster import fitness, node, programs
from tests.e2e.cluster.light import LightCluster

UNFIT = 3


def _light() -> None:
    with tempfile.TemporaryDirectory(prefix="vigil-light-") as folder, LightCluster(Path(folder)) as cluster:
        print(f"KUBECONFIG={cluster.kubeconfig}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


def _fit() -> None:
    if missing := fitness.missing():
        print("; ".join(missing))
        sys.exit(UNFIT)
    print("this machine can run a node")


def _exec(command: list[str]) -> None:
    os.environ["KUBECONFIG"] = str(node.KUBECONFIG)
    folders = dict.fromkeys(str(programs.ensure(name).parent) for name in ("kubectl", "helm"))
    os.environ["PATH"] = ":".join([*folders, os.environ["PATH"]])
    full = node.inside(*command)
    os.execvp(full[0], full)  # noqa: S606 - the user's own command


PLAIN = {
    "light": _light,
    "fit": _fit,
    "install": node.install,
    "up": node.up,
    "base": node.make_base_image,
    "status": node.status,
    "down": node.down,
}


def main() -> None:
    match sys.argv[1:]:
        case [name] if name in PLAIN:
            PLAIN[name]()
        case ["build", *arguments] if arguments:
            node.build_image(arguments)
        case ["load", *images] if images:
            node.load(images)
        case ["exec", *command] if command:
            _exec(command)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
