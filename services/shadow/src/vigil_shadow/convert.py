"""Protobuf in and out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo
from vigil.shadow.v1 import shadow_pb2
from vigil.types.v1 import types_pb2
from vigil_common import evidence
from vigil_common.errors import InvalidInput

from vigil_shadow.domain import Failed, Origin, Pair, Said

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vigil_shadow.report import Report

OUTCOMES = {
    evidence.Outcome.PASS: shadow_pb2.OUTCOME_PASS,
    evidence.Outcome.FAIL: shadow_pb2.OUTCOME_FAIL,
    evidence.Outcome.INCONCLUSIVE: shadow_pb2.OUTCOME_INCONCLUSIVE,
}


def to_us(time: Timestamp) -> int:
    """Microseconds since 1970."""
    return time.seconds * 1_000_000 + time.nanos // 1_000


def from_us(time_us: int) -> Timestamp:
    """A Timestamp of microseconds since 1970."""
    return Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1_000)


def said(outcome: bytes) -> Said | Failed | None:
    """What a serialised Outcome says; a score that is no number is a failure; None where it is none of ours."""
    parsed = types_pb2.Outcome()
    try:
        parsed.ParseFromString(outcome)
    except DecodeError:
        return None
    kind = parsed.WhichOneof("result")
    if kind == "failure":
        info = ErrorInfo()
        found = [str(info.reason) for detail in parsed.failure.details if detail.Unpack(info)]
        return Failed(found[0] if found else "UNKNOWN")
    return said_of(parsed.verdict) if kind == "verdict" else None


def said_of(verdict: types_pb2.Verdict) -> Said | Failed:
    """What a Verdict says."""
    if not (math.isfinite(verdict.score) and math.isfinite(verdict.threshold)):
        return Failed("SCORE_NOT_FINITE")
    inference = verdict.timing.inference
    return Said(
        digest=verdict.model.digest,
        version=verdict.model.version,
        score=verdict.score,
        threshold=verdict.threshold,
        anomalous=verdict.label == types_pb2.LABEL_ANOMALOUS,
        inference_us=max(0, inference.seconds * 1_000_000 + inference.nanos // 1_000),
        map=verdict.anomaly_map.data,
        mask=verdict.mask.data,
    )


def origin(header: bytes) -> Origin:
    """Where a frame came from; an unreadable header says nothing."""
    parsed = types_pb2.FrameHeader()
    try:
        parsed.ParseFromString(header)
    except DecodeError:
        return Origin("", 0)
    return Origin(parsed.camera, to_us(parsed.captured_at) or to_us(parsed.received_at))


def _label(said: Said) -> types_pb2.Label.ValueType:
    return types_pb2.LABEL_ANOMALOUS if said.anomalous else types_pb2.LABEL_NORMAL


def _side(said: Said) -> shadow_pb2.Side:
    side = shadow_pb2.Side(score=said.score, threshold=said.threshold, label=_label(said))
    if said.map:
        side.anomaly_map.format = types_pb2.IMAGE_FORMAT_PNG
        side.anomaly_map.data = said.map
    return side


def disagreement(pair: Pair, severity: float) -> shadow_pb2.Disagreement:
    """A pair with two labels."""
    assert isinstance(pair.live, Said)  # noqa: S101 - only judged pairs disagree
    assert isinstance(pair.candidate, Said)  # noqa: S101
    return shadow_pb2.Disagreement(
        frame_id=pair.frame_id,
        camera=pair.origin.camera,
        captured_at=from_us(pair.origin.captured_at_us),
        live=_side(pair.live),
        candidate=_side(pair.candidate),
        severity=severity,
    )


def comparisons(model: str, pairs: Sequence[Pair]) -> list[bytes]:
    """What storage shall write of judged pairs, serialised."""
    # One message serves for all: who is compared stays the same, and making messages is what costs.
    message = shadow_pb2.Comparison(model=model)
    message.candidate.name = message.live.name = model
    captured_at = message.captured_at
    found = []
    for pair in pairs:
        live, candidate = pair.live, pair.candidate
        assert isinstance(live, Said)  # noqa: S101 - only judged pairs are written
        assert isinstance(candidate, Said)  # noqa: S101
        message.frame_id = pair.frame_id
        message.camera = pair.origin.camera
        captured_at.seconds, captured_at.nanos = divmod(pair.origin.captured_at_us * 1_000, 1_000_000_000)
        message.candidate.version, message.candidate.digest = candidate.version, candidate.digest
        message.live.version, message.live.digest = live.version, live.digest
        message.score = candidate.score
        message.label = _label(candidate)
        message.threshold = candidate.threshold
        message.agree = live.anomalous == candidate.anomalous
        found.append(message.SerializeToString())
    return found


def gates(asked: shadow_pb2.Gates) -> evidence.Gates:
    """What is asked; absent fields have the defaults.

    Raises:
        InvalidInput: GATES_INVALID.
    """
    given: dict[str, float | int] = {
        name: getattr(asked, name)
        for name in (
            *("min_frames", "min_anomalous", "max_flip_fraction", "max_new_false_alarms", "max_new_misses"),
            *("max_latency_ratio", "max_error_fraction"),
        )
        if asked.HasField(name)
    }
    if asked.HasField("min_duration"):
        given["min_duration_s"] = asked.min_duration.seconds + asked.min_duration.nanos / 1e9
    return evidence.Gates(**given)  # type: ignore[arg-type]


def decision(found: evidence.Decision) -> shadow_pb2.Decision:
    """What the gates say."""
    return shadow_pb2.Decision(
        overall=OUTCOMES[found.overall],
        reason=found.reason,
        gates=[
            shadow_pb2.GateResult(
                gate=gate.gate,
                outcome=OUTCOMES[gate.outcome],
                limit=gate.limit,
                value=gate.value,
                low=gate.low,
                high=gate.high,
                reason=gate.reason,
            )
            for gate in found.gates
        ],
    )


def page_start(token: str) -> int:
    """Where a page of disagreements begins.

    Raises:
        InvalidInput: PAGE_TOKEN_INVALID.
    """
    if not token:
        return 0
    if not (token.isascii() and token.isdigit() and len(token) <= 6):  # noqa: PLR2004 - far more than are kept
        raise InvalidInput("PAGE_TOKEN_INVALID", "the page token is not one of ours")
    return int(token)


def report(found: Report, *, active: bool, detail: bool) -> shadow_pb2.Report:
    """A report as the API shows it."""
    counts = found.count
    message = shadow_pb2.Report(
        model=found.model,
        run=found.run,
        live=types_pb2.ModelVersion(name=found.model, version=counts("live_version"), digest=found.text("live_digest")),
        candidate=types_pb2.ModelVersion(
            name=found.model, version=counts("candidate_version"), digest=found.text("candidate_digest")
        ),
        sample_fraction=float(found.text("sample_fraction") or 1),
        started_at=from_us(counts("started_at_ms") * 1_000),
        active=active,
        unpaired=shadow_pb2.Unpaired(
            waiting=counts("waiting"),
            missing=counts("missing"),
            skipped=counts("skipped"),
            unmatched=counts("unmatched"),
            late=counts("late"),
            duplicate=counts("duplicate"),
            foreign=counts("foreign"),
            lost=counts("lost"),
            malformed=counts("malformed"),
        ),
        kendall_tau=found.kendall_tau,
        candidate_threshold=found.threshold("candidate"),
        live_threshold=found.threshold("live"),
    )
    for name in (
        *("frames", "live_anomalous", "candidate_anomalous", "new_alarms", "new_misses"),
        *("candidate_failed", "live_failed", "both_failed"),
    ):
        setattr(message, name, counts(name))
    message.compared_for.FromMilliseconds(counts("compared_ms"))
    _measures(found, message)
    if detail:
        message.flips_by_threshold.extend(
            shadow_pb2.FlipPoint(threshold=threshold, new_alarms=alarms, new_misses=misses)
            for threshold, alarms, misses in found.flips_by_threshold()
        )
        message.joint.extend(
            shadow_pb2.JointCell(live_score=live, candidate_score=candidate, count=count)
            for live, candidate, count in found.joint_scores()
        )
    return message


def _measures(found: Report, message: shadow_pb2.Report) -> None:
    difference, pictures, latency = message.difference, message.pictures, message.latency
    frames = found.count("frames")
    if frames:
        difference.mean = found.count("difference_micro") / frames / 1e6
        difference.mean_absolute = found.count("difference_abs_micro") / frames / 1e6
        difference.max = found.count("difference_max_micro") / 1e6
        # Bins are rounded up, but nothing is over the greatest.
        shares = (found.share("difference", part) for part in (0.5, 0.95))
        difference.p50, difference.p95 = (min(share, difference.max) for share in shares)
    for name, part in (("live_p50", 0.5), ("live_p95", 0.95), ("candidate_p50", 0.5), ("candidate_p95", 0.95)):
        time_us = found.time_us(name.partition("_")[0], part)
        if time_us is not None:
            getattr(latency, name).FromMicroseconds(round(time_us))
    numbers = found.numbers
    if numbers.latency_ratio is not None:
        latency.ratio = numbers.latency_ratio
        latency.ratio_low, latency.ratio_high = numbers.latency_ratio_low, numbers.latency_ratio_high
    pictures.maps, pictures.masks = found.count("maps"), found.count("masks")
    pictures.resized, pictures.unreadable = found.count("pictures_resized"), found.count("pictures_unreadable")
    pictures.map_distance_mean, pictures.map_distance_p95 = found.mean_share("map"), found.share("map", 0.95)
    pictures.mask_iou_mean, pictures.mask_iou_p05 = found.mean_share("iou"), found.share("iou", 0.05)
    reviews = message.reviews
    reviews.candidate_right, reviews.live_right = found.candidate_right, found.live_right
    reviews.p_value = evidence.mcnemar(found.candidate_right, found.live_right)
