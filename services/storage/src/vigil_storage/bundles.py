"""A bundle as it comes in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vigil_common.bundle import BundleCheck
from vigil_common.errors import InvalidBundle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_common.bundle import Checked

# Larger than any chunk that comes.
BUFFER_BYTES = 8 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what chunks leave behind for the next ones.

    By itself glibc gives each back to the system and takes new pages for the next, which is as much work as all else
    that is done with a bundle. It learns from the first large buffer that is freed.
    """
    bytearray(BUFFER_BYTES)


class Incoming:
    """A bundle under way, held against what was said of it.

    Args:
        chunks: As they come.
        name: The model's, as announced.
        digest: Of the bundle, as announced.
        size_bytes: Its length, as announced.
    """

    def __init__(self, chunks: AsyncIterator[bytes], *, name: str, digest: str, size_bytes: int) -> None:
        self._chunks = chunks
        self._name = name
        self._digest = digest
        self._size_bytes = size_bytes
        self._bundle: Checked | None = None

    @property
    def bundle(self) -> Checked:
        """What it is, once all of it has been passed on."""
        assert self._bundle is not None  # noqa: S101 - `chunks` has ended
        return self._bundle

    async def chunks(self) -> AsyncIterator[bytes]:
        """Pass it on, and its last bytes only once all of it is known to be good.

        Raises:
            InvalidBundle: As `BundleCheck`, or BUNDLE_TOO_LARGE, NAME_MISMATCH, DIGEST_MISMATCH.
        """
        check = BundleCheck()
        keep_freed_memory()
        held, left = b"", self._size_bytes
        checking: asyncio.Future[None] | None = None
        async for chunk in self._chunks:
            if checking is not None:
                await checking
            # Beside the loop, which takes the next chunk and writes the one before meanwhile.
            checking = asyncio.ensure_future(asyncio.to_thread(check.feed, chunk))
            if held:
                yield held
            held = chunk
            left -= len(chunk)
            if left < 0:
                what = f"the bundle is longer than the {self._size_bytes} bytes announced"
                raise InvalidBundle("BUNDLE_TOO_LARGE", what)
        if checking is not None:
            await checking
        # A manifest may be long, and everybody else would wait for its YAML.
        found = await asyncio.to_thread(check.finish)
        if found.manifest.name != self._name:
            raise InvalidBundle("NAME_MISMATCH", f"the bundle is of model {found.manifest.name}, not of {self._name}")
        if found.digest != self._digest:
            raise InvalidBundle("DIGEST_MISMATCH", f"the bundle hashes to {found.digest}, not to {self._digest}")
        self._bundle = found
        yield held
