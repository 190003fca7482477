"""Charts as SVG: no script, no library, and no style of their own that the page's policy would refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from vigil_review.domain import Camera

WIDTH, HEIGHT, FOOT = 320, 120, 18


def histogram(camera: Camera) -> Markup:
    """Scores of a camera's frames in the colours of their labels, and the threshold as a line."""
    most = max(map(sum, camera.bins))
    step = WIDTH / len(camera.bins)
    span = camera.high - camera.low
    limit = (camera.threshold - camera.low) / span * WIDTH
    parts = []
    for place, (normal, anomalous) in enumerate(camera.bins):
        top = float(HEIGHT)
        for side, count, label in (("under", normal, "normal"), ("over", anomalous, "anomalous")):
            if count:
                height = max(2.0, count / most * HEIGHT)
                top = max(0.0, top - height)
                parts.append(
                    Markup(
                        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
                    ).format(side, place * step + 1, top, step - 2, height, f"{count} {label} frames")
                )
    if 0 <= limit <= WIDTH:
        parts.append(Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(limit, HEIGHT))
    for anchor, x, value in (("start", 0, camera.low), ("end", WIDTH, camera.high)):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{:.2f}</text>').format(x, HEIGHT + FOOT - 4, anchor, value)
        )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT + FOOT, f"scores of {camera.name}", Markup().join(parts)
    )
