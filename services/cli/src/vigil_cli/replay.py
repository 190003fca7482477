"""`vigil frames replay`: frames that could not be judged, once more."""

import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated

import typer
from vigil_client import Frame, Result, StorageClient, VigilClient

from vigil_cli.options import (
    DEFAULT_INGEST,
    DEFAULT_STORAGE,
    Address,
    AsJson,
    Since,
    StorageAddress,
    Token,
    Until,
    check_known,
    console,
    run,
)
from vigil_cli.stream import progress_bar

_ID_AT_MOST = 64


def repeat_id(frame_id: str, attempt: int) -> str:
    """The id of a frame's repeat: with the attempt; of a long one a digest takes the place of its end."""
    suffix = f".r{attempt}"
    if len(frame_id) + len(suffix) <= _ID_AT_MOST:
        return frame_id + suffix
    suffix = f".{hashlib.sha256(frame_id.encode()).hexdigest()[:12]}{suffix}"
    return frame_id[: _ID_AT_MOST - len(suffix)] + suffix


def replay(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    reason: Annotated[str | None, typer.Option(help="Only those that failed for this reason.")] = None,
    since: Since = None,
    until: Until = None,
    attempt: Annotated[int, typer.Option(min=1, help="The same attempt sends each frame once.")] = 1,
    address: Address = DEFAULT_INGEST,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Send the dead letters again: stored frames that could not be judged.

    What was stored of a frame stays as it is. The repeat is a frame of its own, with the label `replay_of`, and an id
    made of the old one and the attempt: a command that was cut off can be given again.
    """

    async def dead(storage: StorageClient) -> AsyncIterator[Frame]:
        found = storage.frames_query(
            model,
            failed=True,
            start=since,
            stop=until,
        )
        async for stored in found:
            if "replay_of" in stored.labels or (reason is not None and stored.failure_reason != reason):
                continue
            _, image = await storage.frames_get(model, stored.frame_id, camera=stored.camera)
            yield Frame(
                image,
                model,
                frame_id=repeat_id(stored.frame_id, attempt),
                camera=stored.camera,
                captured_at=stored.captured_at,
                labels={"replay_of": stored.frame_id},
            )

    async def work() -> list[Result]:
        async with StorageClient(storage_address, token=token) as storage, VigilClient(address, token=token) as client:
            results = []
            with progress_bar() as progress:
                task = progress.add_task("replaying", total=None)
                async for result in client.stream(dead(storage)):
                    progress.advance(task)
                    results.append(result)
            if not results:
                await check_known(storage, model)
            return results

    results = run(work())
    failed = Counter(result.error.reason or result.error.code for result in results if result.error is not None)
    judged = len(results) - failed.total()
    if as_json:
        typer.echo(json.dumps({"replayed": len(results), "judged": judged, "failed": failed}))
    else:
        why = "".join(f", {count} {name}" for name, count in failed.most_common())
        console.print(f"{len(results)} replayed, {judged} judged{why}")
    if failed:
        raise typer.Exit(1)
