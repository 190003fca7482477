"""An evaluation as JSON, and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vigil_cli.evaluation.run import picture_of

if TYPE_CHECKING:
    from pathlib import Path

    from vigil_cli.evaluation.run import Evaluation

THRESHOLDS = 51
PICTURES = 24
_THUMBNAIL = 480
_BINS = 40
_WIDTH, _HEIGHT = 640, 200
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .here { background: #fff3cd }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1em }
figure { margin: 0 } img { max-width: 100% } figcaption { font-size: .85em; overflow-wrap: anywhere }
"""


def as_dict(found: Evaluation, *, bundle: str, digest: str, engine: str) -> dict[str, Any]:
    """Everything that was measured, plain."""
    best = found.best
    here = found.confusion(found.threshold)
    return {
        "bundle": bundle,
        "digest": digest,
        "engine": engine,
        "images": len(found.judged),
        "anomalous": len(found.scores(anomalous=True)),
        "normal": len(found.scores(anomalous=False)),
        "refused": [{"image": name, "reason": reason} for name, reason in found.refused],
        "threshold": found.threshold,
        "auroc": found.auroc,
        "f1": here.f1 if found.labelled else None,
        "confusion": asdict(here),
        "best_threshold": best[0] if best else None,
        "best_f1": best[1] if best else None,
        "pixel_auroc": found.pixel_auroc,
        "pro": found.pro,
        "median_model_s": found.seconds,
        "curve": [
            {"threshold": round(float(at), 4), **asdict(found.confusion(float(at)))}
            for at in np.linspace(0, 1, THRESHOLDS)
        ],
        "scores": [
            {"image": one.item.name, "score": one.score, "anomalous": one.item.anomalous} for one in found.judged
        ],
    }


def as_html(found: Evaluation, facts: dict[str, Any], pictures: Path | None) -> str:
    """The report; with the pictures of what was judged wrongly, or of the highest scores where nothing was."""
    names = ("images", "anomalous", "normal", "auroc", "f1", "best_f1", "best_threshold", "pixel_auroc", "pro")
    rows = "".join(f"<tr><td>{name}<td>{_number(facts[name])}" for name in names)
    curve = "".join(
        f"<tr{' class=here' if abs(one['threshold'] - found.threshold) < 1 / (THRESHOLDS - 1) / 2 else ''}>"
        + "".join(f"<td>{_number(value)}" for value in one.values())
        for one in facts["curve"][:: 2 if THRESHOLDS > 30 else 1]  # noqa: PLR2004 - a table people can read
    )
    wrong = [one for one in found.judged if one.wrong(found.threshold)]
    wrong.sort(key=lambda one: -abs(one.score - found.threshold))
    shown = wrong or sorted(found.judged, key=lambda one: -one.score)
    heading = f"{len(wrong)} judged wrongly, the worst first" if wrong else "The highest scores"
    figures = ""
    if pictures is not None:
        figures = "".join(
            f'<figure><img src="data:image/jpeg;base64,{_thumbnail(picture_of(pictures, one.item))}">'
            f"<figcaption>{escape(one.item.name)} {one.score:.3f} {_truth(one.item.anomalous)}</figcaption></figure>"
            for one in shown[:PICTURES]
        )
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(facts['bundle'])}</title><style>{_STYLE}</style>"
        f"<h1>{escape(facts['bundle'])} at threshold {found.threshold:.3f}</h1>"
        f"<p>{escape(facts['digest'])} on {escape(facts['engine'])}</p><table>{rows}</table>"
        f"<h2>Scores: normal blue, anomalous orange</h2>{_histogram(found)}"
        f"<h2>{heading}</h2><div class=frames>{figures}</div>"
        "<h2>At other thresholds</h2><table><tr><th>threshold<th>anomalous, called so<th>normal, called anomalous"
        f"<th>normal, called so<th>anomalous, called normal{curve}</table>"
    )


def _truth(anomalous: bool | None) -> str:  # noqa: FBT001 - one of three
    return {None: "", True: "anomalous", False: "normal"}[anomalous]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _thumbnail(path: Path) -> str:
    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.convert("RGB").save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _histogram(found: Evaluation) -> str:
    bars = []
    step = _WIDTH / _BINS
    kinds = [(False, "#2f6fb0"), (True, "#c2571a")]
    counts = {kind: np.histogram(found.scores(anomalous=kind), _BINS, (0, 1))[0] for kind, _ in kinds}
    top = max(1, *(int(count.max()) for count in counts.values()))
    for kind, colour in kinds:
        for place, count in enumerate(counts[kind]):
            if count:
                height = _HEIGHT * int(count) / top
                bars.append(
                    f'<rect x="{place * step:.1f}" y="{_HEIGHT - height:.1f}" width="{step - 1:.1f}" '
                    f'height="{height:.1f}" fill="{colour}" opacity=".6"/>'
                )
    at = found.threshold * _WIDTH
    bars.append(f'<line x1="{at:.1f}" y1="0" x2="{at:.1f}" y2="{_HEIGHT}" stroke="#222"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">{"".join(bars)}</svg>'
