"""Whether a candidate may replace the live version: a pure function of what was counted and what was asked.

Every gate passes, fails, or is inconclusive. A fraction passes once its upper bound is within the limit, and fails once
its lower bound is over it: with the default gates ten lucky frames pass nothing, and one unlucky frame fails nothing.
A rollout looks again with each frame, so the bounds hold at all times: a candidate at the limit is ever within it, were
it looked at without end, in one of twenty cases at most, and likewise ever over it. (Bounds of one look, such as
Clopper-Pearson's, are wrong far more often where any of many looks decides.) They are exact, since one or two frames
decide a limit of 0.1 %. No fraction is judged before it is one of `min_frames` frames, or of `min_anomalous` that live
calls anomalous: the first that come may be all of one kind. Overall it is a pass only where every gate passes; too
little evidence is never a pass.

The bounds invert a test by likelihood ratio (Robbins 1970, "Statistical methods related to the law of the iterated
logarithm"; Ville's inequality says how often it ever reaches `EVIDENCE`).
"""

from __future__ import annotations

import bisect
import enum
import math
from dataclasses import dataclass

from vigil_common.errors import InvalidInput

CONFIDENCE = 0.95
# How many times as likely what was found must be, as weighted over better candidates, as of one at the limit.
EVIDENCE = 1 / (1 - CONFIDENCE)
_PRECISION = 1e-7


class Outcome(enum.Enum):
    """What a gate says."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Gates:
    """What is asked of a candidate; None asks nothing. The names in YAML are the same in camelCase.

    Attributes:
        min_frames: Frames compared; `max_new_false_alarms` waits for as many that live calls normal.
        min_anomalous: Frames among them that live calls anomalous; `max_new_misses` waits for them.
        min_duration_s: For how long.
        max_flip_fraction: Frames with another label, either way.
        max_new_false_alarms: Fraction of the frames live calls normal that the candidate calls anomalous.
        max_new_misses: Fraction of the frames live calls anomalous that the candidate calls normal.
        max_latency_ratio: Candidate's inference time over live's, in the median frame.
        max_error_fraction: Frames that the candidate could not judge though live could.

    Raises:
        InvalidInput: GATES_INVALID.
    """

    min_frames: int = 200
    min_anomalous: int = 5
    min_duration_s: float = 600.0
    max_flip_fraction: float | None = 0.02
    max_new_false_alarms: float | None = None
    max_new_misses: float | None = None
    max_latency_ratio: float | None = 1.5
    max_error_fraction: float | None = 0.001

    def __post_init__(self) -> None:
        for name in ("min_frames", "min_anomalous", "min_duration_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidInput("GATES_INVALID", f"{name} is {value}; it must be a number of 0 or more")
        for name in ("max_flip_fraction", "max_new_false_alarms", "max_new_misses", "max_error_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvalidInput("GATES_INVALID", f"{name} is {value}; it must be a fraction between 0 and 1")
        ratio = self.max_latency_ratio
        if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
            raise InvalidInput("GATES_INVALID", f"max_latency_ratio is {ratio}; it must be a number over 0")


@dataclass(frozen=True, slots=True)
class ReportNumbers:
    """What the gates look at.

    Attributes:
        frames: Frames that both versions judged.
        live_anomalous: Of these, those that live calls anomalous.
        new_alarms: Normal for live, anomalous for the candidate.
        new_misses: Anomalous for live, normal for the candidate.
        candidate_failed: Frames that live judged and the candidate could not.
        latency_ratio: Candidate's inference time over live's in the median frame; None where it was not measured.
        latency_ratio_low: One-sided lower bound of that median at `CONFIDENCE`.
        latency_ratio_high: The upper one.
        candidate_right: Disagreements in which people said the candidate is right.
        live_right: Disagreements in which people said live is right.
    """

    frames: int = 0
    live_anomalous: int = 0
    new_alarms: int = 0
    new_misses: int = 0
    candidate_failed: int = 0
    latency_ratio: float | None = None
    latency_ratio_low: float = 0.0
    latency_ratio_high: float = math.inf
    candidate_right: int = 0
    live_right: int = 0

    @property
    def flips(self) -> int:
        """Frames with another label, either way."""
        return self.new_alarms + self.new_misses


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate with the numbers that decided it.

    Attributes:
        gate: Its name in YAML, such as "maxFlipFraction"; "people" for the reviewed disagreements.
        outcome: What it says.
        limit: What was asked.
        value: What was found.
        low: One-sided lower bound at `CONFIDENCE`, where there is one.
        high: The upper one.
        reason: The same as a sentence.
    """

    gate: str
    outcome: Outcome
    limit: float
    value: float
    low: float | None
    high: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """All gates, and what follows from them together."""

    overall: Outcome
    gates: tuple[GateResult, ...]

    @property
    def reason(self) -> str:
        """The sentences of the gates that decided it."""
        if self.overall is Outcome.PASS:
            return "every gate passes"
        return "; ".join(gate.reason for gate in self.gates if gate.outcome is self.overall)


def fraction_low(count: int, trials: int) -> float:
    """One-sided lower bound of a fraction at `CONFIDENCE`, however often one looks; 0 where nothing was tried."""
    return 1.0 - fraction_high(trials - count, trials)


def fraction_high(count: int, trials: int) -> float:
    """One-sided upper bound of a fraction at `CONFIDENCE`, however often one looks; 1 where nothing was tried."""
    low, high = count / trials if trials else 1.0, 1.0
    while high - low > high * _PRECISION:
        middle = (low + high) / 2
        if within(middle, count, trials):
            high = middle
        else:
            low = middle
    return high


def within(limit: float, count: int, trials: int) -> bool:
    """Whether `count` of `trials` show that their fraction is under a limit between 0 and 1.

    Half of the weight is on a fraction of 0, which most candidates have where a limit is small; the other half is
    spread evenly from there to the limit. Over that half, the ratio of likelihoods is a binomial tail from `count` + 1
    of `trials` + 1 on over its first term, by `count` + 1.
    """
    need = 2 * EVIDENCE
    if count == 0:
        need -= math.exp(min(-trials * math.log1p(-limit), math.log(need)))
    need *= count + 1
    odds = limit / (1 - limit)
    total = term = 1.0
    for found in range(count + 1, trials + 1):
        term *= odds * (trials + 1 - found) / (found + 1)
        total += term
        # From the peak on, each term is smaller than the one before by more and more.
        if total >= need or term <= total * 1e-17:
            break
    return total >= need


def binomial_tail(count: int, trials: int) -> float:
    """Probability of at least `count` heads in `trials` throws of a fair coin, exactly."""
    if count <= 0:
        return 1.0
    ways = total = math.comb(trials, count)
    for heads in range(count, trials):
        ways = ways * (trials - heads) // (heads + 1)
        total += ways
    # int / int is rounded once, however large both are.
    return total / (1 << trials)


def mcnemar(candidate_right: int, live_right: int) -> float:
    """Two-sided p-value of the exact McNemar test: how likely such a lopsided count is if both are equally good."""
    trials = candidate_right + live_right
    return min(1.0, 2 * binomial_tail(max(candidate_right, live_right), trials))


def median_bounds(cumulative: list[int]) -> tuple[int, int, int]:
    """Bins of the median and of its one-sided lower and upper bounds, from a histogram's running totals.

    The bounds are order statistics, exact whatever the distribution and however often one looks; of fewer than five
    values, the least and greatest.
    """
    total = cumulative[-1]
    # So few values below it show that less than half of all are.
    rank = max(1, bisect.bisect(range(total // 2), x=False, key=lambda below: not within(0.5, below, total)))

    def bin_of(rank: int) -> int:
        return next(index for index, count in enumerate(cumulative) if count >= rank)

    return bin_of((total + 1) // 2), bin_of(rank), bin_of(total + 1 - rank)


def decide(gates: Gates, numbers: ReportNumbers, elapsed_s: float) -> Decision:
    """What the evidence says of a candidate.

    Args:
        gates: What is asked.
        numbers: What was counted.
        elapsed_s: For how long versions have been compared.
    """
    n, tried = numbers, numbers.frames + numbers.candidate_failed
    results = [
        _at_least("minFrames", n.frames, max(1, gates.min_frames), "frames compared"),
        _at_least("minAnomalous", n.live_anomalous, gates.min_anomalous, "frames that live calls anomalous"),
        _at_least("minDuration", elapsed_s, gates.min_duration_s, "seconds of comparison"),
    ]
    normal = n.frames - n.live_anomalous
    few = "minFrames" if n.frames < gates.min_frames else ""
    few_tried = "minFrames" if tried < gates.min_frames else ""
    few_normal = "minFrames that live calls normal" if normal < gates.min_frames else ""
    few_anomalous = few or ("minAnomalous" if n.live_anomalous < gates.min_anomalous else "")
    fractions = (
        ("maxFlipFraction", gates.max_flip_fraction, n.flips, n.frames, "frames changed their label", few),
        (
            "maxNewFalseAlarms",
            gates.max_new_false_alarms,
            n.new_alarms,
            normal,
            "frames that live calls normal became anomalous",
            few_normal,
        ),
        (
            "maxNewMisses",
            gates.max_new_misses,
            n.new_misses,
            n.live_anomalous,
            "frames that live calls anomalous became normal",
            few_anomalous,
        ),
        (
            "maxErrorFraction",
            gates.max_error_fraction,
            n.candidate_failed,
            tried,
            "frames failed in the candidate",
            few_tried,
        ),
    )
    results += [
        _at_most(name, limit, count, trials, what, waits_for=waits_for)
        for name, limit, count, trials, what, waits_for in fractions
        if limit is not None
    ]
    if gates.max_latency_ratio is not None:
        results.append(_latency(gates.max_latency_ratio, n, waits_for=few))
    if n.candidate_right + n.live_right:
        results.append(_people(n))
    outcomes = {result.outcome for result in results}
    overall = Outcome.PASS
    if Outcome.FAIL in outcomes:
        overall = Outcome.FAIL
    elif Outcome.INCONCLUSIVE in outcomes:
        overall = Outcome.INCONCLUSIVE
    return Decision(overall, tuple(results))


def _at_least(name: str, value: float, limit: float, what: str) -> GateResult:
    outcome = Outcome.PASS if value >= limit else Outcome.INCONCLUSIVE
    return GateResult(name, outcome, limit, value, None, None, f"{value:,.0f} {what}, at least {limit:,.0f} needed")


def _not_before(waits_for: str) -> str:
    return f"; not decided before {waits_for}" if waits_for else ""


def _between(low: float, high: float, limit: float, *, enough: bool) -> Outcome:
    if not enough:
        return Outcome.INCONCLUSIVE
    if high <= limit:
        return Outcome.PASS
    return Outcome.FAIL if low > limit else Outcome.INCONCLUSIVE


def _at_most(name: str, limit: float, count: int, trials: int, what: str, *, waits_for: str) -> GateResult:
    low, high = fraction_low(count, trials), fraction_high(count, trials)
    outcome = _between(low, high, limit, enough=not waits_for and trials > 0)
    bounds = f"between {low:.2%} and {high:.2%}" if trials else "nothing to go by"
    reason = f"{count:,} of {trials:,} {what}: {bounds} at {CONFIDENCE:.0%} a side, at most {limit:.2%} allowed"
    reason += _not_before(waits_for)
    return GateResult(name, outcome, limit, count / trials if trials else 0.0, low, high, reason)


def _latency(limit: float, numbers: ReportNumbers, *, waits_for: str) -> GateResult:
    ratio, low, high = numbers.latency_ratio, numbers.latency_ratio_low, numbers.latency_ratio_high
    if ratio is None:
        reason = f"the latency ratio was not measured, at most {limit:.2f} allowed"
        return GateResult("maxLatencyRatio", Outcome.INCONCLUSIVE, limit, 0.0, None, None, reason)
    outcome = _between(low, high, limit, enough=not waits_for)
    reason = (
        f"the candidate takes {ratio:.2f} times as long, between {low:.2f} and {high:.2f}; at most {limit:.2f} allowed"
    )
    reason += _not_before(waits_for)
    return GateResult("maxLatencyRatio", outcome, limit, ratio, low, high, reason)


def _people(numbers: ReportNumbers) -> GateResult:
    """Live right significantly more often fails; live right more often by what may be chance holds.

    The test is of one look, so that of many some reject a candidate as good as live; none lets a worse one pass.
    """
    candidate, live = numbers.candidate_right, numbers.live_right
    p = mcnemar(candidate, live)
    limit = 1 - CONFIDENCE
    outcome = Outcome.PASS
    if live > candidate:
        outcome = Outcome.FAIL if p <= limit else Outcome.INCONCLUSIVE
    reason = (
        f"people found the candidate right in {candidate:,} of {candidate + live:,} reviewed disagreements "
        f"(exact McNemar p = {p:.3g})"
    )
    return GateResult("people", outcome, limit, p, None, None, reason)
