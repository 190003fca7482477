"""AnomalyModels in Kubernetes, as the verbs of `vigil_cli.rollout` need them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from vigil_common.errors import InvalidInput, NotFound, Unavailable
from vigil_operator.spec import GROUP, PLURAL


class KubectlResources:
    """By kubectl, with its ways to find and enter a cluster."""

    def __init__(self, namespace: str | None, context: str | None) -> None:
        self._options = [*(["-n", namespace] if namespace else []), *(["--context", context] if context else [])]

    def _kubectl(self, *arguments: str) -> str:
        command = ["kubectl", *self._options, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's
        except FileNotFoundError as error:
            raise InvalidInput("NO_KUBECTL", "kubectl is not on the path") from error
        if done.returncode:
            message = done.stderr.strip() or done.stdout.strip()
            raise (NotFound if "NotFound" in message else Unavailable)("KUBECTL_FAILED", message)
        return done.stdout

    def names(self) -> list[str]:
        """Every resource of the namespace."""
        found = json.loads(self._kubectl("get", f"{PLURAL}.{GROUP}", "-o", "json"))
        return [item["metadata"]["name"] for item in found["items"]]

    def get(self, name: str) -> dict[str, Any]:
        """A resource with its status."""
        found: dict[str, Any] = json.loads(self._kubectl("get", f"{PLURAL}.{GROUP}", name, "-o", "json"))
        return found

    def patch(self, name: str, patch: dict[str, Any]) -> None:
        """Merge a patch into it."""
        self._kubectl("patch", f"{PLURAL}.{GROUP}", name, "--type=merge", "-p", json.dumps(patch))
