"""`vigil train` and `vigil model import`: which images are taken, and what the bundle says."""

from __future__ import annotations

import io
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from vigil_cli.main import app
from vigil_cli.sources import SourceError
from vigil_cli.train import TrainingSet, _train
from vigil_common.bundle import read_manifest
from vigil_trainer.with_anomalib import _link

from tests.support.cells import load_cells

if TYPE_CHECKING:
    from pathlib import Path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_an_export_is_learned_from_with_and_without_masks(tmp_path: Path) -> None:
    touch(
        tmp_path, "normal/000001_a.png", "abnormal/000002_b.png", "mask/000002_b.png", "abnormal_unmasked/000003_c.png"
    )
    found = TrainingSet.of_dataset(tmp_path)
    assert found.normal == (tmp_path / "normal/000001_a.png",)
    assert set(found.abnormal) == {tmp_path / "abnormal/000002_b.png", tmp_path / "abnormal_unmasked/000003_c.png"}
    masked = found.abnormal.index(tmp_path / "abnormal/000002_b.png")
    assert found.masks == {masked: tmp_path / "mask/000002_b.png"}


def test_the_test_images_of_a_data_set_are_not_learned_from(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/1.png", "test/good/2.png", "test/crack/3.png", "ground_truth/crack/3_mask.png")
    assert TrainingSet.of_dataset(tmp_path) == TrainingSet((tmp_path / "train/good/1.png",))


def test_sources_add_up_and_masks_stay_with_their_images(tmp_path: Path) -> None:
    touch(tmp_path, "ok/1.png", "bad/2.png", "bad/3.png", "marks/3_mask.png", "bad/4.png", "bad/4_mask.png")
    one = TrainingSet.of_folders(tmp_path / "ok", tmp_path / "bad", tmp_path / "marks")
    both = TrainingSet((), (tmp_path / "other.png",)) + one
    assert both.normal == (tmp_path / "ok/1.png",)
    assert [path.name for path in both.abnormal] == ["other.png", "2.png", "3.png", "4.png"]
    assert {place: path.name for place, path in both.masks.items()} == {2: "3_mask.png", 3: "4_mask.png"}
    with pytest.raises(SourceError):
        TrainingSet.of_folders(tmp_path / "nothing", None, None)


def test_a_bundle_says_what_it_was_trained_on_and_how_good_it_was(tmp_path: Path) -> None:
    cells = load_cells()
    for place, image in enumerate(cells.train[:12]):
        touch(tmp_path, f"data/normal/{place}.png")
        (tmp_path / f"data/normal/{place}.png").write_bytes(image)
    for place, image in enumerate(cells.defective[:4]):
        touch(tmp_path, f"data/abnormal/{place}.png", f"data/mask/{place}.png")
        (tmp_path / f"data/abnormal/{place}.png").write_bytes(image)
        height, width = np.asarray(Image.open(io.BytesIO(image))).shape[:2]
        mask = Image.new("L", (width, height))
        mask.paste(255, (10, 10, 60, 60))
        mask.save(tmp_path / f"data/mask/{place}.png")
    output = tmp_path / "out" / "cells.tar"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "data"), "-m", "cells", "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "12 normal and 4 anomalous images, 4 masks, AUROC" in result.output
    lineage = read_manifest(output.read_bytes()).lineage
    assert lineage["images"] == {"normal": 12, "abnormal": 4, "masks": 4}
    assert lineage["source"] == {"folders": [str(tmp_path / "data")]}
    assert set(lineage["metrics"]) == {"auroc", "f1", "pixel_auroc", "pro"}
    nothing = CliRunner().invoke(app, ["train", "-m", "cells"])
    assert nothing.exit_code == 2
    named = CliRunner().invoke(app, ["train", "--normal", str(tmp_path / "data/abnormal"), "-m", "X"])
    assert named.exit_code == 2
    (tmp_path / "one").mkdir()
    shutil.copy(next((tmp_path / "data/abnormal").iterdir()), tmp_path / "one")
    few = CliRunner().invoke(app, ["train", "--normal", str(tmp_path / "one"), "-m", "x", "-o", str(output)])
    assert few.exit_code == 1


def test_too_few_labelled_frames_are_said_to_be_too_few_and_no_folder_is_asked_for() -> None:
    with pytest.raises(SourceError, match="needs 4 frames that people labelled normal, there are 0; label more"):
        _train(TrainingSet(), "cells", None, {"from_store": True})


def test_anomalib_is_given_images_as_people_see_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / name for name in ("turned.jpg", "deep.png", "plain.png")]
    Image.new("RGB", (6, 4)).save(paths[0], exif=exif)
    Image.new("I;16", (6, 4), 0x8000).save(paths[1])
    Image.new("L", (6, 4)).save(paths[2])
    _link(tmp_path / "images", paths)
    turned, deep, plain = sorted((tmp_path / "images").iterdir())
    with Image.open(turned) as shown:
        assert shown.size == (4, 6)
    with Image.open(deep) as shown:
        assert (shown.mode, shown.getpixel((0, 0))) == ("L", 128)
    assert plain.is_symlink()


def test_training_by_anomalib_needs_anomalib(tmp_path: Path) -> None:
    if find_spec("anomalib"):
        pytest.skip("Anomalib is installed")
    touch(tmp_path, *(f"normal/{place}.png" for place in range(6)))
    result = CliRunner().invoke(app, ["train", str(tmp_path), "-m", "cells", "--trainer", "anomalib"])
    assert result.exit_code == 1
    assert "vigil-cli[anomalib]" in result.output
