"""Makes the README's pictures anew: `uv run python -m tests.support.pictures`, with Chromium installed.

The images are drawn here, brushed plates with scratches, so that the pictures belong to this project. Everything else
is the real thing: a model trained on plates, the whole platform as processes, the review page in a browser.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import tempfile
from http import HTTPStatus
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from vigil_cli.evaluate import evaluate
from vigil_cli.local import LocalStack
from vigil_cli.models import make_live
from vigil_client import Frame, StorageClient, VigilClient, Visualization
from vigil_trainer import train

from tests.support.browser import browser_page

DOCS = Path(__file__).parents[2] / "docs"
MODEL, CAMERA = "plates", "line-1"
SIZE = 320
SEEN, JUDGED = 60, 32


def plate(rng: np.random.Generator, *, scratched: bool) -> bytes:
    """A brushed metal plate with four holes, as PNG."""
    brushed = np.repeat(rng.normal(168, 26, (SIZE, 1)), SIZE, axis=1) + rng.normal(0, 6, (SIZE, SIZE))
    image = Image.fromarray(np.clip(brushed, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    draw = ImageDraw.Draw(image)
    for across in (48, SIZE - 48):
        for down in (48, SIZE - 48):
            draw.ellipse((across - 14, down - 14, across + 14, down + 14), fill=24, outline=96, width=3)
    if scratched:
        points = [tuple(rng.uniform(70, SIZE - 70, 2))]
        for _ in range(5):
            points.append(tuple(np.clip(np.add(points[-1], rng.normal(0, 34, 2)), 20, SIZE - 20)))
        draw.line(points, fill=238, width=3, joint="curve")
        draw.line([(x + 2, y + 2) for x, y in points], fill=70, width=1)
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


async def make(folder: Path) -> None:
    """Train, judge, review; the pictures go to docs/."""
    rng = np.random.default_rng(7)
    learned = [folder / "normal" / f"{number:03}.png" for number in range(SEEN)]
    learned[0].parent.mkdir()
    for path in learned:
        path.write_bytes(plate(rng, scratched=False))
    trained = await asyncio.to_thread(train, learned, name=MODEL)
    bundle, scratched = folder / "plates.tar", folder / "scratched.png"
    bundle.write_bytes(trained.bundle)
    scratched.write_bytes(plate(rng, scratched=True))
    evaluate(bundle, scratched, output=folder / "report", visualization=Visualization.FULL)
    shutil.copy(next((folder / "report" / "pictures").rglob("*.png")), DOCS / "evaluate.png")
    images = [plate(rng, scratched=number % 4 == 0) for number in range(JUDGED)]
    async with LocalStack(folder / "platform") as stack:
        async with StorageClient(stack.storage_address) as storage:
            version = await storage.models_publish(trained.bundle)
        await make_live(stack.storage_address, MODEL, version.version)
        worker = await stack.add_worker(MODEL, version.version)
        async with VigilClient(stack.ingest_address) as client:
            results = [one async for one in client.stream([Frame(image, MODEL, camera=CAMERA) for image in images])]
        worst = max(results, key=lambda result: result.verdict.score if result.verdict else 0)
        url = await stack.add_review(inference_address=stack.worker_addresses[worker])
        async with browser_page() as page:
            await page.goto(url)
            await page.fill("input[name=name]", "Ann")
            await page.keyboard.press("Enter")
            await page.get_by_role("link", name=MODEL).wait_for()
            shown = None
            while shown is None or shown.status == HTTPStatus.NOT_FOUND:  # It is not stored yet.
                shown = await page.goto(f"{url}/m/{MODEL}/f/{CAMERA}/{worst.frame_id}")
            await page.keyboard.press("o")
            await page.wait_for_load_state("networkidle")
            await page.screenshot(path=str(DOCS / "review.png"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(make(Path(folder)))
