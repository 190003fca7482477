"""The gates: what passes, what fails, and that too little evidence never passes."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vigil_common.errors import InvalidInput
from vigil_common.evidence import (
    Gates,
    Outcome,
    ReportNumbers,
    binomial_tail,
    decide,
    fraction_high,
    fraction_low,
    mcnemar,
    median_bounds,
    within,
)

PLENTY = ReportNumbers(
    frames=10_000, live_anomalous=500, latency_ratio=1.0, latency_ratio_low=0.99, latency_ratio_high=1.01
)
DAY_S = 86_400.0
counts = st.integers(0, 3000)


@st.composite
def numbers(draw: st.DrawFn) -> ReportNumbers:
    frames = draw(counts)
    anomalous = draw(st.integers(0, frames))
    ratio = draw(st.none() | st.floats(0.1, 10))
    return ReportNumbers(
        frames=frames,
        live_anomalous=anomalous,
        new_alarms=draw(st.integers(0, frames - anomalous)),
        new_misses=draw(st.integers(0, anomalous)),
        candidate_failed=draw(st.integers(0, 50)),
        latency_ratio=ratio,
        latency_ratio_low=(ratio or 1) * 0.9,
        latency_ratio_high=(ratio or 1) * 1.1,
        candidate_right=draw(st.integers(0, 30)),
        live_right=draw(st.integers(0, 30)),
    )


def outcome(gates: Gates, found: ReportNumbers, gate: str) -> Outcome:
    return next(result.outcome for result in decide(gates, found, DAY_S).gates if result.gate == gate)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_fraction_lies_between_its_bounds(case: tuple[int, int]) -> None:
    count, trials = case
    assert 0 <= fraction_low(count, trials) <= count / trials <= fraction_high(count, trials) <= 1


@given(st.integers(0, 50), st.integers(1, 500))
def test_more_trials_of_the_same_kind_bring_the_bound_down(count: int, trials: int) -> None:
    assert fraction_high(count, count + 2 * trials) < fraction_high(count, count + trials)


def tail(count: int, trials: int, fraction: float) -> float:
    terms = (math.comb(trials, k) * fraction**k * (1 - fraction) ** (trials - k) for k in range(count, trials + 1))
    return math.fsum(terms)


def weighed(limit: float, count: int, trials: int) -> float:
    """The likelihood, over that at the limit, as weighted over fractions below; by a sum over many of them."""
    at = np.linspace(0, limit, 100_001)[1:-1]
    logs = count * np.log(at / limit) + (trials - count) * (np.log1p(-at) - np.log1p(-limit))
    at_none = (1 - limit) ** -trials if count == 0 else 0.0
    return float((np.exp(logs).mean() + at_none) / 2)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_at_the_bounds_what_was_found_is_twenty_times_as_likely_below(case: tuple[int, int]) -> None:
    count, trials = case
    high = fraction_high(count, trials)
    assert weighed(high * (1 - 1e-6), count, trials) < 20.02
    assert high == 1.0 or weighed(high, count, trials) > 19.98
    assert fraction_low(trials - count, trials) == 1 - high
    assert (fraction_low(0, 0), fraction_high(0, 0)) == (0.0, 1.0)


@pytest.mark.parametrize("count", [0, 1, 10_000, 500_000])
def test_the_bounds_of_a_million_frames_are_as_exact(count: int) -> None:
    assert weighed(fraction_high(count, 10**6), count, 10**6) == pytest.approx(20, rel=1e-2)


@pytest.mark.parametrize(("limit", "trials"), [(0.001, 20_000), (0.02, 4000), (0.1, 2000), (0.5, 1000), (0.98, 2000)])
def test_a_candidate_at_the_limit_ever_passes_in_at_most_one_of_twenty_cases(limit: float, trials: int) -> None:
    # How likely each count is without having passed before, frame by frame.
    chances, passed, most = np.ones(1), 0.0, -1
    for seen in range(1, trials + 1):
        chances = np.append(chances * (1 - limit), 0.0) + np.append(0.0, chances * limit)
        if most < seen and within(limit, most + 1, seen):
            most += 1
        passed += chances[: most + 1].sum()
        chances[: most + 1] = 0
    assert chances.sum() + passed == pytest.approx(1)
    assert 0.01 < passed <= 0.05


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_tail_is_the_sum_of_its_terms(case: tuple[int, int]) -> None:
    count, trials = case
    assert binomial_tail(count, trials) == sum(math.comb(trials, k) for k in range(count, trials + 1)) / 2**trials


def test_mcnemar_is_exact_and_says_nothing_of_nothing() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(6, 0) == 2 / 64
    assert mcnemar(10, 2) == pytest.approx(0.03857, abs=1e-5)
    assert mcnemar(20_000, 19_000) < 1e-6


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any))
def test_the_median_lies_between_its_bounds(histogram: list[int]) -> None:
    median, low, high = median_bounds(list(accumulate(histogram)))
    values = [index for index, count in enumerate(histogram) for _ in range(count)]
    assert low <= median <= high
    assert median == values[(len(values) - 1) // 2]


@given(st.integers(5, 300))
def test_the_bounds_of_the_median_are_those_of_half_of_the_frames(trials: int) -> None:
    _, low, high = median_bounds(list(range(1, trials + 1)))
    assert low == trials - 1 - high
    assert fraction_high(low, trials) <= 0.5 < fraction_high(low + 1, trials)


@given(numbers())
def test_overall_passes_only_where_every_gate_passes(found: ReportNumbers) -> None:
    decision = decide(Gates(max_new_false_alarms=0.05, max_new_misses=0.05), found, DAY_S)
    outcomes = [gate.outcome for gate in decision.gates]
    assert (decision.overall is Outcome.PASS) == all(one is Outcome.PASS for one in outcomes)
    assert (decision.overall is Outcome.FAIL) == any(one is Outcome.FAIL for one in outcomes)
    assert decision.reason


@given(numbers().filter(lambda found: found.frames < 200))
def test_with_too_few_frames_nothing_passes(found: ReportNumbers) -> None:
    assert decide(Gates(), found, DAY_S).overall is not Outcome.PASS


@given(st.integers(0, 10))
def test_ten_lucky_frames_pass_nothing_even_where_ten_are_asked_for(frames: int) -> None:
    gates = Gates(min_frames=0, min_anomalous=0, min_duration_s=0)
    lucky = ReportNumbers(frames, latency_ratio=1.0, latency_ratio_low=1.0, latency_ratio_high=1.0)
    assert decide(gates, lucky, DAY_S).overall is Outcome.INCONCLUSIVE


def test_one_unlucky_frame_fails_nothing() -> None:
    found = ReportNumbers(frames=1, new_alarms=1, candidate_failed=1)
    assert decide(Gates(), found, DAY_S).overall is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("frames", [199, 200, 222])
def test_one_failed_frame_does_not_reject_a_candidate(frames: int) -> None:
    found = ReportNumbers(frames=frames, candidate_failed=1)
    assert outcome(Gates(), found, "maxErrorFraction") is Outcome.INCONCLUSIVE


def test_without_an_error_the_candidate_passes_from_3440_frames_on() -> None:
    for frames, expected in ((3439, Outcome.INCONCLUSIVE), (3440, Outcome.PASS)):
        assert outcome(Gates(), ReportNumbers(frames=frames), "maxErrorFraction") is expected


@pytest.mark.parametrize(
    ("gate", "found", "waits_for"),
    [
        ("maxNewMisses", ReportNumbers(frames=200, live_anomalous=4, new_misses=4), "minAnomalous"),
        ("maxNewMisses", ReportNumbers(frames=199, live_anomalous=9, new_misses=9), "minFrames"),
        ("maxNewFalseAlarms", ReportNumbers(200, 190, new_alarms=10), "minFrames that live calls normal"),
        ("maxFlipFraction", ReportNumbers(frames=1, candidate_failed=300, new_alarms=1), "minFrames"),
    ],
)
def test_a_fraction_waits_for_frames_of_its_own_kind(gate: str, found: ReportNumbers, waits_for: str) -> None:
    gates = Gates(max_new_false_alarms=0.02, max_new_misses=0.02)
    said = next(result for result in decide(gates, found, DAY_S).gates if result.gate == gate)
    assert said.outcome is Outcome.INCONCLUSIVE
    assert said.reason.endswith(f"; not decided before {waits_for}")


def test_good_evidence_passes() -> None:
    decision = decide(Gates(), PLENTY, DAY_S)
    assert decision.overall is Outcome.PASS
    assert [gate.gate for gate in decision.gates] == [
        *("minFrames", "minAnomalous", "minDuration", "maxFlipFraction", "maxErrorFraction", "maxLatencyRatio")
    ]


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        ("maxFlipFraction", ReportNumbers(frames=1000, new_alarms=50)),
        ("maxNewFalseAlarms", ReportNumbers(frames=1000, live_anomalous=500, new_alarms=50)),
        ("maxNewMisses", ReportNumbers(frames=1000, live_anomalous=100, new_misses=20)),
        ("maxErrorFraction", ReportNumbers(frames=0, candidate_failed=300)),
        ("maxLatencyRatio", ReportNumbers(300, latency_ratio=2.0, latency_ratio_low=1.9, latency_ratio_high=2.1)),
        ("people", ReportNumbers(frames=1000, candidate_right=2, live_right=12)),
    ],
)
def test_each_gate_fails_by_evidence_against_it(gate: str, found: ReportNumbers) -> None:
    gates = Gates(max_new_false_alarms=0.05, max_new_misses=0.05)
    assert outcome(gates, found, gate) is Outcome.FAIL
    assert outcome(gates, PLENTY, gate) is Outcome.PASS if gate != "people" else True
    assert decide(gates, found, DAY_S).overall is Outcome.FAIL


def test_the_bound_decides_and_not_the_fraction_alone() -> None:
    within = ReportNumbers(frames=300, new_alarms=4)  # 1.3 %, but up to 2.9 %
    beyond = ReportNumbers(frames=300, new_alarms=8)  # 2.7 %, but down to 1.5 %
    assert outcome(Gates(), within, "maxFlipFraction") is Outcome.INCONCLUSIVE
    assert outcome(Gates(), beyond, "maxFlipFraction") is Outcome.INCONCLUSIVE


def test_a_latency_that_was_not_measured_holds() -> None:
    assert outcome(Gates(), ReportNumbers(frames=1000), "maxLatencyRatio") is Outcome.INCONCLUSIVE


def test_people_who_find_live_right_a_little_more_often_hold_it() -> None:
    assert outcome(Gates(), ReportNumbers(candidate_right=2, live_right=3), "people") is Outcome.INCONCLUSIVE
    assert outcome(Gates(), ReportNumbers(candidate_right=3, live_right=3), "people") is Outcome.PASS


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_frames": -1},
        {"min_duration_s": math.nan},
        {"max_flip_fraction": 2.0},
        {"max_error_fraction": math.nan},
        {"max_latency_ratio": 0.0},
    ],
)
def test_gates_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput) as error:
        Gates(**wrong)  # type: ignore[arg-type]
    assert error.value.reason == "GATES_INVALID"


@pytest.mark.parametrize("frames", [199, 200])
def test_a_gate_that_waits_for_frames_says_so(frames: int) -> None:
    found = ReportNumbers(frames=frames, latency_ratio=0.75, latency_ratio_low=0.63, latency_ratio_high=1.0)
    said = {gate.gate: gate.reason for gate in decide(Gates(min_frames=200), found, DAY_S).gates}
    for gate in ("maxLatencyRatio", "maxFlipFraction"):
        assert said[gate].endswith("not decided before minFrames") == (frames < 200)
