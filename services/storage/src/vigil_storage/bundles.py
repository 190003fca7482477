"""A bundle as it comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vigil_common.errors import InvalidBundle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vigil_common.bundle import BundleCheck


async def checked_chunks(
    check: BundleCheck, chunks: AsyncIterator[bytes], *, name: str, digest: str, size_bytes: int
) -> AsyncIterator[bytes]:
    """Pass a bundle on, and its last bytes only once all of it is known to be good.

    Raises:
        InvalidBundle: As `BundleCheck`, or NAME_MISMATCH, DIGEST_MISMATCH.
    """
    held, left = b"", size_bytes
    async for chunk in chunks:
        check.feed(chunk)
        if held:
            yield held
        held = chunk
        left -= len(chunk)
        if left < 0:
            raise InvalidBundle("BUNDLE_TOO_LARGE", f"the bundle is longer than the {size_bytes} bytes announced")
    found = check.finish()
    if found.manifest.name != name:
        raise InvalidBundle("NAME_MISMATCH", f"the bundle is of model {found.manifest.name}, not of {name}")
    if found.digest != digest:
        raise InvalidBundle("DIGEST_MISMATCH", f"the bundle hashes to {found.digest}, not to {digest}")
    yield held
