"""ReductStore's client as both stores use it: one session, and what its answers mean."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
from reduct import Client, ReductError

from vigil_common.errors import InvalidInput, Unavailable, VigilError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NETWORK = -1
FORBIDDEN, NOT_FOUND, CONFLICT, TOO_EARLY, BROKEN = 403, 404, 409, 425, 500


def unavailable(error: BaseException) -> Unavailable:
    """Nobody answers, or not as it should."""
    return Unavailable("STORE_UNAVAILABLE", f"ReductStore: {error}; try again", retry_after_s=1.0)


def status(error: BaseException) -> int:
    """The HTTP status of an answer, NETWORK where there was none."""
    return int(error.status_code) if isinstance(error, ReductError) else NETWORK


def translate(error: BaseException) -> VigilError:
    """What an answer means for one record, once 404, 409, 425 and 500 have been dealt with."""
    if status(error) in (400, 422) and "quota" not in str(error).lower():
        return InvalidInput("STORE_REFUSED", f"ReductStore refused it: {error}")
    return unavailable(error)


TROUBLE = (ReductError, aiohttp.ClientError, OSError, TimeoutError)


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except TROUBLE as error:
        raise translate(error) from error


async def open_bucket(
    url: str, token: str | None, bucket: str, settings: Any, timeout_s: float | None
) -> tuple[Any, Any]:
    """A client with one session for all calls (without one, each call opens a connection), and the bucket."""
    client = await Client(url, api_token=token, timeout=timeout_s).__aenter__()
    try:
        try:
            return client, await client.get_bucket(bucket)
        except ReductError as error:
            if error.status_code != NOT_FOUND:
                raise
            return client, await client.create_bucket(bucket, settings, exist_ok=True)
    except TROUBLE as error:
        await client.__aexit__(None, None, None)
        raise unavailable(error) from error
