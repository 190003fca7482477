"""What an AnomalyModel asks for: the one source of the resource's schema, defaults and validation.

What a schema can't say are CEL rules, each on the smallest object that it needs, so that the API server's message names
the field. The same types validate the YAML of `vigil local apply`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

GROUP = "vigil.dev"
VERSION = "v1alpha1"
KIND = "AnomalyModel"
PLURAL = "anomalymodels"
LATEST = "latest"
# Names of what is made for the resource begin with its own; a Service's has at most 63 characters.
NAME_PATTERN, NAME_AT_MOST = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", 50

DURATION_PATTERN = r"^([0-9]+(ms|s|m|h))+$"
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules with their messages, for a field's or a model's JSON schema."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def duration_s(text: str) -> float:
    """Seconds of "1h30m", "10m", "250ms"."""
    return sum(int(number) * _UNITS_S[unit] for number, unit in re.findall(r"([0-9]+)(ms|s|m|h)", text))


Duration = Annotated[
    str,
    Field(
        pattern=DURATION_PATTERN,
        max_length=32,
        json_schema_extra=rules(("duration(self) >= duration('0s')", "write a duration such as 90s, 10m or 24h")),
    ),
]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Kubernetes' own types, checked by Kubernetes when the pods are made.
Opaque = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


class Part(BaseModel):
    """Frozen, closed, and camelCase in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Source(Part):
    """Which published version of which model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.version) != has(self.digest)", "give either version or digest"),
        )
    )

    model: Annotated[
        str,
        Field(
            pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$",
            max_length=63,
            description="The model's name, as it was published. It can't be changed: make another resource.",
            json_schema_extra=rules(("self == oldSelf", "source.model can't be changed; make another AnomalyModel")),
        ),
    ]
    version: Annotated[
        str | None,
        Field(
            pattern=r"^(latest|[1-9][0-9]{0,17})$",
            description='A version number in quotes, or "latest": each newer version is rolled out in turn.',
        ),
    ] = None
    digest: Annotated[
        str | None,
        Field(pattern=r"^sha256:[0-9a-f]{64}$", description="The bundle's digest, which pins exactly one version."),
    ] = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.version is None) == (self.digest is None):
            raise ValueError("give either version or digest")
        return self


class Numerics(Part):
    """What a version's scores depend on beside its bundle."""

    engine: Annotated[
        Literal["auto", "onnxruntime", "openvino"],
        Field(description="Which runtime; auto takes what is the fastest here of all that hold their parity."),
    ] = "auto"
    precision: Annotated[
        Literal["f32", "bf16"],
        Field(description="On OpenVINO. bf16 may flip labels: let the shadow comparison tell."),
    ] = "f32"

    def __str__(self) -> str:
        return f"{self.engine}/{self.precision}"


class Runtime(Numerics):
    """How the model is run."""

    threads: Annotated[int, Field(ge=1, le=256, description="Threads of one run.")] = 1
    runs: Annotated[
        int,
        Field(
            ge=0, le=64, description="Runs at a time in a worker; 0: as many as its CPUs allow. A candidate has one."
        ),
    ] = 0
    batch_size: Annotated[
        int, Field(ge=0, le=256, description="Most images of one run; 0: as many as take a few milliseconds.")
    ] = 0

    @property
    def numerics(self) -> Numerics:
        """What scores depend on."""
        return Numerics(engine=self.engine, precision=self.precision)


class Autoscaling(Part):
    """Workers by how far they are behind."""

    model_config = ConfigDict(json_schema_extra=rules(("self.min <= self.max", "min must not be over max")))

    min: Annotated[int, Field(ge=1, le=1000, description="Fewest workers.")] = 1
    max: Annotated[int, Field(ge=1, le=1000, description="Most workers.")] = 4
    target_lag: Annotated[
        int, Field(ge=1, le=1_000_000, description="Frames waiting for each worker that are still fine.")
    ] = 50

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not be over max")
        return self


class SecretReference(Part):
    """A Secret of the same namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253, description="The Secret's name.")]


class Gates(Part):
    """What must be shown before a candidate replaces the live version; each is also inconclusive on too little."""

    min_frames: Annotated[int, Field(ge=1, le=10**9, description="Frames that both versions judged.")] = 200
    min_anomalous: Annotated[int, Field(ge=0, le=10**9, description="Frames among them that live calls anomalous.")] = 5
    min_duration: Annotated[Duration, Field(description="For how long both are compared.")] = "10m"
    max_flip_fraction: Annotated[
        Fraction | None, Field(description="Frames with another label, either way; by its upper confidence bound.")
    ] = 0.02
    max_new_false_alarms: Annotated[
        Fraction | None,
        Field(description="Of the frames that live calls normal, those that the candidate calls anomalous."),
    ] = None
    max_new_misses: Annotated[
        Fraction | None,
        Field(description="Of the frames that live calls anomalous, those that the candidate calls normal."),
    ] = None
    max_latency_ratio: Annotated[
        float | None,
        Field(gt=0, le=1000, description="Candidate's inference time over live's, in the median frame."),
    ] = 1.5
    max_error_fraction: Annotated[Fraction | None, Field(description="Frames that the candidate could not judge.")] = (
        0.001
    )


# The API server tries the rule on the default of the whole, in which nothing has its own default yet.
_DECIDABLE = (
    "!has(self.timeout) || !has(self.gates) || !has(self.gates.minDuration) || "
    "duration(self.timeout) > duration(self.gates.minDuration)"
)
_TIMEOUT_TOO_SHORT = "timeout must be over gates.minDuration, or no gate could pass in time"


class Rollout(Part):
    """How a new version replaces the live one."""

    model_config = ConfigDict(json_schema_extra=rules((_DECIDABLE, _TIMEOUT_TOO_SHORT)))

    strategy: Annotated[
        Literal["Shadow", "Immediate"],
        Field(
            description="Shadow: compare with live on the same frames first, then by the gates. "
            "Immediate: promote as soon as the version is verified."
        ),
    ] = "Shadow"
    sample_fraction: Annotated[
        float, Field(gt=0, le=1, description="Which part of the frames the candidate judges in shadow.")
    ] = 1.0
    gates: Annotated[Gates, Field(description="What the comparison must show.")] = Gates()
    timeout: Annotated[Duration, Field(description="How long the gates may stay inconclusive.")] = "24h"
    on_timeout: Annotated[
        Literal["Hold", "Abort"],
        Field(description="Then: Hold keeps the candidate in shadow until a person decides, Abort drops it."),
    ] = "Hold"
    approval: Annotated[
        Literal["Automatic", "Manual"],
        Field(description="Manual: once the gates pass, `kubectl vigil promote` is waited for."),
    ] = "Automatic"
    verify_timeout: Annotated[
        Duration,
        Field(description="How long the candidate's pods may take to load the bundle and prove its parity samples."),
    ] = "10m"
    rollback_window: Annotated[
        Duration, Field(description="How long the previous version stays warm after a promotion.")
    ] = "1h"

    @model_validator(mode="after")
    def _decidable(self) -> Self:
        if duration_s(self.timeout) <= duration_s(self.gates.min_duration):
            raise ValueError(_TIMEOUT_TOO_SHORT)
        return self


class NormalRetention(Part):
    """Frames that are normal, that nobody reviewed and no candidate disagreed about."""

    keep_fraction: Annotated[
        Fraction | None,
        Field(
            description="Which part of them is stored, by the frame's id; absent: as storage is set. All while a "
            "candidate is compared. Changes need no restart and are for frames that come later."
        ),
    ] = None


class Retention(Part):
    """Which judged frames are stored: the server's quotas are for whole buckets, so a model has none of its own."""

    anomalous: Annotated[
        Literal["forever"], Field(description="Anomalous frames, and those that people reviewed: always all of them.")
    ] = "forever"
    disagreeing: Annotated[
        Literal["forever"], Field(description="Frames of which live and candidate said different things: all of them.")
    ] = "forever"
    normal: Annotated[NormalRetention, Field(description="The other frames.")] = NormalRetention()


class Spec(Part):
    """What is asked for."""

    source: Annotated[Source, Field(description="Which published version of which model.")]
    runtime: Annotated[
        Runtime,
        Field(
            description="How the model is run. Another engine or precision that comes with another version is that "
            "version's, and live keeps its own; by itself it is for the live version, at once and with no comparison."
        ),
    ] = Runtime()
    threshold: Annotated[
        Fraction | None,
        Field(description="Scores from here on are anomalous; absent: the bundle's. Changes need no restart."),
    ] = None
    replicas: Annotated[int, Field(ge=1, le=1000, description="Workers of each version; see autoscaling.")] = 1
    autoscaling: Annotated[
        Autoscaling | None,
        Field(
            description="Workers by the frames that wait (KEDA) or by processor time (no KEDA), for which "
            "resources.requests.cpu must be set, or they stay as they are; replaces replicas."
        ),
    ] = None
    resources: Annotated[Opaque, Field(description="Of a worker, as in a Pod.")] = Field(default_factory=dict)
    node_selector: Annotated[dict[str, str] | None, Field(description="Nodes for the workers, as in a Pod.")] = None
    tolerations: Annotated[list[Opaque] | None, Field(max_length=64, description="As in a Pod.")] = None
    affinity: Annotated[Opaque | None, Field(description="As in a Pod.")] = None
    image_pull_secrets: Annotated[
        list[SecretReference] | None, Field(max_length=16, description="As in a Pod, beside the operator's own.")
    ] = None
    rollout: Annotated[Rollout, Field(description="How a new version replaces the live one.")] = Rollout()
    retention: Annotated[
        Retention,
        Field(
            description="Which judged frames are stored. A quota in bytes is storage's own setting, for the normal "
            "frames of all models."
        ),
    ] = Retention()
    suspend: Annotated[
        bool, Field(description="Leave everything as it is: no new candidate, no promotion. What is live stays up.")
    ] = False
