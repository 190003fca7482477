"""The operator's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from vigil_operator.phases import Phase

RECONCILE_SECONDS = Histogram(
    "vigil_operator_step_seconds", "One look at a resource and what followed", buckets=(0.001, 0.01, 0.1, 0.5, 1, 5, 30)
)
TRANSITIONS = Counter("vigil_operator_transitions_total", "Rollouts by the phase that they came to", ["phase"])
# From the start on, for an alert on growth to see the first.
for _phase in Phase:
    TRANSITIONS.labels(_phase.value)
RESOURCES = Gauge("vigil_operator_resources", "AnomalyModels that are looked after")
APPLIED = Counter("vigil_operator_applied_total", "Kubernetes objects written", ["kind"])
