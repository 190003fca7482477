"""What every client was promised, and whether the store kept it; no process under test is asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vigil_client import Result
    from vigil_common.store.ports import StoredRecord

# What the clocks of a route's writer and of its readers may be apart, and a frame in a worker's hand at a promotion.
SLACK_S = 20.0


@dataclass(frozen=True, slots=True)
class Promise:
    """What a client sent and what it heard.

    Attributes:
        sha256: Of the image.
        camera: Which one.
        broken: Whether the image can't be decoded.
        sent_s: When.
        answered_s: When.
        result: What it heard.
    """

    sha256: str
    camera: str
    broken: bool
    sent_s: float
    answered_s: float
    result: Result

    @property
    def accepted(self) -> bool:
        """Whether the frame was promised to be kept."""
        error = self.result.error
        return error is None or error.reason == "IMAGE_TRUNCATED"


@dataclass(slots=True)
class Verdict:
    """What the comparison found; ids by what is wrong with them."""

    accepted: int = 0
    stored: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return not (self.lost or self.duplicated or self.wrong)


def compare(
    promises: Mapping[str, Promise], stored: Iterable[StoredRecord], promotions: Sequence[tuple[float, int]]
) -> Verdict:
    """Hold the store against what was promised.

    Args:
        promises: By frame id.
        stored: Every record of the model.
        promotions: When which version became live, in order.
    """
    records = list(stored)
    counts = Counter(record.labels["frame_id"] for record in records)
    by_id = {record.labels["frame_id"]: record for record in records}
    found = Verdict(duplicated=sorted(name for name, count in counts.items() if count > 1))
    for frame_id, promise in promises.items():
        record = by_id.get(frame_id)
        if promise.accepted:
            found.accepted += 1
            found.stored += record is not None
            if record is None:
                found.lost.append(frame_id)
        if record is not None and (what := _wrong(promise, record.labels, promotions)):
            found.wrong[frame_id] = what
    for frame_id in by_id.keys() - promises.keys():
        found.wrong[frame_id] = "nobody sent it"
    return found


def _wrong(promise: Promise, labels: Mapping[str, str], promotions: Sequence[tuple[float, int]]) -> str:
    if labels["sha256"] != promise.sha256 or labels["camera"] != promise.camera:
        return "another image or camera is stored"
    if labels["outcome"] == "failed":
        # Three workers killed with a sound frame in hand give it up; with a reason, and for replay.
        fine = {"IMAGE_TRUNCATED"} if promise.broken else {"MAX_DELIVERIES"}
        return "" if labels["reason"] in fine else f"failed with {labels['reason']}"
    if promise.broken:
        return "a broken image was judged"
    version, told = int(labels["version"]), promise.result.verdict
    if told is not None and (told.version != version or abs(told.score - float(labels["score"])) > 1e-6):
        return f"the client heard version {told.version} score {told.score}, stored is {version} {labels['score']}"
    # Whoever waits for the verdict hears it after it was made; the others' may be made until the end.
    until_s = promise.answered_s if told is not None else float("inf")
    if not any(
        live == version and began_s - SLACK_S <= until_s and ended_s + SLACK_S >= promise.sent_s
        for (began_s, live), ended_s in zip(promotions, [*(at for at, _ in promotions[1:]), float("inf")], strict=True)
    ):
        return f"version {version} was not live"
    return ""
