"""Comparisons on Redis: verdicts of both sides, the reports, and what goes to storage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vigil_common.streams.ports import ComparedVerdict, ReportPlace, ReportStep
from vigil_common.streams.redis_connection import (
    OWN,
    OWNER,
    STORAGE,
    Connection,
    Script,
    entries_of,
    fields_of,
    prefix,
    raise_errors,
    translated,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Comparisons that wait for storage, and disagreements that a report keeps.
COMPARISONS_AT_MOST = 100_000
DISAGREEMENTS_AT_MOST = 1_000
REPORT_KEPT_S = 30 * 86_400
# What may stand among other words in one argument.
_WORD = re.compile(r"[!-~]{1,128}")
_SHORT = re.compile(rb"[!-~]{1,32}")
REPORT = Script.load("report")


class RedisVerdictSource:
    """Shadow's side of one model."""

    def __init__(self, connection: Connection, model: str, consumer: str) -> None:
        self._connection = connection
        self._consumer = consumer
        self._start = prefix(model)

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease."""
        owned = await self._connection.script(OWN, [f"{self._start}shadow-owner"], [self._consumer, ttl_ms])
        return bool(owned == 1)

    async def read(self, after: str, *, count: int, block_ms: int) -> list[ComparedVerdict]:
        """Verdicts after this place."""
        key = f"{self._start}shadow-verdicts"
        reply = await self._connection.command("XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", key, after)
        found = ((entry_id, fields_of(flat)) for entry_id, flat in entries_of(reply))
        return [
            ComparedVerdict(
                entry_id.decode(),
                int(fields[b"n"]),
                int(fields[b"c"]),
                fields[b"s"] == b"candidate",
                fields[b"f"].decode(),
                fields[b"o"],
                fields[b"h"],
            )
            for entry_id, fields in found
        ]

    async def close(self) -> None:
        """Give the lease back."""
        await self.own(ttl_ms=0)


class RedisReports:
    """Reports of comparisons."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def latest(self, model: str) -> str | None:
        """The run of the comparison under way, or of the last one."""
        run = await self._connection.command("HGET", f"{prefix(model)}routing", "last_comparison")
        return None if run is None else run.decode()

    async def place(self, model: str, run: str) -> ReportPlace:
        """Where to go on."""
        start = prefix(model)
        place, number = await self._connection.command("HMGET", f"{start}{_cursor(run)}", "place", "number")
        flat = await self._connection.command("HGETALL", f"{start}shadow-open:{run}")
        found = {frame.decode(): state for frame, state in fields_of(flat or []).items()}
        return ReportPlace((place or b"0-0").decode(), int(number or 0), found)

    async def commit(self, model: str, run: str, step: ReportStep) -> bool:
        """Add a step, all of it or nothing."""
        start = prefix(model)
        kinds = ("report", "joint", "open", "worst", "details")
        keys = [f"{start}{_cursor(run)}", *(f"{start}shadow-{kind}:{run}" for kind in kinds)]
        keys += [f"{start}comparisons", f"{start}shadow-verdicts"]
        replayed = _cursor(run) != _cursor("")
        arguments: list[Any] = [step.after, step.upto, step.number]
        arguments += [REPORT_KEPT_S, DISAGREEMENTS_AT_MOST, COMPARISONS_AT_MOST, "0" if replayed else "1"]
        short = {name: state for name, state in step.open.items() if _WORD.fullmatch(name) and _SHORT.fullmatch(state)}
        forgotten = [name for name, state in step.open.items() if not state and _WORD.fullmatch(name)]
        arguments += [*map(_words, (step.adds, step.greatest, step.joint)), _words(short), " ".join(forgotten)]
        arguments += [b"".join(step.comparisons), " ".join(str(len(one)) for one in step.comparisons)]
        others = step.open.keys() - short.keys() - set(forgotten)
        arguments.append(len(step.facts))
        for fact in step.facts.items():
            arguments += fact
        arguments.append(len(others))
        for name in others:
            arguments += [name, step.open[name]]
        arguments.append(len(step.disagreements))
        for one in step.disagreements:
            arguments += [one.frame_id, one.severity, one.detail]
        return bool(await self._connection.script(REPORT, keys, arguments) == 1)

    async def begin(self, model: str, run: str, fields: Mapping[str, str]) -> None:
        """Write fields that describe a run; those that are there already stay."""
        key = f"{prefix(model)}shadow-report:{run}"
        commands = [("HSETNX", key, name, value) for name, value in fields.items()]
        with translated():
            raise_errors(await self._connection.commands([*commands, ("EXPIRE", key, REPORT_KEPT_S)]))

    async def fields(self, model: str, run: str) -> dict[str, str]:
        """Counts and what describes the run."""
        flat = await self._connection.command("HGETALL", f"{prefix(model)}shadow-report:{run}")
        return {name.decode(): value.decode() for name, value in fields_of(flat or []).items()}

    async def joint(self, model: str, run: str) -> dict[str, int]:
        """The joint histogram's cells, bit by bit: whole, it would keep the server from its other callers."""
        found: dict[str, int] = {}
        cursor: bytes | int = 0
        while True:
            cursor, flat = await self._connection.command(
                "HSCAN", f"{prefix(model)}shadow-joint:{run}", cursor, "COUNT", 1_000
            )
            found |= {cell.decode(): int(count) for cell, count in fields_of(flat).items()}
            if int(cursor) == 0:
                return found

    async def worst(self, model: str, run: str, *, start: int, count: int) -> list[bytes]:
        """Details of disagreements, worst first."""
        key = f"{prefix(model)}shadow-worst:{run}"
        frames = await self._connection.command("ZREVRANGE", key, start, start + count - 1)
        if not frames:
            return []
        details = await self._connection.command("HMGET", f"{prefix(model)}shadow-details:{run}", *frames)
        return [detail for detail in details if detail is not None]


def _words(pairs: Mapping[str, int] | Mapping[str, bytes]) -> str:
    """Names and values as one argument: each argument costs the client more than the server's work on it."""
    return " ".join(f"{name} {value.decode() if isinstance(value, bytes) else value}" for name, value in pairs.items())


def _cursor(run: str) -> str:
    """Comparisons follow each other on one stream and share its place; each replay has its own."""
    return f"shadow-cursor:{run}" if run.startswith("replay-") else "shadow-cursor"


class RedisComparisonSource:
    """Comparisons on their way to storage."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection
        self._model = model
        self._key = f"{prefix(model)}comparisons"
        self._pending_after = "0"

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[tuple[str, bytes]]:
        """Places and Comparisons, or those that were taken and not finished."""
        after = self._pending_after if pending else ">"
        entries = await self._connection.read_group(
            self._model, "comparisons", STORAGE, OWNER, after=after, count=count, block_ms=block_ms
        )
        if pending:
            self._pending_after = entries[-1][0].decode() if entries else "0"
        return [(entry_id.decode(), fields_of(flat)[b"c"]) for entry_id, flat in entries if flat]

    async def done(self, places: Sequence[str]) -> None:
        """Forget them."""
        if not places:
            return
        await self._connection.command("XACK", self._key, STORAGE, *places)
        await self._connection.command("XDEL", self._key, *places)
