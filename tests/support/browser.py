"""The Chromium that is installed."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page


def find_chromium() -> str | None:
    """Where the browser is; None where none is installed."""
    return os.environ.get("VIGIL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@asynccontextmanager
async def browser_page(*, refusals: bool = False) -> AsyncIterator[Page]:
    """A page of a real Chromium, which fails the test where a script or the page's policy complains.

    Args:
        refusals: Answers that are errors are expected, of which the browser would complain as well.
    """
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or name one in VIGIL_CHROMIUM")
    async with async_playwright() as playwright:
        # Its sandbox needs privileges that containers don't give.
        browser = await playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = await browser.new_context(viewport={"width": 1280, "height": 900})
        page = await context.new_page()
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        yield page
        await browser.close()
        assert [said for said in complaints if not (refusals and said.startswith("Failed to load resource"))] == []


async def draw_across(page: Page) -> None:
    """A stroke from a quarter to three quarters of the review page's image, at half its height."""
    box = await page.locator("#mask").bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.5, steps=5)
    await page.mouse.up()
