"""`vigil check`: does the platform work, from a client's side?"""

import asyncio
import io
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from vigil_client import Failure, Frame, ServiceError, StorageClient, VigilClient

from vigil_cli.options import DEFAULT_INGEST, DEFAULT_STORAGE, Address, StorageAddress, Token, console, errors, run

_NO_MODEL = "no-such-model"
_POLL_S = 0.2


def check(
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="A live model; without one, it is not asked for.")] = "",
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Instead of a made one.")] = None,
    address: Address = DEFAULT_INGEST,
    storage_address: StorageAddress = DEFAULT_STORAGE,
    deadline: Annotated[float, typer.Option(help="Seconds for verdict and storage.")] = 60.0,
    token: Token = None,
) -> None:
    """Send an image, get its verdict, and read both back from the store."""
    data = image.read_bytes() if image else _picture()
    raise typer.Exit(
        run(_check(data, model, address, storage_address, deadline_s=deadline, token=token or _token_of_file()))
    )


def _token_of_file() -> str | None:
    path = os.environ.get("VIGIL_TOKEN_FILE")
    return Path(path).read_text().strip() if path else None


def _picture() -> bytes:
    """A grey slope: an image like any other, and small."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


async def _check(
    image: bytes, model: str, address: str, storage_address: str, *, deadline_s: float, token: str | None
) -> int:
    async with (
        VigilClient(address, token=token, max_retry_s=deadline_s) as client,
        StorageClient(storage_address, token=token) as storage,
    ):
        models = await storage.models_list()
        names = ", ".join(sorted({known.name for known in models})) or "none"
        console.print(f"storage: answers, published models: {names}")
        frame = Frame(image, model or _NO_MODEL, camera="vigil-check")
        result = await client.submit(frame)
        if not model:
            # The answer that only an ingest with its queue can give.
            if result.error is None or result.error.reason != "UNKNOWN_MODEL":
                return _failed("ingest", result.error)
            console.print("ingest: answers; no model was asked for, so none judged an image (--model)")
            return 0
        if result.verdict is None:
            return _failed("ingest", result.error)
        console.print(f"verdict: score {result.verdict.score:.4f} by {model} {result.verdict.version}")
        return await _read_back(storage, frame, result.verdict.score, deadline_s)


async def _read_back(storage: StorageClient, frame: Frame, score: float, deadline_s: float) -> int:
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            stored, image = await storage.frames_get(frame.model, frame.frame_id)
            break
        except ServiceError as error:
            if error.failure.code != "NOT_FOUND" or time.monotonic() > deadline:
                raise
        await asyncio.sleep(_POLL_S)
    if image != frame.image or stored.verdict is None or abs(stored.verdict.score - score) > 1e-6:  # noqa: PLR2004
        errors.print("storage: keeps another image or verdict than was sent and answered")
        return 1
    console.print(f"storage: keeps frame {frame.frame_id} with its image and verdict")
    return 0


def _failed(part: str, failure: Failure | None) -> int:
    why = "gave no verdict"
    if failure is not None:
        why = f"{failure.reason or failure.code}: {failure.message}"
    errors.print(f"{part}: {why}", soft_wrap=True)
    return 1
