"""The page's script in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.browser import browser_page
from tests.support.review import M, Site, labels, record, review_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from playwright.async_api import Page

PLACE = f"/m/{M}/f/line-1/f1"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with review_site(tmp_path) as found:
        yield found


async def log_in(page: Page, site: Site) -> None:
    await page.goto(str(site.server.make_url("/login")))
    await page.fill("input[name=name]", "Ann")
    await page.fill("input[name=token]", site.tokens["Ann"])
    await page.keyboard.press("Enter")
    await page.wait_for_url(str(site.server.make_url("/")))


async def test_a_key_held_down_answers_for_one_frame(site: Site) -> None:
    await site.frames.write([record(number) for number in range(1, 6)])
    async with browser_page() as page:
        await log_in(page, site)
        await page.goto(str(site.server.make_url(f"/m/{M}/next")))
        await page.keyboard.down("n")
        await page.get_by_text("normal: kept").wait_for()
        await page.keyboard.down("n")  # a key that is down already: as by itself while it is held
        await page.keyboard.up("n")
        await page.keyboard.press("u")
        await page.get_by_text("unsure: kept").wait_for()
    said = [(await labels(site, f"f{number}")).get("human") for number in range(1, 6)]
    assert sorted(filter(None, said)) == ["normal", "unsure"]


async def test_space_presses_the_button_that_has_the_focus(site: Site) -> None:
    await site.frames.write([record(1), record(2)])
    async with browser_page() as page:
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.locator("#eraser").focus()
        await page.keyboard.press(" ")
        assert await page.get_attribute("#eraser", "aria-pressed") == "true"
        await page.get_by_role("button", name="Anomalous").focus()
        await page.keyboard.press(" ")
        await page.get_by_text("anomalous: kept").wait_for()
    assert (await labels(site, "f1"))["human"] == "anomalous"
