# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["ray[serve]==2.60.0", "onnxruntime==1.32.0", "pillow>=13", "numpy>=2"]
# ///
"""Ray Serve behind its own proxy: python ray_peer.py PORT."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.metadata import version

import ray
from judge import Judge
from ray import serve
from starlette.requests import Request  # noqa: TC002 - Ray reads the annotation

WORKERS = int(os.environ["PEER_WORKERS"])


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Peer:
    """One image a request, its score back."""

    def __init__(self) -> None:
        self._judge = Judge()

    async def __call__(self, request: Request) -> dict[str, float]:
        """Judge the image."""
        return {"score": self._judge.encoded(await request.body())}


if __name__ == "__main__":
    print(json.dumps({"version": version("ray")}), flush=True)
    names = ("PEER_MODEL", "PEER_INPUT", "PEER_SCORE", "PEER_BATCH", "PEER_WORKERS", "PYTHONPATH")
    variables = {name: os.environ[name] for name in names}
    cores = max(2, WORKERS)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Peer.bind(), name="peer", route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
