"""A comparison's report as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from PIL import Image, ImageOps
from vigil.types.v1 import types_pb2

from vigil_cli.shadow_lines import OUTCOMES, rows, title

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from vigil.shadow.v1 import shadow_pb2

# Disagreements shown as pictures.
PICTURES = 24
_SIDE, _MARGIN = 320, 40
_BINS = 40
_PICTURE_PIXELS = 320
_LIVE, _CANDIDATE = "#2f6fb0", "#c2571a"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left }
.pass { color: #1a7f37 } .fail { color: #c62828 } .inconclusive { color: #9a6700 }
.charts { display: flex; flex-wrap: wrap; gap: 1.5em } figure { margin: 0 } figcaption { font-size: .85em; color: #555 }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.5em }
.pair { display: flex; gap: 4px } .overlay { position: relative; width: 50%; aspect-ratio: 1 }
.overlay img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: fill }
.overlay img + img { opacity: .45 } code { font-size: .8em; overflow-wrap: anywhere }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
"""


def write_html(
    path: Path,
    found: shadow_pb2.GetReportResponse,
    worst: Sequence[shadow_pb2.Disagreement],
    images: Mapping[str, bytes],
) -> None:
    """Write the report.

    Args:
        path: Of the file.
        found: With details.
        worst: Disagreements to show, worst first.
        images: Their images, encoded, by frame id; those that are missing are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found, worst, images), encoding="utf-8")


def render(
    found: shadow_pb2.GetReportResponse,
    worst: Sequence[shadow_pb2.Disagreement],
    images: Mapping[str, bytes],
) -> str:
    """The file's text."""
    report, decision = found.report, found.decision
    overall = OUTCOMES[decision.overall]
    gates = "".join(
        f"<tr><td>{escape(gate.gate)}</td><td class={OUTCOMES[gate.outcome]}>{OUTCOMES[gate.outcome]}</td>"
        f"<td>{escape(gate.reason)}</td></tr>"
        for gate in decision.gates
    )
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows(report))
    charts = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in (
            (_scatter(report), "Scores of each frame: live across, candidate up; lines are the thresholds"),
            (_histogram(report), "Scores: live blue, candidate orange"),
            (_curve(report), "Flips at another threshold of the candidate: new alarms orange, new misses blue"),
        )
    )
    frames = "".join(_frame(one, images[one.frame_id]) for one in worst if one.frame_id in images)
    shown = f"<h2>Worst disagreements</h2><div class=frames>{frames}</div>" if frames else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title(report))}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title(report))}</h1>"
        f"<p><strong class={overall}>{overall}</strong>: {escape(decision.reason)}</p>"
        f"<h2>Gates</h2><table>{gates}</table><h2>Found</h2><table>{lines}</table>"
        f"<h2>Scores</h2><div class=charts>{charts}</div>{shown}</html>\n"
    )


class _Axis:
    """From values to pixels."""

    def __init__(self, values: Iterable[float]) -> None:
        found = list(values) or [0.0, 1.0]
        self.low, self.high = min(found), max(found)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def across(self, value: float) -> float:
        """From left to right."""
        return _MARGIN + (value - self.low) / (self.high - self.low) * _SIDE

    def up(self, value: float) -> float:
        """From bottom to top."""
        return _MARGIN + _SIDE - (value - self.low) / (self.high - self.low) * _SIDE


def _svg(body: str, across: _Axis, up: _Axis) -> str:
    size, bottom = _SIDE + 2 * _MARGIN, _SIDE + _MARGIN
    return (
        f'<svg width={size} height={size} viewBox="0 0 {size} {size}">'
        f'<rect x={_MARGIN} y={_MARGIN} width={_SIDE} height={_SIDE} fill="#fafafa" stroke="#ccc"/>{body}'
        f"<text x={_MARGIN} y={bottom + 16}>{across.low:.3g}</text>"
        f"<text x={bottom} y={bottom + 16} text-anchor=end>{across.high:.3g}</text>"
        f"<text x={_MARGIN - 4} y={bottom} text-anchor=end>{up.low:.3g}</text>"
        f"<text x={_MARGIN - 4} y={_MARGIN + 10} text-anchor=end>{up.high:.3g}</text></svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#999" stroke-dasharray="4 3"/>'


def _scatter(report: shadow_pb2.Report) -> str:
    cells = report.joint
    across = _Axis([*(cell.live_score for cell in cells), report.live_threshold])
    up = _Axis([*(cell.candidate_score for cell in cells), report.candidate_threshold])
    dots = "".join(
        f"<circle cx={across.across(cell.live_score):.1f} cy={up.up(cell.candidate_score):.1f} "
        f"r={min(6.0, 1.5 + cell.count**0.5 / 2):.1f} fill='{_LIVE}' fill-opacity=.5 />"
        for cell in cells
    )
    x, y = across.across(report.live_threshold), up.up(report.candidate_threshold)
    lines = _line(x, _MARGIN, x, _MARGIN + _SIDE) + _line(_MARGIN, y, _MARGIN + _SIDE, y)
    return _svg(lines + dots, across, up)


def _histogram(report: shadow_pb2.Report) -> str:
    sides = {
        _LIVE: [(cell.live_score, cell.count) for cell in report.joint],
        _CANDIDATE: [(cell.candidate_score, cell.count) for cell in report.joint],
    }
    across = _Axis(score for points in sides.values() for score, _ in points)
    width = (across.high - across.low) / _BINS
    counted: dict[str, list[int]] = {}
    for colour, points in sides.items():
        bins = [0] * _BINS
        for score, count in points:
            bins[min(_BINS - 1, int((score - across.low) / width))] += count
        counted[colour] = bins
    up = _Axis([0.0, *(float(count) for bins in counted.values() for count in bins)])
    bars = "".join(
        f"<rect x={across.across(across.low + index * width):.1f} y={up.up(count):.1f} width={_SIDE / _BINS:.1f} "
        f"height={up.up(0) - up.up(count):.1f} fill='{colour}' fill-opacity=.5 />"
        for colour, bins in counted.items()
        for index, count in enumerate(bins)
        if count
    )
    return _svg(bars, across, up)


def _curve(report: shadow_pb2.Report) -> str:
    points = report.flips_by_threshold
    across = _Axis(point.threshold for point in points)
    up = _Axis([0.0, *(float(max(point.new_alarms, point.new_misses)) for point in points)])

    def path(values: Iterable[tuple[float, int]], colour: str) -> str:
        corners = " ".join(f"{across.across(x):.1f},{up.up(y):.1f}" for x, y in values)
        return f"<polyline points='{corners}' fill=none stroke='{colour}' stroke-width=1.5 />"

    x = across.across(report.candidate_threshold)
    here = _line(x, _MARGIN, x, _MARGIN + _SIDE)
    alarms = path(((point.threshold, point.new_alarms) for point in points), _CANDIDATE)
    misses = path(((point.threshold, point.new_misses) for point in points), _LIVE)
    return _svg(here + alarms + misses, across, up)


def _frame(one: shadow_pb2.Disagreement, image: bytes) -> str:
    base = _as_data(_readable(image))
    sides = []
    for name, side in (("live", one.live), ("candidate", one.candidate)):
        label = "anomalous" if side.label == types_pb2.LABEL_ANOMALOUS else "normal"
        heat = f"<img src='{_as_data(_heat(side.anomaly_map.data))}' alt='' />" if side.anomaly_map.data else ""
        sides.append(
            (f"<div class=overlay><img src='{base}' alt='' />{heat}</div>", f"{name} {side.score:.3f} {label}")
        )
    pictures = "".join(picture for picture, _ in sides)
    said = ", ".join(text for _, text in sides)
    return (
        f"<figure><div class=pair>{pictures}</div><figcaption>{escape(said)}<br><code>{escape(one.frame_id)}</code> "
        f"{escape(one.camera)}</figcaption></figure>"
    )


def _readable(image: bytes) -> Image.Image:
    """The image as any browser shows it: camera formats and 16 bits included."""
    with Image.open(io.BytesIO(image)) as opened:
        plain = opened.point(lambda value: value / 256).convert("L") if opened.mode.startswith("I;16") else opened
        picture = ImageOps.exif_transpose(plain.convert("RGB"))
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    return picture


def _heat(anomaly_map: bytes) -> Image.Image:
    with Image.open(io.BytesIO(anomaly_map)) as opened:
        return ImageOps.colorize(opened.convert("L"), black="#14146e", mid="#28be6e", white="#d21e1e")


def _as_data(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
