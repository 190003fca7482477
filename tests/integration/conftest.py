"""What several files here begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.review import Site, review_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Storage and the review page before it."""
    async with review_site(tmp_path) as found:
        yield found
