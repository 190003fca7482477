"""`vigil evaluate`: what names say of images, and what comes out of a run."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from vigil_cli.evaluation.dataset import read_dataset
from vigil_cli.evaluation.run import picture_of, save
from vigil_cli.main import app
from vigil_cli.sources import SourceError
from vigil_trainer import train

from tests.support.cells import load_cells

if TYPE_CHECKING:
    from pathlib import Path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def what(root: Path) -> dict[str, tuple[bool | None, str | None]]:
    return {
        item.name: (item.anomalous, str(item.mask.relative_to(root)) if item.mask else None)
        for item in read_dataset(root)
    }


def test_anomalibs_folder_layout_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "good/01.jpg", "defect/02.jpg", "defect/03.jpg", "mask/02.png")
    assert what(tmp_path) == {
        "good/01.jpg": (False, None),
        "defect/02.jpg": (True, "mask/02.png"),
        "defect/03.jpg": (True, None),
    }


def test_mvtecs_layout_is_read_and_its_training_images_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/00.png", "test/good/01.png", "test/crack/02.png", "ground_truth/crack/02_mask.png")
    assert what(tmp_path) == {
        "test/good/01.png": (False, None),
        "test/crack/02.png": (True, "ground_truth/crack/02_mask.png"),
    }


def test_a_mask_beside_its_image_makes_it_anomalous_and_other_images_are_of_no_kind(tmp_path: Path) -> None:
    touch(tmp_path, "001.png", "001_mask.png", "002.png")
    assert what(tmp_path) == {"001.png": (True, "001_mask.png"), "002.png": (None, None)}
    assert [item.mask for item in read_dataset(tmp_path / "001.png")] == [tmp_path / "001_mask.png"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(SourceError):
        read_dataset(tmp_path)


def test_a_run_measures_writes_reports_and_pictures_and_names_what_it_could_not_read(tmp_path: Path) -> None:
    cells = load_cells()
    bundle, data, out = tmp_path / "cells.tar", tmp_path / "data", tmp_path / "out"
    bundle.write_bytes(train(cells.train[:40], name="cells").bundle)
    for folder in ("good", "defect", "mask"):
        (data / folder).mkdir(parents=True)
    for index in range(6):
        (data / "good" / f"{index}.png").write_bytes(cells.normal[index])
        (data / "defect" / f"{index}.png").write_bytes(cells.defective[index])
    mask = np.zeros((300, 300), dtype=np.uint8)
    mask[100:200, 100:200] = 255
    Image.fromarray(mask).save(data / "mask" / "0.png")
    (data / "good" / "cut.png").write_bytes(cells.normal[0][:500])

    words = ["evaluate", str(bundle), str(data), "-o", str(out), "--visualization", "full", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "evaluation.json").read_text())
    assert (facts["normal"], facts["anomalous"]) == (6, 6)
    assert [one["image"] for one in facts["refused"]] == ["good/cut.png"]
    assert facts["auroc"] > 0.7
    assert facts["pixel_auroc"] is not None
    assert sum(facts["confusion"].values()) == 12
    for point in facts["curve"]:
        called = sum(one["score"] >= point["threshold"] for one in facts["scores"])
        assert called == point["true_anomalous"] + point["false_anomalous"]
    with Image.open(out / "pictures" / "defect" / "0.png") as picture:
        assert picture.size == (4 * 300 + 3 * 8, 300)
    html = (out / "evaluation.html").read_text()
    assert "http" not in re.sub(r"data:[^\"]*", "", html)


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    bundle = tmp_path / "cells.tar"
    bundle.write_bytes(train(load_cells().train[:8], name="cells").bundle)
    (tmp_path / "001.png").write_bytes(load_cells().defective[0])
    Image.new("L", (10, 20)).save(tmp_path / "001_mask.png")
    result = CliRunner().invoke(app, ["evaluate", str(bundle), str(tmp_path / "001.png"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "10x20 and 300x300" in result.stderr.replace("\n", "")


def test_a_report_that_can_not_be_written_is_said_before_anything_is_judged(tmp_path: Path) -> None:
    bundle, taken = tmp_path / "cells.tar", tmp_path / "taken"
    bundle.write_bytes(b"not even read")
    taken.touch()
    (tmp_path / "001.png").write_bytes(load_cells().defective[0])
    result = CliRunner().invoke(app, ["evaluate", str(bundle), str(tmp_path / "001.png"), "-o", str(taken)])
    assert result.exit_code == 1
    assert "File exists" in result.stderr


def test_images_that_only_their_suffixes_tell_apart_have_pictures_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "001.jpg", "001.png")
    show = save(tmp_path / "pictures")
    for number, item in enumerate(read_dataset(tmp_path)):
        show(item, np.full((2, 2, 3), number, dtype=np.uint8))
        with Image.open(picture_of(tmp_path / "pictures", item)) as picture:
            assert picture.getpixel((0, 0)) == (number,) * 3
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"001.jpg.png", "001.png"}
