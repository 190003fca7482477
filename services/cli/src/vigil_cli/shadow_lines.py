"""A report in lines of text, for the terminal and the page alike."""

from __future__ import annotations

from vigil.shadow.v1 import shadow_pb2

OUTCOMES = {
    shadow_pb2.OUTCOME_PASS: "pass",
    shadow_pb2.OUTCOME_FAIL: "fail",
    shadow_pb2.OUTCOME_INCONCLUSIVE: "inconclusive",
}


def rows(found: shadow_pb2.Report) -> list[tuple[str, str]]:
    """The report's lines."""
    unpaired, difference, latency, pictures = found.unpaired, found.difference, found.latency, found.pictures
    lines = [
        ("frames compared", f"{found.frames:,}"),
        ("anomalous: live, candidate", f"{found.live_anomalous:,}, {found.candidate_anomalous:,}"),
        ("flips normal → anomalous", f"{found.new_alarms:,}"),
        ("flips anomalous → normal", f"{found.new_misses:,}"),
        ("failed: candidate, live, both", f"{found.candidate_failed:,}, {found.live_failed:,}, {found.both_failed:,}"),
        ("score difference: mean, p50, p95, max",
         f"{difference.mean:+.3f}, {difference.p50:.3f}, {difference.p95:.3f}, {difference.max:.3f}"),
        ("rank agreement (Kendall tau-b)", f"{found.kendall_tau:.3f}" if found.HasField("kendall_tau") else "-"),
    ]  # fmt: skip
    if latency.HasField("ratio"):
        times = [
            f"{getattr(latency, name).ToTimedelta().total_seconds() * 1000:.1f}"
            for name in ("live_p50", "live_p95", "candidate_p50", "candidate_p95")
        ]
        lines += [
            ("inference p50, p95: live", f"{times[0]}, {times[1]} ms"),
            ("inference p50, p95: candidate", f"{times[2]}, {times[3]} ms"),
            ("latency ratio", f"{latency.ratio:.2f} ({latency.ratio_low:.2f} to {latency.ratio_high:.2f})"),
        ]
    if pictures.maps:
        lines.append(("map distance: mean, p95", f"{pictures.map_distance_mean:.3f}, {pictures.map_distance_p95:.3f}"))
    if pictures.masks:
        lines.append(("mask IoU: mean, p5", f"{pictures.mask_iou_mean:.2f}, {pictures.mask_iou_p05:.2f}"))
    if pictures.resized or pictures.unreadable:
        lines.append(("pictures resized, unreadable", f"{pictures.resized:,}, {pictures.unreadable:,}"))
    reviews = found.reviews
    if reviews.candidate_right + reviews.live_right:
        counts = f"{reviews.candidate_right:,}, {reviews.live_right:,} (p = {reviews.p_value:.3g})"
        lines.append(("people: candidate right, live right", counts))
    for name in ("waiting", "missing", "skipped", "unmatched", "late", "duplicate", "foreign", "lost", "malformed"):
        if count := getattr(unpaired, name):
            lines.append((f"verdicts {name}" if name != "skipped" else "frames skipped", f"{count:,}"))
    return lines


def title(found: shadow_pb2.Report) -> str:
    """Who is compared."""
    live = f"live version {found.live.version}" if found.live.version else "what live said"
    state = "under way" if found.active else "ended"
    if found.run.startswith("replay-"):
        state = "stored frames"
    return f"{found.model}: candidate version {found.candidate.version} beside {live} (run {found.run}, {state})"
