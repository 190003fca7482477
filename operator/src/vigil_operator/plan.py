"""What to do next, as a pure function of what is asked for, what is remembered, and what is seen.

A plan is small: at most one step from phase to phase, and what makes the world match it. It is made anew after each
that changed something, so an operator that was killed between any two actions goes on where it was. The status comes
before what follows from it. Whatever could not be found out leads to nothing being changed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vigil_common.evidence import Decision, Outcome, decide
from vigil_common.evidence import Gates as EvidenceGates

from vigil_operator.actions import Action, Emit, Plan, WriteStatus
from vigil_operator.conditions import conditions
from vigil_operator.effects import RESYNC_S, effects, numerics_of, wake_after_s, wanted_route
from vigil_operator.observed import (
    Observed,
    Published,
    Request,
    Resource,
    Workload,
    may_be,
    resolve,
    since_s,
    why_unknown,
)
from vigil_operator.phases import BETWEEN_VERSIONS, Event, Phase, after
from vigil_operator.refusals import BY_A_PERSON, TRY_AGAIN, turned_down
from vigil_operator.render import worker_selector
from vigil_operator.spec import LATEST, duration_s
from vigil_operator.status import (
    HISTORY_AT_MOST,
    CandidateStatus,
    Failure,
    GateStatus,
    HistoryEntry,
    PreviousStatus,
    ShadowStatus,
    Status,
    VersionStatus,
)

if TYPE_CHECKING:
    from datetime import datetime

    from vigil_operator.spec import Gates

# Numbers of the comparison are written into the status this often at most.
SHADOW_STATUS_S = 5.0

_LOADING = "its workers load and prove the bundle"
_NOTHING_COMPARED = "no frame compared yet"
_REQUEST_HELP = "write promote, force-promote, abort, rollback or retry, then a digest or -, then an id"
_WITH_SHADOW = frozenset({Phase.SHADOWING, Phase.AWAITING_APPROVAL, Phase.HELD})
_ABOUT_ANOTHER_VERSION = frozenset({Event.CANDIDATE_CHOSEN, Event.FAILED_BEFORE, Event.REFUSED_BEFORE})


def gates_of(gates: Gates) -> EvidenceGates:
    """The spec's gates as the evidence takes them."""
    values = gates.model_dump(exclude={"min_duration"})
    return EvidenceGates(**values, min_duration_s=duration_s(gates.min_duration))


def plan(resource: Resource, status: Status, seen: Observed, now: datetime) -> Plan:
    """What to do next.

    Args:
        resource: What is asked for.
        status: What is remembered.
        seen: The world.
        now: The time.
    """
    draft = _Draft(resource, status, seen, now)
    if seen.taken_by:
        draft.explain(None)
        return Plan(draft.status_action(status), RESYNC_S)
    draft.adopt()
    target = draft.target()
    draft.answer(target)
    draft.step(target)
    draft.follow_threshold(target)
    draft.follow_numerics(target)
    draft.count_workers()
    draft.explain(target)
    actions = effects(resource.spec, draft.status, seen, now)
    wake_s = wake_after_s(draft.status, seen, now, actions)
    return Plan((*draft.status_action(status), *actions, *draft.events), wake_s)


class _Draft:
    """The next status while it is being made, and the events on the way to it."""

    def __init__(self, resource: Resource, status: Status, seen: Observed, now: datetime) -> None:
        self.resource = resource
        self.spec = resource.spec
        self.status = status
        self.seen = seen
        self.now = now
        self.events: list[Emit] = []

    # --- small steps

    def change(self, **fields: Any) -> None:
        self.status = self.status.model_copy(update=fields)

    def go(self, event: Event, reason: str, message: str, *, warning: bool = False, **fields: Any) -> None:
        """Into the phase that follows, and tell people where it or the version is another one."""
        phase = after(self.status.phase, event)
        if phase is not self.status.phase or event in _ABOUT_ANOTHER_VERSION:
            self.events.append(Emit(reason, message, warning))
        self.change(phase=phase, **fields)

    def remember(self, version: VersionStatus, outcome: str, message: str = "") -> None:
        entry = HistoryEntry(
            version=version.version, digest=version.digest, outcome=outcome, message=message, at=self.now
        )
        self.change(history=[entry, *self.status.history][:HISTORY_AT_MOST])

    def failure(self, version: VersionStatus, reason: str, message: str, attempt: str) -> Failure:
        return Failure(
            reason=reason,
            message=message,
            version=version.version,
            digest=version.digest,
            at=self.now,
            attempt=attempt,
        )

    def workers(self, digest: str) -> Workload | None:
        return (self.seen.workloads or {}).get(digest)

    # --- what is live, and what is asked for

    def adopt(self) -> None:
        """A live version that the status does not know stays live: the status was lost, or it was live before us."""
        seen = self.seen.route.live if self.seen.route is not None else None
        if self.status.live is not None or seen is None or self.seen.versions is None:
            return
        if any(found.digest == seen.digest for found in self.seen.versions):
            live = VersionStatus(
                version=seen.version,
                digest=seen.digest,
                threshold=seen.threshold,
                numerics=self.spec.runtime.numerics,
                since=self.now,
            )
            self.change(live=live)
            self.events.append(Emit("Adopted", f"version {seen.version} is live already and stays so"))

    def target(self) -> Published | None:
        """The version asked for; None where it is unknown. Without the registry, what may still be meant."""
        if self.seen.versions is not None:
            return resolve(self.spec.source, self.seen.versions)
        # After a rollback, say, what is live is not the latest; only once it was, it may still be.
        known_as_latest = self.status.phase is Phase.LIVE
        live = self.status.live if known_as_latest or self.spec.source.version != LATEST else None
        for known in (self.status.candidate, live):
            if known is not None and may_be(self.spec.source, known.version, known.digest):
                return Published(known.version, known.digest)
        return None

    def follow_threshold(self, target: Published | None) -> None:
        """A changed threshold is for what runs, unless it came together with another version."""
        asked, live, candidate = self.spec.threshold, self.status.live, self.status.candidate
        if target is None or self.status.phase in BETWEEN_VERSIONS:
            return
        is_target = live is not None and live.digest == target.digest
        is_candidate = candidate is not None and candidate.digest == target.digest
        if not (is_target or is_candidate or turned_down(self.resource, self.status, target)):
            return
        changed = asked != self.status.spec_threshold
        if live is not None and live.threshold != asked and (is_target or changed):
            self.change(live=live.model_copy(update={"threshold": asked}))
            self.events.append(Emit("ThresholdChanged", f"version {live.version} now decides at {_threshold(asked)}"))
        if candidate is not None and candidate.threshold != asked:
            self.change(candidate=candidate.model_copy(update={"threshold": asked}))
        if changed:
            self._compare_anew(f"both versions decide at {_threshold(asked)} by now")
        self.change(spec_threshold=asked)

    def follow_numerics(self, target: Published | None) -> None:
        """Changed numerics are for the live version where that is asked for; with another one they are that one's."""
        asked = self.spec.runtime.numerics
        for name in ("live", "candidate", "previous"):
            version: VersionStatus | None = getattr(self.status, name)
            # As an older operator wrote it.
            if version is not None and version.numerics is None:
                self.change(**{name: version.model_copy(update={"numerics": asked})})
        live = self.status.live
        if live is None or target is None or self.status.phase in BETWEEN_VERSIONS:
            return
        if live.digest == target.digest and live.numerics != asked:
            self.change(live=live.model_copy(update={"numerics": asked}))
            self.events.append(Emit("RuntimeChanged", f"version {live.version} now runs as {asked}"))

    def _compare_anew(self, why: str) -> None:
        """What was counted before says nothing of what is compared now."""
        candidate = self.status.candidate
        if candidate is None or candidate.shadowing_since is None:
            return
        fresh = candidate.model_copy(update={"shadowing_since": self.now, "message": _NOTHING_COMPARED})
        self.change(candidate=fresh, shadow=None)
        if self.status.phase in (Phase.SHADOWING, Phase.AWAITING_APPROVAL):
            self.go(Event.COMPARED_ANEW, "Shadowing", f"version {candidate.version} is compared anew: {why}")

    # --- what people ask for

    def answer(self, target: Published | None) -> None:
        """Deal with a request, once."""
        request = self.resource.request
        if request is None or request.text == self.status.last_request or self.status.phase in BETWEEN_VERSIONS:
            return
        refusal = self._refusal(request, target)
        self.change(last_request=request.text, last_request_refused=refusal)
        if refusal:
            self.events.append(Emit("RequestRefused", f"{request.verb or request.text}: {refusal}", warning=True))

    def _refusal(self, request: Request, target: Published | None) -> str:
        """Do it, or say why not."""
        candidate = self.status.candidate
        if request.verb == "rollback":
            return self._rollback(request)
        if request.verb == "retry" and candidate is None:
            return self._retry(target)
        if candidate is None:
            refused = target is not None and turned_down(self.resource, self.status, target)
            why = f"there is no candidate; {TRY_AGAIN}" if refused else "there is no candidate"
            return why if request.verb else _REQUEST_HELP
        wrong = self._untimely(request, candidate)
        if wrong:
            return wrong
        if request.verb == "abort":
            message = f"a person turned version {candidate.version} down"
            self.go(Event.ABORTED, "Aborted", message, candidate=None, shadow=None)
            self.change(last_failure=self.failure(candidate, "Aborted", message, BY_A_PERSON))
            self.remember(candidate, "Aborted", message)
        elif request.verb == "retry":
            fresh = candidate.model_copy(update={"shadowing_since": self.now, "message": ""})
            self.go(Event.RETRIED, "Retried", f"version {candidate.version} gets more time", candidate=fresh)
        else:
            return self._promotion(request, candidate)
        return ""

    def _untimely(self, request: Request, candidate: CandidateStatus) -> str:
        """Why it can't be done now; empty where it can."""
        if not request.verb:
            return _REQUEST_HELP
        if request.digest not in ("-", candidate.digest):
            return f"it was meant for {request.digest}, and the candidate is version {candidate.version} by now"
        if self.status.phase is Phase.SUSPENDED:
            return "the rollout is suspended; resume it first"
        if request.verb != "abort" and self.status.phase not in _WITH_SHADOW:
            return f"version {candidate.version} is still being verified"
        return ""

    def _promotion(self, request: Request, candidate: CandidateStatus) -> str:
        if self._unready(candidate):
            return f"version {candidate.version} has no worker that is ready"
        if request.verb == "force-promote":
            self.promote(Event.FORCED, candidate, "a person promoted it though the gates had not passed")
            return ""
        shadow = self.status.shadow
        if shadow is None or shadow.outcome != Outcome.PASS.value:
            return "its gates have not passed, see `vigil report`; with --force it is promoted all the same"
        if self.status.phase is Phase.SHADOWING:
            return "its gates pass, and it is promoted by itself"
        self.promote(Event.APPROVED, candidate, "a person approved it")
        return ""

    def _rollback(self, request: Request) -> str:
        live, previous = self.status.live, self.status.previous
        if live is None or previous is None:
            return "there is no version to go back to"
        if request.digest not in ("-", live.digest):
            return f"it was meant for {request.digest}, and live is version {live.version} by now"
        self._withdraw("a rollback came between")
        message = f"from version {live.version} back to {previous.version}"
        self.go(
            Event.ROLLBACK_ASKED,
            "RollingBack",
            message,
            warning=True,
            previous=previous.model_copy(update={"since": self.now}),
        )
        return ""

    def _retry(self, target: Published | None) -> str:
        failure = turned_down(self.resource, self.status, target) if target is not None else None
        if failure is None:
            return "nothing has failed"
        self.change(last_failure=failure.model_copy(update={"attempt": "retried"}))
        return ""

    # --- the rollout

    def step(self, target: Published | None) -> None:
        """At most one step on."""
        phase = self.status.phase
        if phase is Phase.PROMOTING:
            self._finish(Event.ROUTE_WRITTEN, "Promoted")
        elif phase is Phase.ROLLING_BACK:
            self._roll_back(target)
        elif self.spec.suspend:
            if phase is not Phase.SUSPENDED:
                self.go(Event.SUSPENDED, "Suspended", "spec.suspend is set", suspended_from=phase)
        elif phase is Phase.SUSPENDED:
            self._resume()
        elif not self._choose(target):
            self._proceed()

    def _resume(self) -> None:
        """Back to where it was, with its time limits afresh."""
        candidate, phase = self.status.candidate, self.status.suspended_from or Phase.PENDING
        if candidate is not None:
            since = self.now if candidate.shadowing_since is not None else None
            candidate = candidate.model_copy(update={"since": self.now, "shadowing_since": since})
        self.events.append(Emit("Resumed", f"the rollout goes on: {phase.value}"))
        self.change(phase=phase, suspended_from=None, candidate=candidate)

    def _choose(self, target: Published | None) -> bool:
        """Make the version asked for the candidate, where it is neither that nor live; True where that is all."""
        status = self.status
        registry_away = self.seen.versions is None and target is None
        # While the route can't be read, a version may be live that the status does not know.
        if registry_away or (status.live is None and self.seen.route is None):
            return True
        if target is None:
            self._withdraw("it is no longer asked for")
            if status.phase is not Phase.PENDING:
                self.go(
                    Event.TARGET_LOST,
                    "UnknownVersion",
                    why_unknown(self.spec.source, self.seen.versions or ()),
                    warning=True,
                )
        elif status.live is not None and status.live.digest == target.digest:
            self._settle(target)
        elif status.candidate is not None and status.candidate.digest == target.digest:
            if numerics_of(status.candidate, self.spec) == self.spec.runtime.numerics:
                return False
            self._begin(target)
        elif (failure := turned_down(self.resource, self.status, target)) is not None:
            self._stay(failure)
        else:
            self._begin(target)
        return True

    def _settle(self, target: Published) -> None:
        """What is asked for is live."""
        self._withdraw("the live version is asked for again")
        if self.status.phase is not Phase.LIVE:
            self.go(Event.TARGET_IS_LIVE, "Live", f"version {target.version} is live")
            if self.status.last_failure is not None and self.status.last_failure.digest == target.digest:
                self.change(last_failure=None)

    def _stay(self, failure: Failure) -> None:
        """What is asked for was turned down before, and is not tried again by itself."""
        told = self.status.last_failure == failure and self.status.phase in (Phase.FAILED, Phase.HELD)
        if told and self.status.candidate is None:
            return
        self._withdraw(f"version {failure.version} is asked for")
        event = Event.REFUSED_BEFORE if failure.attempt == BY_A_PERSON else Event.FAILED_BEFORE
        message = f"version {failure.version} was turned down before: {failure.message}; {TRY_AGAIN}"
        self.go(event, failure.reason, message, warning=True, last_failure=failure)

    def _begin(self, target: Published) -> None:
        """A new candidate, in place of another."""
        self._withdraw(f"version {target.version} is asked for", outcome="Replaced")
        candidate = CandidateStatus(
            version=target.version,
            digest=target.digest,
            threshold=self.spec.threshold,
            numerics=self.spec.runtime.numerics,
            since=self.now,
            message=_LOADING,
        )
        self.change(spec_threshold=self.spec.threshold, shadow=None)
        self.go(Event.CANDIDATE_CHOSEN, "Verifying", f"version {target.version} is the candidate", candidate=candidate)

    def _withdraw(self, why: str, outcome: str = "Withdrawn") -> None:
        if self.status.candidate is not None:
            self.remember(self.status.candidate, outcome, why)
            self.change(candidate=None, shadow=None)

    def _proceed(self) -> None:
        candidate, phase = self.status.candidate, self.status.phase
        if candidate is None or self.seen.workloads is None:
            return
        workers = self.workers(candidate.digest)
        final = next((problem for problem in workers.problems if problem.final), None) if workers else None
        if final is not None:
            self.fail(candidate, final.reason, final.message)
        elif phase is Phase.VERIFYING:
            self._verify(candidate, workers)
        elif phase in _WITH_SHADOW:
            self._compare(candidate)

    def _verify(self, candidate: CandidateStatus, workers: Workload | None) -> None:
        for worker in workers.described if workers else ():
            if worker.digest != candidate.digest:
                self.fail(candidate, "DigestMismatch", f"{worker.worker} has loaded {worker.digest}")
                return
            if worker.parity_failed:
                self.fail(candidate, "ParityFailed", f"{worker.parity_failed} parity samples differ on {worker.worker}")
                return
        # While its pods are replaced by such with other numerics, those of before are ready, too.
        wanted = str(numerics_of(candidate, self.spec))
        proven = sum(worker.numerics == wanted for worker in workers.described) if workers else 0
        if workers and workers.ready >= workers.desired and proven >= workers.ready > 0 and self._nothing_compared():
            self._verified(candidate)
            return
        problem = next(iter(workers.problems), None) if workers else None
        message = f"{problem.reason}: {problem.message}" if problem else _LOADING
        overdue = since_s(candidate.since, self.now) > duration_s(self.spec.rollout.verify_timeout)
        # While a part is away that workers need as well, it is not the candidate's fault.
        if overdue and not self.seen.away:
            reason = problem.reason if problem else "VerifyTimeout"
            self.fail(candidate, reason, f"not ready within {self.spec.rollout.verify_timeout}: {message}")
        elif message != candidate.message:
            self.change(candidate=candidate.model_copy(update={"message": message}))

    def _nothing_compared(self) -> bool:
        """Whether the next comparison will be another one than the last, though it may be of the same pair."""
        route = self.seen.route
        return self.status.live is None or (route is not None and route.candidate is None)

    def _verified(self, candidate: CandidateStatus) -> None:
        if self.status.live is None or self.spec.rollout.strategy == "Immediate":
            why = "nothing was live" if self.status.live is None else "the strategy is Immediate"
            self.promote(Event.VERIFIED_ALONE, candidate, why)
            return
        update = {"shadowing_since": self.now, "message": _NOTHING_COMPARED}
        message = f"version {candidate.version} judges the frames of version {self.status.live.version}"
        self.go(Event.VERIFIED, "Shadowing", message, candidate=candidate.model_copy(update=update))

    def _compare(self, candidate: CandidateStatus) -> None:
        phase, rollout = self.status.phase, self.spec.rollout
        if rollout.strategy == "Immediate" and phase is not Phase.HELD and not self._unready(candidate):
            self.promote(Event.VERIFIED_ALONE, candidate, "the strategy is Immediate by now")
            return
        decision = self._decision()
        if decision is not None and decision.overall is Outcome.FAIL:
            self.fail(candidate, "GateFailed", decision.reason)
            return
        passed = decision is not None and decision.overall is Outcome.PASS
        if decision is not None and decision.reason != candidate.message:
            candidate = candidate.model_copy(update={"message": "" if passed else decision.reason})
        if passed and phase is not Phase.HELD and not self._unready(candidate):
            if rollout.approval == "Automatic":
                self.promote(Event.GATES_PASSED, candidate, "its gates passed")
                return
            if phase is Phase.SHADOWING:
                message = f"version {candidate.version} passed its gates; `kubectl vigil promote` makes it live"
                self.go(Event.GATES_PASSED_FOR_APPROVAL, "AwaitingApproval", message)
        since = candidate.shadowing_since or candidate.since
        if self.status.phase is Phase.SHADOWING and since_s(since, self.now) > duration_s(rollout.timeout):
            message = f"the gates were not decided within {rollout.timeout}: {candidate.message}"
            if rollout.on_timeout == "Abort":
                self.fail(candidate, "TimedOut", message)
                return
            self.go(Event.TIMED_OUT, "Held", message, warning=True)
            candidate = candidate.model_copy(update={"message": message})
        if self._worth_writing(candidate):
            self.change(candidate=candidate)

    def _worth_writing(self, candidate: CandidateStatus) -> bool:
        """Messages with numbers in them go with the numbers, not more often."""
        old = self.status.candidate
        quiet = old is not None and old.model_copy(update={"message": candidate.message}) == candidate
        shadow = self.status.shadow
        return not quiet or shadow is None or shadow.at == self.now or not (old and old.message)

    def _decision(self) -> Decision | None:
        """What the gates say of the comparison, which goes into the status."""
        report, seen, wanted = self.seen.report, self.seen.route, wanted_route(self.spec, self.status)
        # Until the route says what is compared, thresholds too, the report is of an earlier comparison.
        if seen is None or wanted is None or (seen.live, seen.candidate) != (wanted.live, wanted.candidate):
            return None
        if report is None or report.run != str(seen.comparison):
            return None
        numbers = report.numbers
        decision = decide(gates_of(self.spec.rollout.gates), numbers, report.compared_s)
        old = self.status.shadow
        shadow = ShadowStatus(
            frames=numbers.frames,
            flips=numbers.flips,
            new_alarms=numbers.new_alarms,
            new_misses=numbers.new_misses,
            candidate_failed=numbers.candidate_failed,
            latency_ratio=None if numbers.latency_ratio is None else round(numbers.latency_ratio, 3),
            outcome=decision.overall.value,
            gates=[GateStatus(gate=g.gate, outcome=g.outcome.value, reason=g.reason) for g in decision.gates],
            at=self.now,
        )
        if old is None or old.outcome != shadow.outcome or since_s(old.at, self.now) >= SHADOW_STATUS_S:
            self.change(shadow=shadow)
        return decision

    def _unready(self, version: VersionStatus) -> bool:
        workers = self.workers(version.digest)
        return workers is None or workers.ready == 0

    def promote(self, event: Event, candidate: CandidateStatus, why: str) -> None:
        """The status names it live; the route follows."""
        old = self.status.live
        previous = None
        if old is not None:
            warm_until = self.now + timedelta(seconds=duration_s(self.spec.rollout.rollback_window))
            previous = PreviousStatus(**_plain(old), warm_until=warm_until)
        live = VersionStatus(**_plain(candidate) | {"since": self.now})
        message = f"version {candidate.version} becomes live: {why}"
        self.go(event, "Promoting", message, live=live, previous=previous, candidate=None, last_failure=None)
        self.remember(live, "Promoted", why)

    def fail(self, candidate: CandidateStatus, reason: str, message: str) -> None:
        """The candidate goes; live is as it was."""
        text = f"version {candidate.version}: {message}"
        failure = self.failure(candidate, reason, message, self.resource.attempt)
        self.go(Event.CANDIDATE_FAILED, reason, text, warning=True, candidate=None, last_failure=failure)
        self.remember(candidate, "Failed", f"{reason}: {message}")

    def _roll_back(self, target: Published | None) -> None:
        """Once the version before has workers, it is live again."""
        live, previous = self.status.live, self.status.previous
        if live is None or previous is None:
            self._finish(Event.ROUTE_WRITTEN, "RolledBack")
            return
        workers = self.workers(previous.digest)
        if workers is not None and workers.ready > 0:
            message = f"a person went back from version {live.version} to {previous.version}"
            failure = self.status.last_failure
            # What is asked for and has failed before must not be tried again because of this.
            if failure is None or target is None or failure.digest != target.digest:
                failure = self.failure(live, "RolledBack", message, BY_A_PERSON)
            self.change(
                live=VersionStatus(**_plain(previous) | {"since": self.now}), previous=None, last_failure=failure
            )
            self.remember(live, "RolledBack", message)
            return
        problem = next((problem for problem in workers.problems if problem.final), None) if workers else None
        overdue = since_s(previous.since, self.now) > duration_s(self.spec.rollout.verify_timeout)
        if problem is not None or (overdue and not self.seen.away):
            why = f"{problem.reason}: {problem.message}" if problem else "its workers did not become ready"
            message = f"version {previous.version} could not be put back: {why}"
            failure = self.failure(previous, "RollbackFailed", message, "")
            self.go(Event.ROLLBACK_IMPOSSIBLE, "RollbackFailed", message, warning=True, last_failure=failure)
            self.remember(previous, "RollbackFailed", message)

    def _finish(self, event: Event, reason: str) -> None:
        """Once the route says what the status says."""
        live, route = self.status.live, self.seen.route
        if live is not None and route is not None and route.live is not None and route.live.digest == live.digest:
            self.go(event, reason, f"version {live.version} is live")

    # --- what follows

    def explain(self, target: Published | None) -> None:
        """Conditions and generation."""
        self.change(observed_generation=self.resource.generation)
        self.change(conditions=conditions(self.resource, self.status, self.seen, target, self.now))

    def count_workers(self) -> None:
        """Bring the numbers of ready workers up to date."""
        if self.seen.workloads is None:
            return
        for name in ("live", "candidate", "previous"):
            version: VersionStatus | None = getattr(self.status, name)
            if version is not None:
                workers = self.workers(version.digest)
                ready = workers.ready if workers else 0
                self.change(**{name: version.model_copy(update={"ready_replicas": ready})})
        live = self.status.live
        workers = self.workers(live.digest) if live else None
        self.change(replicas=max(workers.desired, workers.ready) if workers else 0)
        self.change(selector=worker_selector(self.resource, live.digest if live else None))

    def status_action(self, old: Status) -> tuple[Action, ...]:
        """Write the status where it has changed."""
        return () if self.status.to_json() == old.to_json() else (WriteStatus(self.status),)


def _plain(version: VersionStatus) -> dict[str, Any]:
    return {name: getattr(version, name) for name in VersionStatus.model_fields}


def _threshold(value: float | None) -> str:
    return "the bundle's threshold" if value is None else f"{value:g}"
