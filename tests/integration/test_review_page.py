"""The review page in a real browser, on the real platform."""

from __future__ import annotations

import asyncio
import io
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from vigil_client import Frame, VigilClient

from tests.support.browser import browser_page, draw_across
from tests.support.cells import load_cells
from tests.support.platform import MODEL, platform

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.platform import Platform

# Where screenshots go, for people to look at; nowhere without it.
SHOTS = os.environ.get("VIGIL_TEST_SHOTS")


async def _shot(page: Page, name: str) -> None:
    if SHOTS:
        await page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


async def _said(vigil: Platform, frame_id: str) -> dict[str, str]:
    """Labels of a frame, once somebody has said something of it."""
    deadline = time.monotonic() + 15
    while True:
        stored, _ = await vigil.storage.frames_get(MODEL, frame_id)
        if "human" in stored.labels or time.monotonic() > deadline:
            return dict(stored.labels)
        await asyncio.sleep(0.05)


def _frame_of(page: Page) -> str:
    return page.url.split("?")[0].rpartition("/")[2]


async def _until(page: Page, expression: str) -> None:
    """Wait for a script's expression to be true; the page's policy lets nobody do so inside of it."""
    async with asyncio.timeout(20):
        while not await page.evaluate(expression):
            await asyncio.sleep(0.05)


async def _log_in(page: Page, url: str) -> None:
    await page.goto(url)
    assert page.url.endswith("/login")
    await page.fill("input[name=name]", "Ann Müller")
    await page.keyboard.press("Enter")
    await page.get_by_role("link", name=MODEL).click()


async def test_a_person_sees_the_cameras_labels_by_key_and_draws_a_mask(tmp_path: Path) -> None:
    cells = load_cells()
    images = [*cells.defective[:4], *cells.normal[:4]]
    async with platform(tmp_path) as vigil:
        async with VigilClient(vigil.stack.ingest_address) as client:
            frames = [Frame(image, MODEL, camera=f"line-{place % 2}") for place, image in enumerate(images)]
            async for result in client.stream(frames):
                assert result.verdict is not None
        await vigil.settled()
        workers = vigil.stack.worker_addresses[vigil.worker]
        url = await vigil.stack.add_review(inference_address=workers)
        async with browser_page() as page:
            await _log_in(page, url)
            await page.get_by_text("of 4 anomalous").first.wait_for()
            assert await page.locator("figure svg").count() == 2
            await _shot(page, "model")

            await page.get_by_role("link", name="Review").click()
            await page.wait_for_url("**/f/line-*/**")
            first = _frame_of(page)
            await page.keyboard.press("o")
            await _until(page, "document.getElementById('overlay').naturalWidth > 0")
            await _shot(page, "overlay")
            await page.keyboard.press("o")
            assert await page.locator("#overlay").is_hidden()
            await draw_across(page)
            await page.fill("input[name=note]", "crack <b>across</b>")
            await page.locator("dl").click()
            await _shot(page, "drawn")
            await page.keyboard.press("a")
            await page.get_by_text("anomalous with a mask: kept").wait_for()

            second = _frame_of(page)
            assert second != first
            await page.keyboard.press("n")
            await page.get_by_text("normal: kept").wait_for()
            third = page.url
            await page.keyboard.press(" ")
            await page.wait_for_url(lambda url: url != third)

            found = await _said(vigil, first)
            assert (found["human"], found["human_by"], found["human_mask"]) == ("anomalous", "Ann Müller", "true")
            assert (await _said(vigil, second))["human"] == "normal"
            place = f"{url}/m/{MODEL}/f/{found['camera']}/{first}"
            await page.goto(place)
            await page.get_by_text("crack <b>across</b>").wait_for()
            await _until(page, "marked()")  # the mask that stands is on the canvas again
            await _shot(page, "history")
            answer = await page.request.get(f"{place}/mask")
            _check_drawn(await answer.body(), (int(found["width"]), int(found["height"])))


def _check_drawn(mask: bytes, size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(mask)) as drawn:
        assert (drawn.mode, drawn.size) == ("L", size)
        across, down = size
        assert [drawn.getpixel((across * place // 8, down // 2)) for place in (1, 3, 5, 7)] == [0, 255, 255, 0]
        assert drawn.getpixel((across // 2, down // 4)) == 0


async def test_a_turned_image_is_seen_marked_and_exported_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    with Image.open(io.BytesIO(load_cells().defective[0])) as cell:
        cell.resize((300, 200)).save(file, "JPEG", exif=exif)
    async with platform(tmp_path) as vigil:
        async with VigilClient(vigil.stack.ingest_address) as client:
            (result,) = [one async for one in client.stream([Frame(file.getvalue(), MODEL, camera="line-0")])]
        await vigil.settled()
        url = await vigil.stack.add_review(inference_address=vigil.stack.worker_addresses[vigil.worker])
        async with browser_page() as page:
            await _log_in(page, url)
            await page.get_by_role("link", name="Review").click()
            await page.wait_for_url("**/f/line-0/**")
            await page.keyboard.press("o")
            await _until(page, "document.getElementById('overlay').naturalWidth > 0")
            for name in ("image", "overlay"):
                size = await page.evaluate(f"[{name}.naturalWidth, {name}.naturalHeight]")
                assert size == [200, 300], name
            await _shot(page, "turned")
            await page.keyboard.press("o")
            await draw_across(page)
            await page.keyboard.press("a")
            await page.get_by_text("anomalous with a mask: kept").wait_for()
        found = await vigil.storage.frames_history(MODEL, result.frame_id)
        assert found.mask is not None
        _check_drawn(found.mask, (200, 300))
