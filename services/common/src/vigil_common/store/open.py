"""Which store a URL stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from vigil_common.errors import InvalidInput
from vigil_common.store.retained import RetainedFrameStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vigil_common.store.ports import FrameStore, ModelStore, PassingStore


async def open_retained(
    url: str, token: str | None, *, quota_bytes: int, stays: Callable[[Mapping[str, str]], bool]
) -> RetainedFrameStore:
    """Open the store of frames with a quota on those that need not stay; see `RetainedFrameStore` and `open_stores`."""
    parts = urlsplit(url)
    kept: FrameStore
    passing: PassingStore
    if parts.scheme in ("http", "https"):
        from vigil_common.store.reduct import ReductFrameStore  # noqa: PLC0415

        kept = await ReductFrameStore.open(url, token, stride_us=2)
        passing = await ReductFrameStore.open(url, token, "vigil-frames-normal", stride_us=2, quota_bytes=quota_bytes)
    elif parts.scheme == "file":
        from vigil_common.store.embedded import EmbeddedFrameStore  # noqa: PLC0415

        folder = Path(unquote(parts.path))
        kept = await EmbeddedFrameStore.open(folder, stride_us=2)
        passing = await EmbeddedFrameStore.open(folder / "normal", stride_us=2, quota_bytes=quota_bytes)
    else:
        raise _unknown(url)
    return RetainedFrameStore(kept, passing, quota_bytes=quota_bytes, stays=stays)


async def open_stores(url: str, token: str | None, *, settle_s: float = 2.5) -> tuple[FrameStore, ModelStore]:
    """Open both stores.

    Args:
        url: `http(s)://HOST:PORT` of a ReductStore, or `file:///FOLDER` for the embedded one.
        token: ReductStore's API token.
        settle_s: See `ReductModelStore.open`.

    Raises:
        InvalidInput: For any other URL.
        Unavailable: Where ReductStore does not answer.
    """
    # Imported where they are needed: each store's library is an extra of its own.
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        from vigil_common.store.reduct import ReductFrameStore  # noqa: PLC0415
        from vigil_common.store.reduct_models import ReductModelStore  # noqa: PLC0415

        return await ReductFrameStore.open(url, token), await ReductModelStore.open(url, token, settle_s=settle_s)
    if parts.scheme == "file":
        from vigil_common.store.embedded import EmbeddedFrameStore  # noqa: PLC0415
        from vigil_common.store.embedded_models import EmbeddedModelStore  # noqa: PLC0415

        folder = Path(unquote(parts.path))
        return await EmbeddedFrameStore.open(folder), await EmbeddedModelStore.open(folder)
    raise _unknown(url)


async def open_annotations(url: str, token: str | None) -> FrameStore:
    """Open the store of what people said, apart from the frames: nothing there is ever dropped; see `open_stores`."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        from vigil_common.store.reduct import ReductFrameStore  # noqa: PLC0415

        return await ReductFrameStore.open(url, token, bucket="vigil-annotations")
    if parts.scheme == "file":
        from vigil_common.store.embedded import EmbeddedFrameStore  # noqa: PLC0415

        return await EmbeddedFrameStore.open(Path(unquote(parts.path)) / "annotations")
    raise _unknown(url)


def _unknown(url: str) -> InvalidInput:
    return InvalidInput("STORE_URL_INVALID", f"{url!r} is no store: http(s)://HOST:PORT or file:///FOLDER")
