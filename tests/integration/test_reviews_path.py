"""From what people say to what trainers read, through the real platform."""

from __future__ import annotations

import asyncio
import io
import json
import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner
from vigil_cli.main import app
from vigil_client import Frame, HumanLabel, ServiceError, VigilClient
from vigil_trainer import train

from tests.support.anomalib import anomalib_folder
from tests.support.cells import load_cells
from tests.support.platform import MODEL, Platform, platform

HAZELNUTS = os.environ.get("VIGIL_TEST_HAZELNUTS")


async def streamed(vigil: Platform, images: list[bytes]) -> list[str]:
    """Ids of the frames, once all are stored."""
    frames = [Frame(image, MODEL, camera=f"c{index % 3}") for index, image in enumerate(images)]
    async with VigilClient(vigil.stack.ingest_address) as client:
        assert all([result.error is None async for result in client.stream(frames)])
    await vigil.settled()
    return [frame.frame_id for frame in frames]


async def vigil_command(vigil: Platform, *words: str) -> str:
    """What the command prints."""
    command = [*words, "--storage-address", vigil.stack.storage_address]
    done = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert done.exit_code == 0, done.output
    return done.stdout


async def say(vigil: Platform, labels: dict[str, HumanLabel], said: list[str]) -> None:
    """Label these one by one, each again until it is taken."""
    for frame_id, label in labels.items():
        async with asyncio.timeout(60):
            while frame_id not in said:
                try:
                    await vigil.storage.frames_annotate(
                        MODEL, frame_id, label, author="Ann", annotation_id=f"a-{frame_id}"
                    )
                    said.append(frame_id)
                except ServiceError as error:
                    if error.failure.code != "UNAVAILABLE":
                        raise


async def test_what_people_say_while_storage_is_killed_is_all_kept(tmp_path: Path) -> None:
    async with platform(tmp_path) as vigil:
        ids = await streamed(vigil, load_cells().test_images[:24])
        labels = {one: HumanLabel.ANOMALOUS if index % 2 else HumanLabel.NORMAL for index, one in enumerate(ids)}
        said: list[str] = []
        parts = [dict(list(labels.items())[start::4]) for start in range(4)]
        speaking = asyncio.gather(*(say(vigil, part, said) for part in parts))
        for goal in (4, 12):
            while len(said) < goal and not speaking.done():
                await asyncio.sleep(0.01)
            vigil.stack.kill("storage")
            await vigil.stack.start("storage")
        await speaking
        async with asyncio.timeout(60):
            while True:
                frames = vigil.storage.frames_query(MODEL, reviewed=True)
                shown = {one.frame_id: one.annotation.label async for one in frames if one.annotation}
                if shown == labels:
                    break
                await asyncio.sleep(0.1)
        histories = [await vigil.storage.frames_history(MODEL, frame_id) for frame_id in ids]
        assert [len(history.annotations) for history in histories] == [1] * len(ids)


async def test_the_commands_label_show_query_and_export(tmp_path: Path) -> None:
    image = load_cells().defective[0]
    mask, back, out = (tmp_path / name for name in ("mask.png", "back.png", "out"))
    drawn = Image.new("L", Image.open(io.BytesIO(image)).size)
    drawn.paste(255, (10, 20, 60, 80))
    drawn.save(mask)
    async with platform(tmp_path) as vigil:
        first, second, *others = await streamed(vigil, [image, load_cells().normal[0], *load_cells().defective[1:7]])
        command = partial(vigil_command, vigil)
        assert first in await command("review", "-m", MODEL, "--author", "Ann", "--size", "8")
        said = ["--author", "Ann", "--note", "a crack"]
        await command("annotate", first, "-m", MODEL, "--label", "anomalous", "--mask", str(mask), *said)
        # What looks like markup is a name all the same.
        await command("annotate", second, "-m", MODEL, "--label", "normal", "--author", "Bob [QA] x[/y] :ok:")
        assert "Bob [QA] x[/y] :ok:" in await command("frames", "query", MODEL, "--human", "normal")
        shown = json.loads(await command("frames", "get", MODEL, first, "--mask", str(back)))
        assert [(one["label"], one["author"], one["note"]) for one in shown["annotations"]] == [
            ("anomalous", "Ann", "a crack")
        ]
        assert Image.open(back).getbbox() == (10, 20, 60, 80)

        async def query(*words: str) -> list[str]:
            return (await command("frames", "query", MODEL, "--json", *words)).splitlines()

        assert [json.loads(line)["frame_id"] for line in await query("--human", "normal")] == [second]
        # A program that closes at once leaves what the worker had marked.
        found = [one async for one in vigil.storage.frames_query(MODEL, anomalous=True) if one.frame_id in others]
        worker = ["--inference-address", vigil.stack.worker_addresses[vigil.worker]]
        await command("review", found[0].frame_id, "-m", MODEL, "--open", "true", "--yes", "--author", "Bob", *worker)
        marked = await vigil.storage.frames_history(MODEL, found[0].frame_id)
        assert [(one.author, one.masked) for one in marked.annotations] == [("Bob", True)]
        left = {json.loads(line)["frame_id"] for line in await query("--not-reviewed")}
        assert left == {*others} - {found[0].frame_id}
        await command("export", "-m", MODEL, "-o", str(out))
    pairs = anomalib_folder(out)
    expected = [("normal", False), ("abnormal", True), ("abnormal", True)]
    assert [(label, mask is not None) for _, label, mask in pairs] == expected


@pytest.mark.skipif(not HAZELNUTS, reason="VIGIL_TEST_HAZELNUTS names no copy of the hazelnut_toy data set")
async def test_a_hundred_hazelnuts_are_annotated_exported_and_paired_by_anomalib(tmp_path: Path) -> None:
    root = Path(HAZELNUTS or "")
    good = [path.read_bytes() for path in sorted((root / "good").iterdir())] * 2
    bad = [path.read_bytes() for path in sorted((root / "defect").iterdir())] * 2
    masks = [path.read_bytes() for path in sorted((root / "mask").iterdir())] * 2
    async with platform(tmp_path, bundle=train(good[:34], name=MODEL).bundle) as vigil:
        ids = await streamed(vigil, [*good, *bad])
        annotate = partial(vigil.storage.frames_annotate, MODEL, author="Ann")
        await asyncio.gather(
            *(annotate(frame_id, HumanLabel.NORMAL) for frame_id in ids[: len(good)]),
            *(
                annotate(one, HumanLabel.ANOMALOUS, mask=mask)
                for one, mask in zip(ids[len(good) :], masks, strict=True)
            ),
        )
        out = tmp_path / "out"
        await vigil_command(vigil, "export", "-m", MODEL, "-o", str(out))
        pairs = anomalib_folder(out)
        assert len(pairs) == len(ids) >= 100
        truth = {(image, mask) for image, mask in zip(bad, masks, strict=True)}
        drawn = {(image.read_bytes(), mask.read_bytes()) for image, _, mask in pairs if mask}
        assert {image for image, _ in drawn} == {image for image, _ in truth}
        assert sum(label == "abnormal" for _, label, _ in pairs) == len(bad)
