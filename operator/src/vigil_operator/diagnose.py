"""What is wrong with a version's workers, read off its Deployment and Pods."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vigil_operator.observed import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vigil_operator.render import Manifest

# So many starts that failed are no accident.
RESTARTS_FINAL = 3
MESSAGE_AT_MOST = 500
_WAITING = {
    "ImagePullBackOff": "ImagePullFailed",
    "ErrImagePull": "ImagePullFailed",
    "InvalidImageName": "ImagePullFailed",
    "CreateContainerConfigError": "ContainerConfigError",
    "CreateContainerError": "ContainerConfigError",
    "RunContainerError": "ContainerConfigError",
}


def problems_of(deployment: Manifest, pods: list[Manifest]) -> tuple[Problem, ...]:
    """Final ones first."""
    there = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    found = [problem for pod in there if not _is_over(pod) for problem in _of_pod(pod)]
    found += _of_deployment(deployment)
    if deployment.get("status", {}).get("readyReplicas", 0) < deployment.get("spec", {}).get("replicas", 1):
        found += [_why_over(pod) for pod in there if _is_over(pod)]
    return tuple(sorted(dict.fromkeys(found), key=lambda problem: not problem.final))


def _is_over(pod: Manifest) -> bool:
    """Whether it was evicted, say: another takes its place, and it stays to be read."""
    return bool(pod.get("status", {}).get("phase") == "Failed")


def _why_over(pod: Manifest) -> Problem:
    status = pod["status"]
    message = f"{pod['metadata']['name']}: {status.get('message', 'it was ended from outside')}"
    return Problem(status.get("reason", "PodFailed"), message[:MESSAGE_AT_MOST])


def _of_deployment(deployment: Manifest) -> Iterator[Problem]:
    for condition in deployment.get("status", {}).get("conditions", []):
        message = condition.get("message", "")[:MESSAGE_AT_MOST]
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            yield Problem(condition.get("reason", "ReplicaFailure"), message)
        elif condition.get("reason") == "ProgressDeadlineExceeded":
            yield Problem("ProgressDeadlineExceeded", message)


def _of_pod(pod: Manifest) -> Iterator[Problem]:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield Problem("Unschedulable", f"{name}: {condition.get('message', '')}"[:MESSAGE_AT_MOST])
    for container in status.get("containerStatuses", []):
        yield from _of_container(name, container)


def _of_container(pod: str, container: dict[str, Any]) -> Iterator[Problem]:
    waiting = container.get("state", {}).get("waiting", {})
    reason = waiting.get("reason", "")
    if reason in _WAITING:
        yield Problem(_WAITING[reason], f"{pod}: {waiting.get('message', reason)}"[:MESSAGE_AT_MOST])
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if container.get("ready") or not ended or ended.get("exitCode", 0) == 0:
        return
    again = container.get("restartCount", 0)
    # Restarts are counted for as long as the pod is there, over reboots of its node too; the kubelet says this of those
    # that follow one another.
    looping = reason == "CrashLoopBackOff"
    often = looping and again >= RESTARTS_FINAL
    if ended.get("reason") == "OOMKilled":
        message = f"{pod}: the worker needs more memory than its limit; see spec.resources"
        yield Problem("OutOfMemory", message, final=looping and again >= RESTARTS_FINAL - 1)
        return
    said = last_words(ended.get("message", ""))
    if said is not None:
        said_reason, message, final = said
        yield Problem(said_reason, f"{pod}: {message}"[:MESSAGE_AT_MOST], final=final or often)
        return
    message = f"{pod}: ended with code {ended.get('exitCode')} after {again} restarts: {_last_line(ended)}"
    yield Problem("CrashLoop", message[:MESSAGE_AT_MOST], final=often)


def last_words(text: str) -> tuple[str, str, bool] | None:
    """Reason, message and whether it will fail again, of the line that a service logs when it can't go on."""
    for line in reversed(text.strip().splitlines()):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("event") == "failed" and "reason" in said:
            final = said.get("status") != "UNAVAILABLE"
            return camel(str(said["reason"])), str(said.get("detail", "")), final
    return None


def camel(reason: str) -> str:
    """PARITY_FAILED as Kubernetes writes reasons: ParityFailed."""
    return "".join(word.capitalize() for word in reason.split("_"))


def _last_line(ended: dict[str, Any]) -> str:
    lines = str(ended.get("message", "")).strip().splitlines()
    return lines[-1] if lines else str(ended.get("reason", "no message"))
