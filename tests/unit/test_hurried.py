"""Commands given in a hurry: the wrong folder, the wrong name, no platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from vigil_cli.local.resources import ResourceFiles
from vigil_cli.local.stack import LocalStack
from vigil_cli.main import app
from vigil_cli.sources import SourceError
from vigil_cli.train import TrainingSet

if TYPE_CHECKING:
    from pathlib import Path

RESOURCE = """
apiVersion: vigil.dev/v1alpha1
kind: AnomalyModel
metadata: {name: cells}
spec: {source: {model: cells, version: "1"}}
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for name in ("good/0.png", "good/1.png", "defect/0.png", "mask/0.png"):
        path = tmp_path / "cells" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "cells"


def test_a_folder_of_both_kinds_is_not_taken_for_one_of_normal_images(dataset: Path) -> None:
    with pytest.raises(SourceError, match="defect"):
        TrainingSet.of_folders(dataset, None, None)
    with pytest.raises(SourceError, match="good"):
        TrainingSet.of_folders(None, dataset, None)
    assert len(TrainingSet.of_folders(dataset / "good", dataset / "defect", None).normal) == 2


def test_what_is_asked_for_where_no_platform_runs_says_so(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(RESOURCE)
    answer = CliRunner().invoke(app, ["local", "apply", "-f", str(file), "--folder", str(tmp_path)])
    assert (answer.exit_code, "no platform runs in" in answer.stderr) == (0, True)


async def test_a_platform_that_runs_is_known_by_its_lock(tmp_path: Path) -> None:
    files = ResourceFiles(tmp_path)
    assert not files.looked_after()
    stack = LocalStack(tmp_path)
    stack._keep_alone()
    assert files.looked_after()
    await stack.close()
    assert not files.looked_after()


def test_a_file_that_is_no_utf8_gets_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_bytes(f"# f\xfcr Halle 3\n{RESOURCE}".encode("latin-1"))
    answer = CliRunner().invoke(app, ["local", "apply", "-f", str(file), "--folder", str(tmp_path)])
    assert answer.exit_code == 1
    assert "is not UTF-8" in answer.stderr
