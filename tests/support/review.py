"""The review page as a process, and the Chromium that is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientError, ClientSession
from playwright.async_api import async_playwright
from vigil_cli.local.process import Process, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from playwright.async_api import Page


@asynccontextmanager
async def review_page(storage_address: str, log: Path, **settings: str) -> AsyncIterator[str]:
    """A process of it, with settings without their prefix; gives its URL."""
    port = free_port()
    env = {"STORAGE_ADDRESS": storage_address, "REVIEW_BIND": f"127.0.0.1:{port}", "METRICS_PORT": "0", **settings}
    process = Process(
        "review",
        [sys.executable, "-m", "vigil_review"],
        log,
        {**os.environ, **{f"VIGIL_{name}": value for name, value in env.items()}},
    )
    process.start()
    try:
        async with ClientSession() as http, asyncio.timeout(30):
            while not await _answers(http, f"http://127.0.0.1:{port}/healthz"):
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        await process.stop()


async def _answers(http: ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as answer:
            return answer.status == 200
    except ClientError:
        return False


def find_chromium() -> str | None:
    """Where the browser is; None where none is installed."""
    return os.environ.get("VIGIL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@asynccontextmanager
async def browser_page() -> AsyncIterator[Page]:
    """A page of a real Chromium, which fails the test where a script or the page's policy complains."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or name one in VIGIL_CHROMIUM")
    async with async_playwright() as playwright:
        # Its sandbox needs privileges that containers don't give.
        browser = await playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        yield page
        await browser.close()
        assert complaints == []
