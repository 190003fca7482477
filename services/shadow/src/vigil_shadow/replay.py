"""A candidate against what live said of stored frames: a page at a time, into a report of its own.

A page is counted in one step with the place of the next, so a replay that broke off goes on with the page it was in,
and no frame is counted twice. Live is not touched: frames come from storage, and the candidate is asked directly.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vigil_common.errors import Conflict, InvalidInput, NotFound, Unavailable
from vigil_common.streams.ports import Disagreed, ReportStep

from vigil_shadow import convert
from vigil_shadow.domain import Pair, Said
from vigil_shadow.ports import StoredRange
from vigil_shadow.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vigil_common.streams.ports import ReportStore

    from vigil_shadow.domain import Failed
    from vigil_shadow.ports import Archive, Judge, StoredFrame

ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
PAGE = 32
TRIES = 5
BACKOFF_S = 0.2
DEFAULT_RATE = 10.0
MAX_RATE = 1_000.0
FIRST, LAST = "0-0", "end"


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What to replay.

    Attributes:
        model: The model's name.
        replay_id: Names the replay and its report.
        worker: HOST:PORT of the candidate's worker.
        version: Which version it must have.
        where: Of which frames; `stop_us` 0 for all there are now.
        rate: Frames a second; 0 for `DEFAULT_RATE`.

    Raises:
        InvalidInput: REPLAY_ID_INVALID, RATE_INVALID, RANGE_INVALID, WORKER_MISSING.
    """

    model: str
    replay_id: str
    worker: str
    version: int
    where: StoredRange
    rate: float = 0.0

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.replay_id):
            raise InvalidInput("REPLAY_ID_INVALID", "replay_id must be 1 to 40 lower-case letters, digits and dashes")
        if not 0 <= self.rate <= MAX_RATE:
            raise InvalidInput("RATE_INVALID", f"rate must be between 0 and {MAX_RATE:.0f} frames a second")
        if self.where.stop_us and self.where.stop_us <= self.where.start_us:
            raise InvalidInput("RANGE_INVALID", "stop must be after start")
        if not self.worker:
            raise InvalidInput("WORKER_MISSING", "worker must say where the candidate's worker answers, as HOST:PORT")

    @property
    def run(self) -> str:
        """Its report's run."""
        return f"replay-{self.replay_id}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replay is; `frames` counts earlier calls too."""

    frames: int
    position_us: int
    done: bool


async def replay(
    request: ReplayRequest,
    reports: ReportStore,
    archive: Archive,
    judge: Judge,
    *,
    now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
) -> AsyncIterator[Progress]:
    """Replay, from where it is to its end; says how far it is after each page.

    Raises:
        NotFound: UNKNOWN_VERSION: the worker has another version, or has one by now.
        Conflict: REPLAY_EXISTS: the id stands for another replay. REPLAY_RUNS: another call is at it.
        Unavailable: Storage or the worker are away; the same call goes on later.
    """
    fields = await _begin(request, reports, judge, now_us)
    where = StoredRange(request.where.camera, request.where.start_us, int(fields["stop_us"]))
    place = (await reports.place(request.model, request.run)).place
    done, position_us = int(fields.get("replayed", 0)), int(fields.get("position_us") or 0)
    pace = _Pace(request.rate or DEFAULT_RATE)
    while place != LAST:
        frames, token = await archive.page(request.model, where, size=PAGE, token="" if place == FIRST else place)
        tally = Tally()
        for frame in frames:
            await pace.wait()
            image = await archive.image(request.model, frame)
            if image is None:
                tally.adds["dropped"] += 1
                continue
            said = await _judged(judge, frame, image)
            if isinstance(said, Said) and said.digest != fields["candidate_digest"]:
                raise NotFound(
                    "UNKNOWN_VERSION",
                    f"the worker at {request.worker} now has version {said.version}; name one that has version "
                    f"{request.version}, and the replay goes on",
                )
            tally.add(Pair(frame.frame_id, frame.live, said, frame.origin))
        tally.close()
        done += len(frames)
        position_us = frames[-1].stored_at_us if frames else position_us
        tally.adds["replayed"] += len(frames)
        tally.facts["position_us"] = str(position_us)
        step = ReportStep(
            after=place,
            upto=token or LAST,
            number=0,
            adds=tally.adds,
            greatest=tally.greatest,
            facts=tally.facts,
            joint=tally.joint,
            disagreements=[
                Disagreed(pair.frame_id, severity, convert.disagreement(pair, severity).SerializeToString())
                for pair, severity in tally.disagreements
            ],
        )
        if not await reports.commit(request.model, request.run, step):
            raise Conflict(
                "REPLAY_RUNS", f"another call replays {request.replay_id}; wait for it, or choose another id"
            )
        place = step.upto
        yield Progress(done, position_us, place == LAST)
    if not pace.used:
        yield Progress(done, position_us, done=True)


async def _begin(
    request: ReplayRequest, reports: ReportStore, judge: Judge, now_us: Callable[[], int]
) -> dict[str, str]:
    """Describe the run, or find it as it was described."""
    name, version, digest = await judge.version()
    if (name, version) != (request.model, request.version):
        raise NotFound(
            "UNKNOWN_VERSION",
            f"the worker at {request.worker} has {name} version {version}, not {request.model} version "
            f"{request.version}; name a worker that has it",
        )
    now = now_us()
    described = {
        "candidate_version": str(version),
        "candidate_digest": digest,
        "camera": request.where.camera,
        "start_us": str(request.where.start_us),
        "asked_stop_us": str(request.where.stop_us),
    }
    # What has no end ends at its first call, or it would never be done.
    once = {"stop_us": str(request.where.stop_us or now), "started_at_ms": str(now // 1_000)}
    await reports.begin(request.model, request.run, described | once)
    fields = await reports.fields(request.model, request.run)
    if any(fields.get(key) != value for key, value in described.items()):
        raise Conflict("REPLAY_EXISTS", f"replay {request.replay_id} compares something else; choose another id")
    return fields


async def _judged(judge: Judge, frame: StoredFrame, image: bytes) -> Said | Failed:
    """Ask the worker, patiently: it may be busy for others."""
    for attempt in range(TRIES):
        try:
            return await judge.judge(frame.frame_id, image)
        except Unavailable:
            if attempt == TRIES - 1:
                raise
            await asyncio.sleep(BACKOFF_S * 2**attempt)
    raise AssertionError  # the last try raises


class _Pace:
    """Spaces frames evenly; time that was lost is not made up for."""

    def __init__(self, rate: float) -> None:
        self._every_s = 1 / rate
        self._due = 0.0
        self.used = False

    async def wait(self) -> None:
        """Until the next frame may go."""
        now = asyncio.get_running_loop().time()
        if self.used and self._due > now:
            await asyncio.sleep(self._due - now)
        self._due = max(now, self._due) + self._every_s
        self.used = True
