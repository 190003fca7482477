"""ReductStore's token for storage, with no more than it needs.

`python -m vigil_common.store.reduct_token URL ROOT FILE`: ROOT is the file with the server's own token, FILE gets the
new one, for VIGIL_STORE_TOKEN_FILE. It reads and writes storage's buckets, which are made here, since it may make none.
Nobody else has one: workers and the operator ask storage. Called again, the token before stops to be good. A quota for
normal frames is a setting of a bucket, which takes the server's own token.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from reduct import BucketSettings, Client, Permissions, QuotaType

from vigil_common.store.reduct import frame_settings
from vigil_common.store.reduct_client import NOT_FOUND, TROUBLE, status, unavailable
from vigil_common.store.reduct_sites import ANNOTATIONS, FRAMES, MODELS

NAME = "vigil-storage"
BUCKETS = [FRAMES, MODELS, ANNOTATIONS]


async def make_token(url: str, root: str) -> str:
    """Make the buckets that are missing, and storage's token anew.

    Raises:
        Unavailable: Nobody answers, or not to this token.
    """
    try:
        async with Client(url, api_token=root) as client:
            for name in BUCKETS:
                settings = BucketSettings(quota_type=QuotaType.NONE) if name == MODELS else frame_settings()
                bucket = await client.create_bucket(name, settings, exist_ok=True)
                await bucket.set_settings(settings)
            try:
                await client.remove_token(NAME)
            except TROUBLE as error:
                if status(error) != NOT_FOUND:
                    raise
            token: str = await client.create_token(NAME, Permissions(read=BUCKETS, write=BUCKETS))
            return token
    except TROUBLE as error:
        raise unavailable(error) from error


def main(url: str, root: str, file: str) -> None:
    """Write it for its owner's eyes."""
    token = asyncio.run(make_token(url, Path(root).read_text().strip()))
    path = Path(file)
    path.touch(mode=0o600)
    path.write_text(token)


if __name__ == "__main__":
    if len(sys.argv) != 4:  # noqa: PLR2004 - the program and its arguments
        sys.exit("usage: python -m vigil_common.store.reduct_token URL ROOT_TOKEN_FILE TOKEN_FILE")
    main(*sys.argv[1:])
