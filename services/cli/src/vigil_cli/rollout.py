"""Rollouts: `vigil status|promote|…` on the local platform, `kubectl vigil status|promote|…` in Kubernetes.

Both read and write the same resource; what is done is decided by the operator.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.table import Column, Table
from rich.text import Text
from vigil_client import StorageClient, StoredFrame
from vigil_common.errors import Conflict, Unavailable
from vigil_operator.observed import REQUEST_ANNOTATION

from vigil_cli.kubectl import KubectlResources
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.options import (
    DEFAULT_STORAGE,
    FOLDER,
    FOLDER_VARIABLE,
    AsJson,
    StorageAddress,
    Token,
    console,
    errors,
    run,
    start_it,
)

REQUEST_DEADLINE_S = 30.0
ROLLBACK_DEADLINE_S = 600.0
POLL_S = 0.2
PREVIEW_FRAMES = 10_000
_PREVIEW_SPANS = (timedelta(hours=1), timedelta(days=1), timedelta(days=30), None)
_WAITS_FOR_PEOPLE = ("Pending", "Held", "Failed", "Suspended")
_SETTLED = ("Live", "Held", "Failed", "Suspended")

Name = Annotated[str, typer.Argument(help="The AnomalyModel's name.")]


class Resources(Protocol):
    """Where AnomalyModels are."""

    def names(self) -> list[str]:
        """Every resource."""
        ...

    def get(self, name: str) -> dict[str, Any]:
        """A resource with its status."""
        ...

    def patch(self, name: str, patch: dict[str, Any]) -> None:
        """Merge a patch into it."""
        ...


kubectl = typer.Typer(help="Rollouts of AnomalyModels in Kubernetes.", no_args_is_help=True)
_where: Resources = ResourceFiles(Path(os.environ.get(FOLDER_VARIABLE, FOLDER)))


@kubectl.callback()
def _in_kubernetes(
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="As kubectl's.")] = None,
    context: Annotated[str | None, typer.Option(help="As kubectl's.")] = None,
) -> None:
    global _where  # noqa: PLW0603 - one command per process
    _where = KubectlResources(namespace, context)


def _get(name: str) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        return await asyncio.to_thread(_where.get, name)

    return run(work())


def _nobody_looks(where: Resources) -> str:
    """That what is asked for waits until a platform runs, and what is shown is of the last time; else nothing."""
    if isinstance(where, ResourceFiles) and not where.looked_after():
        return f"no platform runs in {where.folder}: {start_it()}"
    return ""


def warn(where: Resources) -> bool:
    """Say so where nobody looks after these."""
    why = _nobody_looks(where)
    if why:
        errors.print(why, soft_wrap=True)
    return bool(why)


def _version(status: dict[str, Any], role: str) -> str:
    return str(status.get(role, {}).get("version", "-"))


def _condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = status.get("conditions", [])
    return next((condition for condition in found if condition["type"] == kind), {})


def _stuck(said: dict[str, Any]) -> str:
    """Why it does not go on by itself; empty where it does."""
    kind = "Promoted" if said.get("phase") in _WAITS_FOR_PEOPLE else ""
    if _condition(said, "Synced").get("status") == "False":
        kind = "Synced"
    why = _condition(said, kind)
    return f"{why.get('reason', '-')}: {why.get('message', '')}" if kind else ""


def status(
    name: Annotated[str, typer.Argument(help="Only this AnomalyModel, with what it waits for.")] = "",
    *,
    as_json: AsJson = False,
) -> None:
    """Show where rollouts are."""

    async def work() -> list[dict[str, Any]]:
        names = [name] if name else await asyncio.to_thread(_where.names)
        return [await asyncio.to_thread(_where.get, each) for each in names]

    found = run(work())
    if as_json:
        for body in found:
            typer.echo(json.dumps({"name": body["metadata"]["name"], **body.get("status", {})}))
    else:
        _show(found, alone=bool(name))
    if warn(_where):
        raise typer.Exit(1)  # what was shown is of the last time


def _show(found: list[dict[str, Any]], *, alone: bool) -> None:
    """A line each, and what they wait for."""
    table = Table("name", "phase", "live", "candidate", "compared", "flips", "ready")
    for body in found:
        said = body.get("status", {})
        shadow = said.get("shadow", {})
        numbers = (str(shadow.get("frames", "-")), str(shadow.get("flips", "-")))
        ready = _condition(said, "Ready").get("status", "-")
        roles = (_version(said, "live"), _version(said, "candidate"))
        table.add_row(body["metadata"]["name"], said.get("phase", "-"), *roles, *numbers, ready)
    console.print(table)
    if alone:
        _explain(found[0].get("status", {}))
        return
    for body in found:
        if why := _stuck(body.get("status", {})):
            console.print(f"{body['metadata']['name']}: {why}", soft_wrap=True)


def _explain(said: dict[str, Any]) -> None:
    """What one is waiting for, and where its live version decides."""
    if live := said.get("live"):
        at = live.get("threshold")
        decides = "the threshold of its bundle" if at is None else f"{at:g}"
        console.print(f"live decides at {decides}")
    for kind in ("Ready", "Progressing", "Promoted", "Synced"):
        condition = _condition(said, kind)
        text = f"{kind}={condition.get('status', '-')} {condition.get('reason', '')} {condition.get('message', '')}"
        console.print(text.rstrip(), soft_wrap=True)


async def _request(name: str, verb: str, role: str, deadline_s: float = REQUEST_DEADLINE_S) -> dict[str, Any]:
    """Ask the operator, and wait until it has answered and come to rest.

    Raises:
        Conflict: REQUEST_REFUSED.
        Unavailable: NO_ANSWER.
    """
    body = await asyncio.to_thread(_where.get, name)
    digest = body.get("status", {}).get(role, {}).get("digest", "-") if role else "-"
    if why := _nobody_looks(_where):
        raise Unavailable("NO_ANSWER", why)
    text = f"{verb} {digest} {uuid.uuid4().hex[:12]}"
    await asyncio.to_thread(_where.patch, name, {"metadata": {"annotations": {REQUEST_ANNOTATION: text}}})
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        said: dict[str, Any] = (await asyncio.to_thread(_where.get, name)).get("status", {})
        if said.get("lastRequest") == text:
            if refused := said.get("lastRequestRefused"):
                raise Conflict("REQUEST_REFUSED", refused)
            if said["phase"] in _SETTLED or verb == "retry":
                return said
        await asyncio.sleep(POLL_S)
    raise Unavailable("NO_ANSWER", f"the operator has not done it within {deadline_s:.0f} s; is it running?")


def _told(name: str, said: dict[str, Any]) -> None:
    console.print(f"{name}: {said['phase']}, version {_version(said, 'live')} is live")


def promote(
    name: Name, *, force: Annotated[bool, typer.Option("--force", help="Though its gates have not passed.")] = False
) -> None:
    """Make the candidate live once its gates have passed."""
    _told(name, run(_request(name, "force-promote" if force else "promote", "candidate")))


def abort(name: Name) -> None:
    """Turn the candidate down; live stays."""
    _told(name, run(_request(name, "abort", "candidate")))


def rollback(name: Name) -> None:
    """Go back to the version that was live before."""

    async def work() -> dict[str, Any]:
        before = (await asyncio.to_thread(_where.get, name)).get("status", {})
        said = await _request(name, "rollback", "live", ROLLBACK_DEADLINE_S)
        if said["live"]["digest"] != before.get("previous", {}).get("digest"):
            raise Conflict("ROLLBACK_FAILED", said["lastFailure"]["message"])
        return said

    _told(name, run(work()))


def pause(name: Name) -> None:
    """Stop the rollout where it is; live goes on."""

    async def work() -> None:
        await asyncio.to_thread(_where.patch, name, {"spec": {"suspend": True}})

    run(work())
    console.print(f"{name}: suspended")


def resume(name: Name) -> None:
    """Go on with a suspended rollout, or try again what failed or was turned down."""

    async def work() -> str:
        body = await asyncio.to_thread(_where.get, name)
        if body["spec"].get("suspend"):
            await asyncio.to_thread(_where.patch, name, {"spec": {"suspend": False}})
            return "goes on"
        await _request(name, "retry", "")
        return "is tried again"

    console.print(f"{name}: {run(work())}")


def history(name: Name) -> None:
    """What became of the last versions, newest first."""
    table = Table("version", "outcome", Column("when"), Column("why", overflow="fold"))
    for entry in _get(name).get("status", {}).get("history", []):
        table.add_row(str(entry["version"]), entry["outcome"], entry["at"], entry.get("message", ""))
    console.print(table)


def diff(name: Name) -> None:
    """What changes once the candidate is live."""
    body = _get(name)
    said = body.get("status", {})
    live, candidate = said.get("live", {}), said.get("candidate", {})
    table = Table("", "live", "candidate" if candidate else "asked for")
    source = body["spec"]["source"]
    other = candidate or {"version": source.get("version", "-"), "digest": source.get("digest", "-")}
    other.setdefault("threshold", body["spec"].get("threshold"))
    for key in ("version", "digest", "threshold", "readyReplicas"):
        sides = [str(side.get(key) if side.get(key) is not None else "-") for side in (live, other)]
        style = "yellow" if sides[0] != sides[1] and key != "readyReplicas" else ""
        table.add_row(key, sides[0], Text(sides[1], style))
    console.print(table)


def report(name: Name) -> None:
    """What the comparison says, gate by gate."""
    said = _get(name).get("status", {})
    shadow = said.get("shadow")
    if shadow is None:
        console.print(f"{name}: nothing is compared ({said.get('phase', '-')})")
        return
    table = Table("gate", "outcome", Column("numbers", overflow="fold"))
    for gate in shadow.get("gates", []):
        table.add_row(gate["gate"], gate["outcome"], gate["reason"])
    console.print(table)
    counted = f"{shadow['frames']} frames compared, {shadow['flips']} flips"
    console.print(f"{name}: {shadow['outcome']}; {counted}, as of {shadow['at']}")


def threshold(
    name: Name,
    value: Annotated[float, typer.Argument(min=0.0, max=1.0, help="Scores from here on are anomalous.")],
    *,
    preview: Annotated[bool, typer.Option("--preview", help="Only say which stored frames would flip.")] = False,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
) -> None:
    """Change the threshold of what is live, without a restart."""

    async def work() -> None:
        body = await asyncio.to_thread(_where.get, name)
        live = body.get("status", {}).get("live")
        if preview:
            if live is None:
                raise Conflict("NOTHING_LIVE", f"{name}: no version is live")
            await _preview(body["spec"]["source"]["model"], live["version"], value, storage_address, token)
            return
        await asyncio.to_thread(_where.patch, name, {"spec": {"threshold": value}})
        console.print(f"{name}: threshold {value:g}")

    run(work())


async def _preview(model: str, version: int, value: float, address: str, token: str | None) -> None:
    """Which of the newest stored frames would get another label."""
    async with StorageClient(address, token=token) as storage:
        frames = await _newest(storage, model, version)
    flips = [found for found in frames if found.verdict and (found.verdict.score >= value) != found.verdict.anomalous]
    table = Table(Column("frame", min_width=36), "camera", "score", "now", "then")
    for frame in sorted(flips, key=lambda found: -abs(found.verdict.score - value if found.verdict else 0))[:20]:
        verdict = frame.verdict
        if verdict is not None:
            now, then = ("anomalous", "normal") if verdict.anomalous else ("normal", "anomalous")
            table.add_row(frame.frame_id, frame.camera, f"{verdict.score:.3f}", now, then)
    if flips:
        console.print(table)
    alarms = sum(not frame.verdict.anomalous for frame in flips if frame.verdict)
    console.print(
        f"at {value:g}: {len(flips)} of the {len(frames)} newest stored frames of version {version} would flip, "
        f"{alarms} to anomalous, {len(flips) - alarms} to normal",
    )


async def _newest(storage: StorageClient, model: str, version: int) -> list[StoredFrame]:
    """The newest judged frames of a version; what is stored is told oldest first, so by ever longer times back."""
    for span in _PREVIEW_SPANS:
        start = datetime.now(UTC) - span if span else None
        found: deque[StoredFrame] = deque(maxlen=PREVIEW_FRAMES)
        async for frame in storage.frames_query(model, version=version, start=start):
            if frame.verdict is not None:
                found.append(frame)
        if len(found) == PREVIEW_FRAMES:
            break
    return list(found)


VERBS = (status, promote, abort, rollback, pause, resume, history, diff, report, threshold)
for _verb in VERBS:
    kubectl.command()(_verb)
