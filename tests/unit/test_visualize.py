"""What is drawn is what the map and mask say, at the image's size."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from vigil.types.v1 import types_pb2
from vigil_inference import convert, visualize
from vigil_inference.pipeline import Judged

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vigil_common.pixels import Pixels

GREY = np.full((40, 60), 100, dtype=np.uint8)
MASK = np.zeros((20, 30), dtype=np.bool_)
MASK[5:15, 10:20] = True
MAP = np.where(MASK, 0.9, 0.1).astype(np.float32)


def is_outline(picture: Pixels) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.all(picture == visualize.OUTLINE, axis=2)
    return found


def test_the_outline_runs_inside_the_scaled_mask_and_leaves_the_rest_alone() -> None:
    drawn = visualize.simple(GREY, MASK)
    assert drawn.shape == (40, 60, 3)
    line = is_outline(drawn)
    expected = np.zeros((40, 60), dtype=bool)
    expected[10:30, 20:40] = True
    expected[12:28, 22:38] = False
    assert np.array_equal(line, expected)
    assert (drawn[~line] == 100).all()


def test_nothing_is_outlined_where_nothing_is_anomalous() -> None:
    assert not is_outline(visualize.simple(GREY, np.zeros_like(MASK))).any()


def test_a_mask_that_fills_the_image_is_outlined_at_the_border() -> None:
    line = is_outline(visualize.simple(GREY, np.ones_like(MASK)))
    assert line[0].all()
    assert line[:, -1].all()
    assert not line[2:-2, 2:-2].any()


def test_the_given_pixels_are_not_drawn_on() -> None:
    colour = np.repeat(GREY[..., None], 3, axis=2)
    visualize.simple(colour, MASK)
    visualize.full(colour, MAP, MASK, "0.900")
    assert (colour == 100).all()


def test_the_heat_map_is_blue_where_cold_and_red_where_hot() -> None:
    drawn = visualize.full(GREY, MAP, MASK, "0.900").astype(int)
    cold, hot = drawn[35, 5], drawn[20, 30]
    assert drawn.shape == (40, 60, 3)
    assert cold[2] > cold[0]
    assert hot[0] > hot[2]


def test_the_text_is_on_it() -> None:
    canvas = np.full((100, 200), 100, dtype=np.uint8)
    blank, written = (visualize.full(canvas, MAP, MASK, text) for text in ("", "0.900 anomalous"))
    assert (written > 220).all(axis=2).sum() > 20
    assert not (blank > 220).all(axis=2).any()
    assert np.array_equal(written[40:], blank[40:])


def test_the_text_is_no_wider_than_a_narrow_strip() -> None:
    canvas = np.full((3000, 200), 100, dtype=np.uint8)
    blank, written = (visualize.full(canvas, MAP, MASK, text) for text in ("", "0.900 anomalous"))
    assert (written[:40] > 220).all(axis=2).sum() > 20
    assert np.array_equal(written[:, 150:], blank[:, 150:])
    assert np.array_equal(written[40:], blank[40:])


def test_map_and_mask_become_eight_bits_with_clipped_ends() -> None:
    odd = np.array([[-1, 0, 0.5, 1, 2, np.nan]], dtype=np.float32)
    assert visualize.map_pixels(odd).tolist() == [[0, 0, 128, 255, 255, 0]]
    assert visualize.mask_pixels(np.array([[True, False]])).tolist() == [[255, 0]]


@pytest.mark.parametrize("jpeg", [False, True])
def test_pictures_are_encoded_as_asked(jpeg: bool) -> None:  # noqa: FBT001 - a parameter of the test
    image = Image.open(io.BytesIO(visualize.encode(GREY, jpeg=jpeg)))
    assert (image.format, image.mode, image.size) == ("JPEG" if jpeg else "PNG", "L", (60, 40))


def judged(*, with_map: bool, with_mask: bool) -> Judged:
    return Judged(0.9, GREY, MAP if with_map else None, MASK if with_mask else None, 0.001, 0.01)


def drawn_for(found: Judged, **options: object) -> types_pb2.Verdict:
    verdict = types_pb2.Verdict(score=0.9, threshold=0.5, label=types_pb2.LABEL_ANOMALOUS)
    convert.add_pictures(verdict, found, types_pb2.OutputOptions(**options))  # type: ignore[arg-type]
    return verdict


def test_a_verdict_carries_exactly_the_pictures_asked_for() -> None:
    verdict = drawn_for(
        judged(with_map=True, with_mask=True),
        anomaly_map=True,
        visualization=types_pb2.VISUALIZATION_FULL,
        visualization_format=types_pb2.IMAGE_FORMAT_JPEG,
    )
    assert not verdict.HasField("mask")
    assert (verdict.anomaly_map.width, verdict.anomaly_map.height) == (30, 20)
    assert verdict.visualization.format == types_pb2.IMAGE_FORMAT_JPEG
    assert Image.open(io.BytesIO(verdict.visualization.data)).size == (60, 40)


def test_a_model_without_a_mask_gives_its_map_at_the_threshold() -> None:
    verdict = drawn_for(judged(with_map=True, with_mask=False), mask=True)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(verdict.mask.data))) == 255, MASK)


def test_a_model_with_neither_gives_no_pictures() -> None:
    verdict = drawn_for(
        judged(with_map=False, with_mask=False),
        anomaly_map=True,
        mask=True,
        visualization=types_pb2.VISUALIZATION_SIMPLE,
    )
    assert not any(verdict.HasField(name) for name in ("anomaly_map", "mask", "visualization"))
