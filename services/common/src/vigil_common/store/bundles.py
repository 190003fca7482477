"""Bundles on their way into a store and out of it: whole, or an error."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vigil_common.errors import DataLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_common.store.ports import ModelInfo


class Measured:
    """Chunks that must have a size together; remembers what they raised.

    Args:
        chunks: As they come.
        size_bytes: Of all of them.
    """

    def __init__(self, chunks: AsyncIterator[bytes], size_bytes: int) -> None:
        self._chunks = chunks
        self._left = size_bytes
        self._error: BaseException | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The chunks; `DataLost` at the first byte too many, and where they end early."""
        try:
            async for chunk in self._sized():
                yield chunk
        except BaseException as error:
            self._error = error
            raise

    async def _sized(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self._left -= len(chunk)
            if self._left < 0:
                raise DataLost("BUNDLE_INCOMPLETE", "the bundle goes on behind its end; send it again")
            yield chunk
        if self._left:
            raise DataLost("BUNDLE_INCOMPLETE", f"the bundle ends {self._left} bytes early; send it again")

    def reraise(self) -> None:
        """Raise what the chunks raised, if they did."""
        if self._error is not None and not isinstance(self._error, GeneratorExit):
            raise self._error


async def checked(chunks: AsyncIterator[bytes], info: ModelInfo) -> AsyncIterator[bytes]:
    """The chunks of a version; behind the last, `DataLost` where they are not what was published."""
    digest = hashlib.sha256()
    async for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if f"sha256:{digest.hexdigest()}" != info.digest:
        what = f"the bundle of {info.name} version {info.version} is not what was published"
        raise DataLost("DIGEST_MISMATCH", what)
