"""Masks painted in the real GIMP 2, where it is installed; its windows are replaced by a script that paints."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from vigil_cli.review import edit
from vigil_client import ReviewedFrame, StoredFrame
from vigil_common.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (60, 40)
GIMP = shutil.which("gimp")
# Batches and questions go to GIMP as they are; what would open windows runs this script on the file instead.
WRAPPER = """#!/bin/sh
case "$*" in *--version*|*--no-interface*) exec {gimp} "$@";; esac
for file; do :; done
exec {gimp} -i -d -f -b "(let* ((image (car (gimp-file-load 1 \\"$file\\" \\"$file\\")))
  (layer (car (gimp-image-get-layer-by-name image \\"mask\\")))) {script}
  (gimp-xcf-save 1 image (car (gimp-image-get-active-drawable image)) \\"$file\\" \\"$file\\"))" -b "(gimp-quit 0)"
"""
PAINT = """(gimp-image-select-rectangle image 2 30 20 10 5) (gimp-context-set-foreground '(0 0 255))
  (gimp-edit-fill layer 0) (gimp-selection-none image) (plug-in-autocrop-layer 1 image layer)"""


def _is_second() -> bool:
    said = subprocess.run([GIMP, "--version"], capture_output=True, text=True, check=False).stdout if GIMP else ""
    return " version 2." in said


pytestmark = pytest.mark.skipif(not _is_second(), reason="there is no GIMP 2 here")


def _frame() -> ReviewedFrame:
    out = io.BytesIO()
    Image.new("RGB", SIZE, "gray").save(out, "PNG")
    when = datetime(2026, 11, 24, tzinfo=UTC)
    stored = StoredFrame("f1", "cells", "cam1", when, when, "image/png", *SIZE, len(out.getvalue()), {}, None)
    return ReviewedFrame(stored, out.getvalue(), ())


def _grey(box: tuple[int, int, int, int]) -> bytes:
    mask, out = Image.new("L", SIZE), io.BytesIO()
    mask.paste(255, box)
    mask.save(out, "PNG")
    return out.getvalue()


def _gimp_that(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gimp"
    program.write_text(WRAPPER.format(gimp=GIMP, script=script))
    program.chmod(0o755)
    monkeypatch.setenv("GIMP2_DIRECTORY", str(tmp_path / "settings"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


async def test_what_is_painted_in_gimp_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gimp_that(PAINT, tmp_path, monkeypatch)
    painted = await edit("gimp", _frame(), _grey((5, 10, 15, 18)))
    assert painted is not None
    expected = Image.new("L", SIZE)
    for box in ((5, 10, 15, 18), (30, 20, 40, 25)):
        expected.paste(255, box)
    with Image.open(io.BytesIO(painted)) as mask:
        assert mask.tobytes() == expected.tobytes()


async def test_nothing_painted_in_gimp_is_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gimp_that("", tmp_path, monkeypatch)
    assert await edit("gimp", _frame(), None) is None


async def test_a_mask_layer_that_was_removed_in_gimp_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gimp_that("(gimp-image-remove-layer image layer)", tmp_path, monkeypatch)
    with pytest.raises(InvalidInput) as missed:
        await edit("gimp", _frame(), None)
    assert missed.value.reason == "MASK_LAYER_MISSING"
