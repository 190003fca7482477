"""Pairing, the tally and the report: every verdict is counted once, for what it is, in whatever order it comes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vigil.shadow.v1 import shadow_pb2
from vigil.types.v1 import types_pb2
from vigil_common.evidence import Gates, Outcome, decide
from vigil_common.streams.ports import ReportPlace, ReportStep
from vigil_shadow import convert, scale
from vigil_shadow.domain import Compared
from vigil_shadow.pairing import Pairing
from vigil_shadow.report import Report

from tests.support.shadow import CANDIDATE, COUNTS, LIVE, MODEL, Answer, expected, numbered, png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vigil_common.streams.ports import ComparedVerdict

COMPARED = Compared(MODEL, LIVE, CANDIDATE)
scores = st.none() | st.floats(0, 1, width=32)


class Kept:
    """What a report store would have kept of some steps."""

    def __init__(self, window: int = 1000) -> None:
        self.window = window
        self.fields: dict[str, str] = {}
        self.joint: Counter[str] = Counter()
        self.open: dict[str, bytes] = {}
        self.place, self.number = "0-0", 0
        self.steps: list[ReportStep] = []

    def restart(self) -> Pairing:
        place = ReportPlace(self.place, self.number, self.open)
        return Pairing(COMPARED, place, last_ms=int(self.fields.get("last_ms", 0)), window=self.window)

    def take(self, step: ReportStep) -> None:
        assert step.after == self.place
        self.steps.append(step)
        self.place, self.number = step.upto, step.number
        for name, value in step.adds.items():
            self.fields[name] = str(int(self.fields.get(name, 0)) + value)
        for name, value in step.greatest.items():
            self.fields[name] = str(max(value, int(self.fields.get(name, -1))))
        self.fields |= step.facts
        self.joint.update(step.joint)
        self.open = {name: state for name, state in {**self.open, **step.open}.items() if state}

    def counts(self) -> dict[str, int]:
        return {name: int(value) for name, value in self.fields.items() if name in COUNTS and int(value)}

    def report(self) -> Report:
        return Report(MODEL, "1", self.fields, self.joint)


def compare(answers: Sequence[Answer], *, window: int = 1000, gap_ms: int = 10) -> Kept:
    kept = Kept(window)
    kept.take(kept.restart().step(numbered(answers, gap_ms=gap_ms)))
    return kept


def by_live(name: str, score: float | None) -> Answer:
    return Answer(name, candidate=False, score=score)


def by_candidate(name: str, score: float | None, *, threshold: float = 0.5) -> Answer:
    return Answer(name, candidate=True, score=score, threshold=threshold)


def pair(name: str, live: float | None, candidate: float | None) -> list[Answer]:
    return [by_live(name, live), by_candidate(name, candidate)]


def of(*pairs: tuple[float | None, float | None]) -> list[Answer]:
    return [answer for index, both in enumerate(pairs) for answer in pair(f"f{index}", *both)]


@given(
    st.lists(st.tuples(scores, scores), max_size=40).flatmap(
        lambda pairs: st.tuples(
            st.permutations(of(*pairs)), st.integers(0, 5), st.lists(st.integers(1, 30), max_size=20)
        )
    )
)
@settings(deadline=None)
def test_whatever_the_order_and_wherever_it_dies_the_report_is_the_one_worked_out_offline(
    case: tuple[list[Answer], int, list[int]],
) -> None:
    answers, missing, cuts = case
    answers = answers[missing:]
    whole, broken = compare(answers), Kept()
    verdicts = numbered(answers)
    for cut in [*cuts, len(verdicts)]:
        part, verdicts = verdicts[:cut], verdicts[cut:]
        if part:
            died = broken.restart()
            died.step(part)  # and nothing of it was kept
            broken.take(broken.restart().step(part))
    if not answers:
        return
    assert whole.counts() == expected(answers)
    kept = [{name: value for name, value in one.fields.items() if value != "0"} for one in (whole, broken)]
    assert kept[0] == kept[1]
    assert (broken.joint, broken.open) == (whole.joint, whole.open)


def test_a_frame_that_never_gets_its_second_verdict_is_given_up_after_the_window() -> None:
    alone = [by_live("lonely-live", 0.1), by_candidate("lonely-candidate", 0.1)]
    kept = compare([*alone, *of(*[(0.1, 0.1)] * 10)], window=10)
    assert (kept.counts()["missing"], kept.counts()["unmatched"]) == (1, 1)
    assert "waiting" not in kept.counts()


def test_a_verdict_that_comes_after_its_frame_was_given_up_is_late_and_makes_no_pair() -> None:
    filler = of(*[(0.1, 0.1)] * 6)
    kept = compare([by_live("slow", 0.1), *filler, by_candidate("slow", 0.9)], window=10)
    assert (kept.counts()["missing"], kept.counts()["late"], kept.counts()["frames"]) == (1, 1, 6)


def test_one_that_comes_hours_later_is_forgotten_and_given_up_in_its_turn() -> None:
    filler = of(*[(0.1, 0.1)] * 40)
    kept = compare([by_live("old", 0.1), *filler[:40], by_candidate("old", 0.9), *filler[40:]], window=10)
    assert (kept.counts()["missing"], kept.counts()["unmatched"], kept.counts()["frames"]) == (1, 1, 40)


def test_a_verdict_twice_counts_once() -> None:
    kept = compare([*pair("f", 0.1, 0.9), by_candidate("f", 0.9), by_live("f", 0.1)])
    assert (kept.counts()["frames"], kept.counts()["duplicate"]) == (1, 2)
    waiting = compare([by_live("f", 0.1), by_live("f", 0.2), by_candidate("f", 0.9)])
    assert (waiting.counts()["frames"], waiting.counts()["duplicate"], waiting.counts()["new_alarms"]) == (1, 1, 1)


def test_verdicts_of_other_versions_are_foreign_on_both_sides_and_compared_with_nobody() -> None:
    old = replace(by_live("f", 0.1), digest="sha256:old")
    assert compare([old, by_candidate("f", 0.9)]).counts() == {"foreign": 2}
    assert compare([by_candidate("f", 0.9), old]).counts() == {"foreign": 1}
    replaced = replace(by_candidate("g", 0.9), digest="sha256:third")
    assert compare([replaced]).counts() == {"foreign": 1}


def test_a_score_that_is_no_number_is_the_candidate_s_failure() -> None:
    kept = compare(of((0.1, math.nan), (0.1, math.inf), (math.nan, 0.1), (0.2, 0.2)))
    assert (kept.counts()["candidate_failed"], kept.counts()["live_failed"], kept.counts()["frames"]) == (2, 1, 1)


def test_scores_of_any_size_keep_every_count_within_what_redis_holds() -> None:
    kept = compare(of((-3e38, 3e38), (3e38, -3e38), (1e-38, 1.0)))
    assert all(
        abs(int(value)) < 2**53 for name, value in kept.fields.items() if name != "last_ms" and "used" not in name
    )
    assert kept.counts()["frames"] == 3
    assert kept.report().kendall_tau is not None


def test_verdicts_that_can_not_be_read_are_counted_and_harm_no_other() -> None:
    verdicts = numbered(of((0.1, 0.1), (0.2, 0.2)))
    verdicts[1] = replace(verdicts[1], outcome=b"\xff\xff")
    kept = Kept()
    kept.take(kept.restart().step(verdicts))
    assert kept.counts()["malformed"] == kept.counts()["frames"] == kept.counts()["waiting"] == 1


def test_verdicts_that_fell_off_are_counted_by_the_gap_they_leave() -> None:
    kept, verdicts = Kept(), numbered(of((0.1, 0.1), (0.2, 0.2)), start=1)
    kept.take(kept.restart().step(verdicts[:1]))
    kept.take(kept.restart().step(verdicts[3:]))
    assert kept.counts()["lost"] == 2


@pytest.mark.parametrize("jump_ms", [10**12, -(10**6)])
def test_a_clock_that_jumps_expires_nothing_and_is_no_evidence_of_time(jump_ms: int) -> None:
    verdicts = numbered([by_live("f0", 0.1), *of((0.1, 0.1))[2:], by_candidate("f0", 0.1)], gap_ms=10**7)
    moved = [verdicts[0], replace(verdicts[1], entry_id=f"{10**7 + jump_ms}-0")]
    kept = Kept(window=10)
    kept.take(kept.restart().step(moved))
    assert kept.counts()["frames"] == 1
    assert 0 <= kept.report().elapsed_s <= 60


def test_time_counts_while_verdicts_come_and_a_pause_as_a_minute() -> None:
    assert compare(of(*[(0.1, 0.1)] * 50), gap_ms=1000).report().elapsed_s == 99
    assert compare(of((0.1, 0.1)), gap_ms=3_600_000).report().elapsed_s == 60


def test_what_is_open_stays_bounded_though_the_candidate_never_answers() -> None:
    kept = compare([by_live(f"f{index}", 0.1) for index in range(500)], window=20)
    assert kept.counts() == {"missing": 480, "waiting": 20}
    assert len(kept.open) == 40


def test_maps_of_other_sizes_are_brought_to_live_s_and_rubbish_is_counted() -> None:
    live, candidate = (replace(answer, side=side) for answer, side in zip(pair("f", 0.2, 0.8), (32, 48), strict=True))
    kept = compare([live, candidate])
    report = kept.report()
    assert (report.count("maps"), report.count("pictures_resized")) == (1, 2)
    assert report.mean_share("map") == pytest.approx(0.6, abs=0.01)
    assert (report.count("masks"), report.mean_share("iou")) == (1, 0.0)
    verdicts = numbered([live, candidate])
    broken = shadow_outcome(verdicts[1], b"\x89PNG\r\n\x1a\nrubbish")
    large = shadow_outcome(verdicts[1], png(np.zeros((300, 300), dtype=np.uint8)))
    for outcome in (broken, large):
        found = Kept()
        found.take(found.restart().step([verdicts[0], replace(verdicts[1], outcome=outcome)]))
        assert (found.report().count("pictures_unreadable"), found.report().count("frames")) == (1, 1)


def shadow_outcome(verdict: ComparedVerdict, picture: bytes) -> bytes:
    outcome = types_pb2.Outcome.FromString(verdict.outcome)
    outcome.verdict.anomaly_map.data = picture
    return outcome.SerializeToString()


def test_equal_masks_overlap_wholly_and_two_empty_ones_say_nothing() -> None:
    equal = compare([replace(answer, side=16) for answer in pair("f", 0.9, 0.9)]).report()
    assert (equal.mean_share("iou"), equal.share("map", 0.95)) == (1.0, 0.0)
    empty = compare([replace(answer, side=16) for answer in pair("f", 0.1, 0.1)]).report()
    assert (empty.count("maps"), empty.count("masks")) == (1, 0)


def test_each_judged_pair_goes_on_to_storage_and_disagreements_are_kept_with_both_sides() -> None:
    kept = compare(of((0.1, 0.9), (0.1, 0.2), (None, 0.9)))
    (step,) = kept.steps
    first, second = (shadow_pb2.Comparison.FromString(one) for one in step.comparisons)
    assert (first.frame_id, first.agree, first.candidate.digest, first.camera) == ("f0", False, CANDIDATE, "line-1")
    assert (second.agree, second.live.digest, second.captured_at.seconds) == (True, LIVE, 1_700_000_000)
    (found,) = step.disagreements
    detail = shadow_pb2.Disagreement.FromString(found.detail)
    assert (detail.frame_id, round(detail.live.score, 3), round(detail.candidate.score, 3)) == ("f0", 0.1, 0.9)
    assert found.severity == pytest.approx(detail.severity)


@given(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3), st.booleans())
def test_a_cell_is_on_its_label_s_side_and_the_inverse_finds_the_score(
    score: float,
    threshold: float,
    anomalous: bool,  # noqa: FBT001
) -> None:
    cell = scale.cell_of(score, threshold, anomalous=anomalous)
    assert 0 <= cell < scale.CELLS
    assert (cell >= scale.HALF) == anomalous
    place = scale.position(score, threshold)
    if 0.01 < place < 0.99:
        assert scale.score_at(place, threshold) == pytest.approx(score, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_kendall_s_tau_is_that_of_every_pair_looked_at(cells: list[tuple[int, int]]) -> None:
    joint = Counter(f"{live * 50}:{candidate * 50}" for live, candidate in cells)
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for index, a in enumerate(cells) for b in cells[index + 1 :]]
    scope = sum(bool(first) for first, _ in signs) * sum(bool(second) for _, second in signs)
    found = Report(MODEL, "1", {}, joint).kendall_tau
    if scope == 0:
        assert found is None
    else:
        assert found == pytest.approx(sum(first * second for first, second in signs) / math.sqrt(scope))


def test_two_score_scales_compare_by_rank() -> None:
    answers = [
        answer
        for index in range(20)
        for answer in (
            by_live(f"f{index}", index / 20),
            by_candidate(f"f{index}", 30.0 * index, threshold=300.0),
        )
    ]
    kept = compare(answers)
    assert kept.report().kendall_tau == pytest.approx(1.0)
    assert "new_alarms" not in kept.counts()
    opposite = compare(of(*[(index / 20, 1 - index / 20) for index in range(20)]))
    assert opposite.report().kendall_tau == pytest.approx(-1.0)


def test_differences_of_scores_past_one_are_told_apart() -> None:
    kept = compare(of(*[(10.0, 12.0 + index) for index in range(100)]))
    difference = convert.report(kept.report(), active=True, detail=False).difference
    assert 51 <= difference.p50 <= 51 * 1.023
    assert 96 <= difference.p95 <= 96 * 1.023
    assert (difference.max, difference.mean) == (101, 51.5)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=60))
@settings(deadline=None)
def test_at_the_threshold_there_is_the_curve_says_the_flips_there_are(pairs: list[tuple[float, float]]) -> None:
    kept = compare(of(*pairs))
    report = kept.report()
    curve = list(report.flips_by_threshold())
    here = [(alarms, misses) for threshold, alarms, misses in curve if threshold == pytest.approx(0.5)]
    assert here == [(report.count("new_alarms"), report.count("new_misses"))]
    assert [alarms for _, alarms, _ in curve] == sorted((alarms for _, alarms, _ in curve), reverse=True)
    assert [misses for *_, misses in curve] == sorted(misses for *_, misses in curve)


def test_the_report_gives_the_gates_their_numbers() -> None:
    fast = [replace(answer, inference_us=10_000) for answer in of(*[(0.1, 0.1)] * 300, *[(0.9, 0.9)] * 10)]
    slow = [replace(answer, inference_us=30_000) if answer.candidate else answer for answer in fast]
    gates = Gates(min_duration_s=1, max_error_fraction=0.02)
    good, bad = (compare(answers).report() for answers in (fast, slow))
    assert decide(gates, good.numbers, good.elapsed_s).overall is Outcome.PASS
    assert good.numbers.latency_ratio == pytest.approx(1.0, rel=0.03)
    decision = decide(gates, bad.numbers, bad.elapsed_s)
    assert decision.overall is Outcome.FAIL
    assert "3.0" in decision.reason


@given(st.floats(1.0, 1e9))
def test_bins_of_times_and_ratios_are_near_what_they_hold(value: float) -> None:
    assert scale.time_of(scale.time_bin(round(value))) == pytest.approx(round(value), rel=0.05)
    ratio = min(value, 250) / 50
    assert ratio <= scale.ratio_of(scale.ratio_bin(ratio)) * (1 + 1e-9) <= ratio * 1.03
