"""The page's script in a real browser: keys, buttons, and what becomes of a mask while the server is slow or away."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING

from aiohttp import FormData
from PIL import Image

from tests.support.browser import browser_page, draw_across
from tests.support.review import HEIGHT, PLACE, WIDTH, M, Site, form_of, image, labels, record, review_site

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.async_api import Dialog, Page, Route


async def log_in(page: Page, site: Site) -> None:
    await page.goto(str(site.server.make_url("/login")))
    await page.fill("input[name=name]", "Ann")
    await page.fill("input[name=token]", site.tokens["Ann"])
    await page.keyboard.press("Enter")
    await page.wait_for_url(str(site.server.make_url("/")))


async def draw(page: Page) -> None:
    """A stroke that is wide enough for an image this small."""
    await page.locator("#width").fill("60")
    await draw_across(page)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.02)


async def mark(site: Site) -> None:
    """Somebody else has marked all of the frame."""
    other = await site.logged_in()
    form = FormData({"label": "anomalous", **await form_of(other, PLACE)})
    mask = image(mode="RGBA", fill=(255, 0, 0, 255))
    form.add_field("mask", mask, filename="mask.png", content_type="image/png")
    assert (await other.post(PLACE, data=form)).status == 200


async def test_what_is_painted_outlives_a_login_in_another_tab(site: Site) -> None:
    await site.frames.write([record(1)])
    async with browser_page(refusals=True) as page:
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await draw(page)
        site.clock[0] += 61
        await page.keyboard.press("a")
        await page.get_by_text("log in in another tab, then repeat").wait_for()
        await log_in(await page.context.new_page(), site)
        await page.keyboard.press("a")
        await page.get_by_text("anomalous with a mask: kept").wait_for()


async def test_an_answer_waits_for_the_mask_that_stands(site: Site) -> None:
    await site.frames.write([record(1)])
    await mark(site)
    come = asyncio.Event()

    async def slow(route: Route) -> None:
        await come.wait()
        await route.continue_()

    async with browser_page() as page:
        await log_in(page, site)
        await page.route(f"**{PLACE}/mask", slow)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.keyboard.press("a")
        come.set()
        await page.get_by_text("anomalous with a mask: kept").wait_for()
    assert (await labels(site, "f1"))["human_mask"] == "true"


async def test_a_mask_that_does_not_come_is_not_replaced_by_none(site: Site) -> None:
    await site.frames.write([record(1)])
    await mark(site)
    said = (await labels(site, "f1"))["annotation"]
    async with browser_page(refusals=True) as page:
        await log_in(page, site)
        await page.route(f"**{PLACE}/mask", lambda route: route.abort())
        await page.goto(str(site.server.make_url(PLACE)))
        await page.get_by_text("the mask can't be had").wait_for()
        await page.keyboard.press("a")
        await page.get_by_text("load the page again").wait_for()
    assert (await labels(site, "f1"))["annotation"] == said


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


async def test_what_is_painted_is_lost_only_to_who_was_asked(site: Site) -> None:
    await site.frames.write([record(1), record(2)])
    asked: list[str] = []
    yes = False

    async def answer(dialog: Dialog) -> None:
        asked.append(dialog.type)
        await (dialog.accept() if yes else dialog.dismiss())

    async with browser_page() as page:
        page.on("dialog", answer)
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await draw(page)
        for key, kind in (("n", "confirm"), (" ", "beforeunload")):
            await page.keyboard.press(key)
            await until(lambda kind=kind: kind in asked)  # type: ignore[misc]
        assert page.url == str(site.server.make_url(PLACE))
        assert await page.evaluate("marked()")
        assert "human" not in await labels(site, "f1")
        yes = True
        await page.keyboard.press("n")
        await page.get_by_text("normal: kept").wait_for()
    assert asked == ["confirm", "beforeunload", "confirm"]


async def test_nobody_is_asked_where_nothing_painted_is_lost(site: Site) -> None:
    await site.frames.write([record(1)])
    await mark(site)
    await site.frames.write([record(2)])
    asked: list[str] = []

    async def refuse(dialog: Dialog) -> None:
        asked.append(dialog.type)
        await dialog.dismiss()

    async with browser_page() as page:
        page.on("dialog", refuse)
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.evaluate("standing")
        await page.keyboard.press(" ")
        await page.wait_for_url("**/f2*")
        await draw(page)
        await page.keyboard.press("u")
        await page.get_by_text("unsure with a mask: kept").wait_for()
    assert asked == []
    assert (await labels(site, "f2"))["human_mask"] == "true"


async def test_a_mask_that_is_wiped_stands_no_more(site: Site) -> None:
    await site.frames.write([record(1)])
    await mark(site)
    async with browser_page() as page:
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.evaluate("standing")
        await page.keyboard.press("c")
        await page.keyboard.press("a")
        await page.get_by_text("anomalous: kept").wait_for()
    assert (await labels(site, "f1"))["human_mask"] == "false"


async def test_a_heat_map_that_did_not_come_is_asked_for_again(tmp_path: Path) -> None:
    away = True

    async def worker(route: Route) -> None:
        await (route.abort() if away else route.fulfill(body=image(), content_type="image/png"))

    async with review_site(tmp_path, inference_address="127.0.0.1:1") as site, browser_page(refusals=True) as page:
        await site.frames.write([record(1)])
        await log_in(page, site)
        await page.route("**/ai-view", worker)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.keyboard.press("o")
        await page.get_by_text("no heat map now").wait_for()
        assert await page.locator("#overlay").is_hidden()
        assert await page.get_attribute("#toggle", "aria-pressed") == "false"
        away = False
        await page.keyboard.press("o")
        await page.wait_for_load_state("networkidle")
        assert await page.evaluate("overlay.decode().then(() => overlay.naturalWidth)") > 0
        assert await page.get_attribute("#toggle", "aria-pressed") == "true"


async def test_after_a_lost_answer_something_else_may_be_said_and_the_same_is_said_once(site: Site) -> None:
    await site.frames.write([record(1)])

    lost: list[int] = []

    async def lose(route: Route) -> None:
        lost.append((await route.fetch(max_redirects=0)).status)
        await route.abort()

    async with browser_page(refusals=True) as page:
        await log_in(page, site)
        await page.goto(str(site.server.make_url(PLACE)))
        await page.route(f"**{PLACE}", lose)
        for times in (1, 2):
            await page.keyboard.press("u")
            await until(lambda times=times: len(lost) == times)  # type: ignore[misc]
            await page.get_by_text("the server can't be reached").wait_for()
        assert lost == [303, 303]
        await page.unroute(f"**{PLACE}")
        await draw(page)
        await page.keyboard.press("a")
        await page.get_by_text("anomalous with a mask: kept").wait_for()
        await page.goto(str(site.server.make_url(PLACE)))
        assert await page.locator("aside li b").all_text_contents() == ["anomalous", "unsure"]


async def test_what_is_painted_before_a_mask_comes_stays_and_is_taken_back_by_strokes(site: Site) -> None:
    await site.frames.write([record(1)])
    other = await site.logged_in()
    form = FormData({"label": "anomalous", **await form_of(other, PLACE)})
    corner = Image.new("RGBA", (WIDTH, HEIGHT))
    corner.putpixel((0, 0), (255, 0, 0, 255))
    file = io.BytesIO()
    corner.save(file, "PNG")
    form.add_field("mask", file.getvalue(), filename="mask.png", content_type="image/png")
    assert (await other.post(PLACE, data=form)).status == 200
    come = asyncio.Event()

    async def slow(route: Route) -> None:
        await come.wait()
        await route.continue_()

    async def marks() -> list[bool]:
        at = [f"pen.getImageData({x}, {y}, 1, 1).data[3] >= 128" for x, y in ((0, 0), (WIDTH // 2, HEIGHT // 2))]
        found: list[bool] = await page.evaluate(f"[{', '.join(at)}]")
        return found

    async with browser_page() as page:
        await log_in(page, site)
        await page.route(f"**{PLACE}/mask", slow)
        await page.goto(str(site.server.make_url(PLACE)))
        await draw(page)
        come.set()
        await page.evaluate("standing")
        assert await marks() == [True, True]
        await page.keyboard.press("z")
        assert await marks() == [False, True]
        await page.keyboard.press("z")
        assert await marks() == [False, False]
