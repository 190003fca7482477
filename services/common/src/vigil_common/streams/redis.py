"""The streams on Redis 7 or Valkey, one node or a cluster.

Keys of a model share the hash tag `{MODEL}`: `frames` and `verdicts` (streams), `unstored` (frames judged and not yet
confirmed by storage, by entry id), `budget` (bytes ever admitted, and those before the head: their difference is what
the queue holds), `frame:ID` (deduplication and where the reply goes), `replies:REPLICA`, `dead`, `routing`, `owner`,
`keep-fraction` (which part of the normal frames is stored, where the model has its own say).

Of a comparison: `shadow-verdicts` (stream, both sides, numbered by `shadow-sequence`), `shadow-owner`, `shadow-cursor`
(how far the report has read), `comparisons` (stream, to storage), and per run `shadow-report:RUN` (counts),
`shadow-joint:RUN` (joint histogram of scores), `shadow-open:RUN` (frames that wait for their pair), `shadow-worst:RUN`
and `shadow-details:RUN` (the worst disagreements).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

import redis.asyncio as aredis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.logging import get_logger
from vigil_common.streams.ports import (
    Admission,
    Admitted,
    Candidate,
    ComparedVerdict,
    Depth,
    Emission,
    Live,
    QueuedAnnotation,
    QueuedFrame,
    QueuedOutcome,
    ReportPlace,
    ReportStep,
    Route,
    check_roles,
    route_changed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vigil_common.config import SecuritySettings

# An entry costs this much more than its image (header, offsets, listpack), by measurement.
ENTRY_OVERHEAD_BYTES = 512
LIVE = "live"
SHADOW = "shadow"
STORAGE = "storage"
# Shadow verdicts that wait for the shadow service; what falls off is counted as lost.
SHADOW_VERDICTS_AT_MOST = 16_384
# Frames that the queue may hold for a candidate that is behind live.
SHADOW_FRAMES_AT_MOST = 1_000
# Comparisons that wait for storage, and disagreements that a report keeps.
COMPARISONS_AT_MOST = 100_000
DISAGREEMENTS_AT_MOST = 1_000
REPORT_KEPT_S = 30 * 86_400
# Storage has one owner at a time, so its consumer has one name and finds its own pending entries again.
OWNER = "owner"
MODELS = "vigil:models"
# What may stand among other words in one argument.
_WORD = re.compile(r"[!-~]{1,128}")
_SHORT = re.compile(rb"[!-~]{1,32}")

log = get_logger()


@dataclass(frozen=True, slots=True)
class Script:
    """A script and its digest."""

    source: str
    sha: str

    @classmethod
    def load(cls, name: str) -> Self:
        """Read it from the package."""
        source = (files("vigil_common.streams") / "scripts" / f"{name}.lua").read_text()
        return cls(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


ADMIT, EMIT, EMIT_CANDIDATE, TRIM, ROUTE, UNROUTE, OWN, REPORT = (
    Script.load(name) for name in ("admit", "emit", "emit_candidate", "trim", "route", "unroute", "own", "report")
)
ANNOTATE = Script.load("annotate")


# What a server says that can't serve now: in a failover, while its disk is full, without its replicas.
AWAY = ("READONLY", "UNBLOCKED", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


def away(error: BaseException) -> bool:
    """Whether Redis is away, rather than the command wrong."""
    if isinstance(error, ResponseError):
        # redis-py cuts the code off those that it has a class for.
        return isinstance(error, ReadOnlyError | ClusterDownError | TryAgainError) or str(error).startswith(AWAY)
    if isinstance(error, RuntimeError):
        # uvloop's word for a connection that was reset between two writes; redis-py lets it through.
        return "handler is closed" in str(error)
    return isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)


def unavailable(error: BaseException) -> Unavailable:
    """The same for the caller."""
    return Unavailable("QUEUE_UNAVAILABLE", f"Redis is away ({error}); try again", retry_after_s=1.0)


@contextmanager
def translated() -> Iterator[None]:
    """Turn lost connections, and servers that can't serve now, into `Unavailable`."""
    try:
        yield
    except (RedisError, OSError, RuntimeError) as error:
        if not away(error):
            raise
        raise unavailable(error) from error


def prefix(model: str) -> str:
    """Start of every key of a model."""
    return f"vigil:{{{model}}}:"


class _Connection:
    """Commands and scripts on one node or a cluster; concurrent script calls travel together."""

    def __init__(self, client: aredis.Redis | RedisCluster) -> None:
        self.client: Any = client
        self.clustered = isinstance(client, RedisCluster)
        self._waiting: list[tuple[Script, list[str], list[Any], asyncio.Future[Any]]] = []
        self._flusher: asyncio.Task[None] | None = None
        # Connections that nobody uses at the moment; on one node.
        self._idle: list[Any] = []

    async def command(self, *arguments: Any) -> Any:
        """One command."""
        with translated():
            return await self._execute(*arguments)

    async def _execute(self, *arguments: Any) -> Any:
        if self.clustered:
            return await self.client.execute_command(*arguments)
        (answer,) = await self._converse([arguments])
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    async def _converse(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Commands in one round trip, on a connection that nobody else uses; what the server refuses is an answer.

        redis-py's own way to a connection (pool, locks, its observers) costs as much again as all that is done here.
        """
        line = self._idle.pop() if self._idle else self.client.connection_pool.make_connection()
        answers: list[Any] = []
        try:
            if line.is_connected and line._reader.at_eof():  # noqa: SLF001 - the server has gone; its own look costs a read
                await line.disconnect(nowait=True)
            if not line.is_connected:
                await line.connect()
            await line.send_packed_command(line.pack_commands(commands), check_health=False)
            for _ in commands:
                try:
                    answers.append(await line.read_response())
                except ResponseError as error:
                    answers.append(error)
        except BaseException as error:
            # An answer that still comes would be taken for that of the next command.
            await line.disconnect(nowait=True)
            anonymous = isinstance(line, aredis.SSLConnection) and not line.certfile
            if anonymous and isinstance(error, RedisConnectionError | OSError):
                # The server's own word for it is often overtaken by the end of the connection.
                raise RedisConnectionError(f"{error}; if it wants a client certificate, there is none") from error
            raise
        self._idle.append(line)
        return answers

    async def commands(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Several commands in one round trip; errors come back as values, but that it is away is raised."""
        if self.clustered:
            calls = (self.client.execute_command(*command) for command in commands)
            results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        else:
            results = await self._converse(commands)
        for result in results:
            if isinstance(result, BaseException) and away(result):
                raise unavailable(result)
        return results

    async def script(self, script: Script, keys: list[str], arguments: list[Any]) -> Any:
        """Run a script; loads it where the server does not know it."""
        with translated():
            try:
                return await self._execute("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._execute("EVAL", script.source, len(keys), *keys, *arguments)

    async def batched_script(self, script: Script, keys: list[str], arguments: list[Any]) -> Any:
        """As `script`, but calls made while one is under way share the next round trip (and its fsync)."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((script, keys, arguments, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await future

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:64], self._waiting[64:]
            try:
                with translated():
                    results = await self.commands([("EVALSHA", s.sha, len(k), *k, *a) for s, k, a, _ in batch])
            except Unavailable as error:
                results = [error] * len(batch)
            for (script, keys, arguments, future), result in zip(batch, results, strict=True):
                final = result
                if isinstance(result, NoScriptError):
                    try:
                        final = await self.script(script, keys, arguments)
                    except (Unavailable, RedisError) as error:
                        final = error
                if future.done():
                    continue
                if isinstance(final, BaseException) and away(final):
                    final = unavailable(final)
                if isinstance(final, BaseException):
                    future.set_exception(final)
                else:
                    future.set_result(final)

    async def ensure_groups(self, model: str) -> None:
        """Create the groups that nothing goes on without, from the very beginning of their streams."""
        for stream, group in (("frames", LIVE), ("verdicts", STORAGE), ("comparisons", STORAGE)):
            try:
                await self.command("XGROUP", "CREATE", f"{prefix(model)}{stream}", group, "0", "MKSTREAM")
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def read_group(
        self, model: str, stream: str, group: str, consumer: str, *, after: str, count: int, block_ms: int
    ) -> list[tuple[bytes, list[bytes]]]:
        """XREADGROUP that makes missing groups anew."""
        blocking = ("BLOCK", block_ms) if after == ">" and block_ms > 0 else ()
        key = f"{prefix(model)}{stream}"
        try:
            reply = await self.command(
                "XREADGROUP", "GROUP", group, consumer, "COUNT", count, *blocking, "STREAMS", key, after
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.ensure_groups(model)
            return []
        return _entries(reply)

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            await self._idle.pop().disconnect()
        await self.client.aclose()


def _entries(reply: Any) -> list[tuple[bytes, Any]]:
    """The one stream's entries in a reply that may be None, a list or a dict (RESP3)."""
    if not reply:
        return []
    streams = list(reply.items()) if isinstance(reply, dict) else reply
    entries = streams[0][1]
    if (
        isinstance(reply, dict)
        and entries
        and isinstance(entries[0], list)
        and entries[0]
        and not _is_entry(entries[0])
    ):
        entries = entries[0]
    return [(entry[0], entry[1]) for entry in entries]


def _is_entry(value: Any) -> bool:
    return isinstance(value[0], bytes)


def _fields(flat: Any) -> dict[bytes, bytes]:
    """Fields of an entry: flat list, list of pairs, or already a dict."""
    if isinstance(flat, dict):
        return flat
    return dict(zip(flat[::2], flat[1::2], strict=True))


class RedisStreams:
    """Everything on one Redis.

    Args:
        connection: Where to.
        budget_bytes: Bytes of frames that a model's queue may hold.
        dedup_window_s: For how long after its verdict a frame id is remembered.
    """

    def __init__(self, connection: _Connection, *, budget_bytes: int, dedup_window_s: int) -> None:
        self._connection = connection
        self.queue = RedisFrameQueue(connection, budget_bytes=budget_bytes)
        self.routing = RedisRouting(connection)
        self.reports = RedisReports(connection)
        self.reviews = RedisReviewLog(connection)
        self._dedup_window_s = dedup_window_s

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        security: SecuritySettings | None = None,
        budget_bytes: int = 256 << 20,
        dedup_window_s: int = 300,
    ) -> Self:
        """Open `redis://` or `rediss://` for one node, `redis+cluster://` for a cluster.

        The library's own retries are off: a repeated XADD is a second frame, a repeated XREADGROUP strands entries.
        """
        retry = Retry(NoBackoff(), 0)
        more: dict[str, Any] = {}
        if security is not None and security.redis_password_file is not None:
            more["password"] = security.redis_password_file.read_text().strip()
        if security is not None and security.redis_ca_file is not None:
            more["ssl_ca_certs"] = str(security.redis_ca_file)
        if security is not None and security.tls_cert_file and security.tls_key_file and url.startswith("rediss"):
            # Shown to a server that asks for one.
            more |= {"ssl_certfile": str(security.tls_cert_file), "ssl_keyfile": str(security.tls_key_file)}
        if "+cluster://" in url:
            plain = url.replace("+cluster://", "://", 1)
            cluster = RedisCluster.from_url(
                plain, protocol=2, retry=retry, socket_timeout=5.0, driver_info=None, **more
            )
            # Raw replies, but for what the cluster client itself asks.
            for name in set(cluster.response_callbacks) - {"COMMAND", "CLUSTER SLOTS", "CLUSTER SHARDS"}:
                del cluster.response_callbacks[name]
            return cls(_Connection(cluster), budget_bytes=budget_bytes, dedup_window_s=dedup_window_s)
        client = aredis.Redis.from_url(
            url,
            protocol=2,
            retry=retry,
            socket_timeout=5.0,
            socket_connect_timeout=2.0,
            # A pooled connection may have died with the server; redis-py checks before it is used again.
            health_check_interval=0,
            max_connections=256,
            # Else it says its name at each connection, by a command that Redis 7.0 does not know.
            driver_info=None,
            **more,
        )
        # Raw replies: the callbacks would build objects that nobody reads.
        client.response_callbacks.clear()
        return cls(_Connection(client), budget_bytes=budget_bytes, dedup_window_s=dedup_window_s)

    def source(self, model: str, consumer: str) -> RedisFrameSource:
        """A worker's side of a model."""
        return RedisFrameSource(self._connection, model, consumer, self._dedup_window_s)

    def candidate(self, model: str, consumer: str, digest: str) -> RedisCandidateSource:
        """A worker's side of a model whose candidate it is."""
        return RedisCandidateSource(self._connection, model, consumer, digest)

    def outcomes(self, model: str, consumer: str) -> RedisOutcomeSource:
        """Storage's side of a model."""
        return RedisOutcomeSource(self._connection, model, consumer)

    def comparisons(self, model: str) -> RedisComparisonSource:
        """Storage's side of a model's comparisons."""
        return RedisComparisonSource(self._connection, model)

    def verdicts(self, model: str, consumer: str) -> RedisVerdictSource:
        """Shadow's side of a model."""
        return RedisVerdictSource(self._connection, model, consumer)

    async def ping(self) -> None:
        """Raise `Unavailable` where nobody answers."""
        await self._connection.command("PING")

    async def close(self) -> None:
        """Release connections."""
        await self._connection.close()


class RedisFrameQueue:
    """Ingest's side."""

    def __init__(self, connection: _Connection, *, budget_bytes: int, inflight_ttl_s: int = 86_400) -> None:
        self._connection = connection
        self._budget_bytes = budget_bytes
        self._inflight_ttl_s = inflight_ttl_s
        self._ensured: set[str] = set()

    async def admit(
        self, model: str, *, frame_id: str, sha256: bytes, header: bytes, image: bytes, reply_to: str
    ) -> Admitted:
        """Put a frame into the queue once."""
        if model not in self._ensured:
            await self._connection.ensure_groups(model)
            self._ensured.add(model)
        start = prefix(model)
        try:
            reply = await self._connection.batched_script(
                ADMIT,
                [f"{start}frames", f"{start}budget", f"{start}frame:{frame_id}"],
                [
                    sha256,
                    header,
                    image,
                    reply_to,
                    len(header) + len(image) + ENTRY_OVERHEAD_BYTES,
                    self._budget_bytes,
                    self._inflight_ttl_s,
                ],
            )
        except OutOfMemoryError:
            return Admitted(Admission.FULL)
        except ResponseError as error:
            if "used memory" in str(error):
                return Admitted(Admission.FULL)
            raise
        return Admitted(Admission(reply[0].decode()), reply[1] if len(reply) > 1 else None)

    async def read_replies(self, model: str, reply_to: str, after: str, *, block_ms: int) -> tuple[str, list[bytes]]:
        """Outcomes after this place."""
        key = f"{prefix(model)}replies:{reply_to}"
        reply = await self._connection.command("XREAD", "COUNT", 64, "BLOCK", block_ms, "STREAMS", key, after)
        entries = _entries(reply)
        if not entries:
            return after, []
        return entries[-1][0].decode(), [_fields(fields)[b"o"] for _, fields in entries]

    async def depth(self, model: str) -> Depth:
        """How full it is."""
        start = prefix(model)
        with translated():
            length, budget, unstored, dead, groups = await self._connection.commands(
                [
                    ("XLEN", f"{start}frames"),
                    ("HMGET", f"{start}budget", "total", "head"),
                    ("ZCARD", f"{start}unstored"),
                    ("XLEN", f"{start}dead"),
                    ("XINFO", "GROUPS", f"{start}frames"),
                ]
            )
        unjudged = length
        for group in groups if isinstance(groups, list) else []:
            info = _fields(group)
            if info[b"name"] == LIVE.encode():
                lag = info.get(b"lag")
                unjudged = int(info[b"pending"]) + (length if lag is None else int(lag))
        total, head = (int(float(value or 0)) for value in budget)
        return Depth(frames=length, image_bytes=total - head, unjudged=unjudged, unstored=unstored, dead=dead)

    async def close(self) -> None:
        """Release connections."""
        await self._connection.close()


class RedisFrameSource:
    """A worker's side of one model."""

    group = LIVE

    def __init__(self, connection: _Connection, model: str, consumer: str, dedup_window_s: int) -> None:
        self._connection = connection
        self._model = model
        self._key = f"{prefix(model)}frames"
        self._consumer = consumer
        self._dedup_window_s = dedup_window_s
        self._cursor = "0-0"

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer."""
        entries = await self._connection.read_group(
            self._model, "frames", self.group, self._consumer, after=">", count=count, block_ms=block_ms
        )
        return [_frame(entry_id, fields) for entry_id, fields in entries]

    async def claim(self, *, min_idle_ms: int, count: int) -> list[QueuedFrame]:
        """Frames that another consumer left; goes on where the last call ended."""
        try:
            cursor, entries, *lost = await self._connection.command(
                "XAUTOCLAIM", self._key, self.group, self._consumer, min_idle_ms, self._cursor, "COUNT", count
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._connection.ensure_groups(self._model)
            return []
        self._cursor = cursor.decode()
        if lost and lost[0]:
            log.error("frames_lost", model=self._model, entries=[entry.decode() for entry in lost[0]])
        if not entries:
            return []
        with translated():
            pending = await self._connection.commands(
                [("XPENDING", self._key, self.group, entry_id, entry_id, 1) for entry_id, _ in entries]
            )
        return [
            _frame(entry_id, fields, deliveries=int(found[0][3]))
            for (entry_id, fields), found in zip(entries, pending, strict=True)
            if isinstance(found, list) and found
        ]

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome, reply and acknowledgement in one step."""
        start = prefix(self._model)
        arguments: list[Any] = [start, self._dedup_window_s, SHADOW_VERDICTS_AT_MOST]
        for emission in emissions:
            reply = b"" if emission.reply == emission.outcome else emission.reply
            arguments += [emission.entry_id, emission.frame_id, emission.outcome, reply, emission.dead_reason]
            arguments.append(emission.compared)
        names = ("frames", "verdicts", "unstored", "dead", "shadow-verdicts", "shadow-sequence")
        keys = [f"{start}{name}" for name in names]
        return [won == 1 for won in await self._connection.script(EMIT, keys, arguments)]

    async def close(self) -> None:
        """Nothing of its own to release."""


class RedisCandidateSource(RedisFrameSource):
    """A candidate's side of one model: reads in shadow's group, and emits to shadow alone."""

    group = SHADOW

    def __init__(self, connection: _Connection, model: str, consumer: str, digest: str) -> None:
        super().__init__(connection, model, consumer, 0)
        self._digest = digest

    async def read(self, *, count: int, block_ms: int) -> list[QueuedFrame]:
        """New frames for this consumer; none where the comparison has just ended."""
        try:
            reply = await self._connection.command(
                *("XREADGROUP", "GROUP", SHADOW, self._consumer, "COUNT", count, "BLOCK", max(1, block_ms)),
                *("STREAMS", self._key, ">"),
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            # The route, which made the group, is about to say so; until then this must not spin.
            await asyncio.sleep(block_ms / 1000)
            return []
        return [_frame(entry_id, fields) for entry_id, fields in _entries(reply)]

    async def emit(self, emissions: Sequence[Emission]) -> list[bool]:
        """Outcome for shadow and acknowledgement in one step."""
        start = prefix(self._model)
        arguments: list[Any] = [start, self._digest, SHADOW_VERDICTS_AT_MOST]
        for emission in emissions:
            arguments += [emission.entry_id, emission.frame_id, emission.outcome, emission.header]
        keys = [f"{start}{name}" for name in ("frames", "shadow-verdicts", "shadow-sequence")]
        return [won == 1 for won in await self._connection.script(EMIT_CANDIDATE, keys, arguments)]


def _frame(entry_id: bytes, flat: Any, *, deliveries: int = 1) -> QueuedFrame:
    fields = _fields(flat)
    return QueuedFrame(entry_id.decode(), fields[b"h"], fields[b"i"], deliveries)


class RedisOutcomeSource:
    """Storage's side of one model."""

    def __init__(self, connection: _Connection, model: str, consumer: str) -> None:
        self._connection = connection
        self._model = model
        self._consumer = consumer
        self._start = prefix(model)
        self._pending_after = "0"

    async def own(self, *, ttl_ms: int) -> bool:
        """Take or renew the lease."""
        owned = await self._connection.script(OWN, [f"{self._start}owner"], [self._consumer, ttl_ms])
        return bool(owned == 1)

    async def read(self, *, count: int, block_ms: int, pending: bool = False) -> list[QueuedOutcome]:
        """New outcomes with their frames, or those that were taken and not finished."""
        after = self._pending_after if pending else ">"
        entries = await self._connection.read_group(
            self._model, "verdicts", STORAGE, OWNER, after=after, count=count, block_ms=block_ms
        )
        if pending:
            self._pending_after = entries[-1][0].decode() if entries else "0"
        present = [(entry_id, _fields(flat)) for entry_id, flat in entries if flat]
        if not present:
            return []
        frames_key = f"{self._start}frames"
        with translated():
            frames = await self._connection.commands(
                [("XRANGE", frames_key, fields[b"e"], fields[b"e"]) for _, fields in present]
            )
        return [
            QueuedOutcome(entry_id.decode(), fields[b"v"], _frame(*found[0]) if found else None)
            for (entry_id, fields), found in zip(present, _raise_errors(frames), strict=True)
        ]

    async def done(self, outcomes: Sequence[QueuedOutcome]) -> None:
        """Free their frames, then forget them: a crash between the two repeats this, which does no harm."""
        if not outcomes:
            return
        entries = [outcome.frame.entry_id for outcome in outcomes if outcome.frame]
        if entries:
            await self._connection.command("ZREM", f"{self._start}unstored", *entries)
        await self._connection.command(
            "XACK", f"{self._start}verdicts", STORAGE, *(outcome.entry_id for outcome in outcomes)
        )

    async def trim(self) -> int:
        """Drop what nobody needs any more."""
        keys = [f"{self._start}{name}" for name in ("frames", "verdicts", "unstored", "budget", "routing")]
        return max(0, int(await self._connection.script(TRIM, keys, [self._start, SHADOW_FRAMES_AT_MOST])))

    async def close(self) -> None:
        """Give the lease back."""
        await self.own(ttl_ms=0)


def _raise_errors(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def route_of(model: str, found: Mapping[bytes, bytes]) -> Route | None:
    """The routing record; None where nothing is live.

    Raises:
        Unavailable: ROUTING_UNREADABLE: somebody else wrote into it; who knows an earlier route goes on with that.
    """
    if b"version" not in found:
        return None
    try:
        candidate = None
        if b"candidate_version" in found:
            candidate = Candidate(
                int(found[b"candidate_version"]),
                found[b"candidate_digest"].decode(),
                _threshold(found[b"candidate_threshold"]),
                float(found[b"sample_fraction"]),
            )
        live = Live(int(found[b"version"]), found[b"digest"].decode(), _threshold(found[b"threshold"]))
        managed_by = found.get(b"managed_by", b"").decode()
        return Route(model, live, candidate, int(found[b"generation"]), int(found.get(b"comparison", 0)), managed_by)
    except (KeyError, ValueError, InvalidInput) as error:
        raise Unavailable(
            "ROUTING_UNREADABLE", f"the routing record of {model} is broken ({error}); promote a version again"
        ) from error


def _kept(model: str) -> str:
    return f"{prefix(model)}keep-fraction"


class RedisRouting:
    """Roles of the versions."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    async def get(self, model: str) -> Route | None:
        """The model's route."""
        return route_of(model, _fields(await self._connection.command("HGETALL", f"{prefix(model)}routing") or []))

    async def models(self) -> list[str]:
        """Every model that has a route, or had one and has frames left."""
        return sorted(name.decode() for name in await self._connection.command("SMEMBERS", MODELS))

    async def write(
        self,
        model: str,
        *,
        live: Live,
        candidate: Candidate | None = None,
        after: int | None = None,
        managed_by: str = "",
    ) -> Route:
        """Write the whole record."""
        check_roles(live, candidate)
        await self._connection.command("SADD", MODELS, model)
        await self._connection.ensure_groups(model)
        arguments: list[Any] = [prefix(model), REPORT_KEPT_S, live.version, live.digest, _text(live.threshold)]
        if candidate is None:
            arguments += ["", "", "", ""]
        else:
            fraction = repr(candidate.sample_fraction)
            arguments += [candidate.version, candidate.digest, _text(candidate.threshold), fraction]
        arguments += ["" if after is None else after, managed_by]
        generation, comparison = await self._connection.script(ROUTE, self._keys(model), arguments)
        if not generation:
            raise route_changed(model)
        return Route(model, live, candidate, int(generation), int(comparison), managed_by)

    async def promote(
        self, model: str, *, version: int, digest: str, threshold: float | None, after: int | None = None
    ) -> Route:
        """Make a version live and end any comparison."""
        return await self.write(model, live=Live(version, digest, threshold), after=after)

    async def remove(self, model: str) -> None:
        """Delete the route; storage goes on with what is left."""
        left = await self._connection.script(UNROUTE, self._keys(model), [])
        await self.keep_fraction(model, None)
        if left == 0:
            await self._connection.command("SREM", MODELS, model)

    async def kept_fraction(self, model: str) -> float | None:
        """Which part of the model's normal frames is stored."""
        found = await self._connection.command("GET", _kept(model))
        try:
            return None if found is None else float(found)
        except ValueError as error:
            raise Unavailable("ROUTING_UNREADABLE", f"{_kept(model)} is no number ({error})") from error

    async def keep_fraction(self, model: str, fraction: float | None) -> None:
        """Say which part is stored, or take it back."""
        if fraction is None:
            await self._connection.command("DEL", _kept(model))
        else:
            await self._connection.command("SET", _kept(model), repr(fraction))

    @staticmethod
    def _keys(model: str) -> list[str]:
        start = prefix(model)
        return [f"{start}routing", f"{start}routing-changes", f"{start}frames"]

    async def wait(self, model: str, generation: int, *, block_ms: int) -> Route | None:
        """The route once it has changed, or after the wait."""
        key = f"{prefix(model)}routing-changes"
        await self._connection.command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", key, f"{generation}-0")
        return await self.get(model)


class RedisVerdictSource:
    """Shadow's side of one model."""

    def __init__(self, connection: _Connection, model: str, consumer: str) -> None:
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
        found = ((entry_id, _fields(flat)) for entry_id, flat in _entries(reply))
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

    def __init__(self, connection: _Connection) -> None:
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
        found = {frame.decode(): state for frame, state in _fields(flat or []).items()}
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
            _raise_errors(await self._connection.commands([*commands, ("EXPIRE", key, REPORT_KEPT_S)]))

    async def fields(self, model: str, run: str) -> dict[str, str]:
        """Counts and what describes the run."""
        flat = await self._connection.command("HGETALL", f"{prefix(model)}shadow-report:{run}")
        return {name.decode(): value.decode() for name, value in _fields(flat or []).items()}

    async def joint(self, model: str, run: str) -> dict[str, int]:
        """The joint histogram's cells, bit by bit: whole, it would keep the server from its other callers."""
        found: dict[str, int] = {}
        cursor: bytes | int = 0
        while True:
            cursor, flat = await self._connection.command(
                "HSCAN", f"{prefix(model)}shadow-joint:{run}", cursor, "COUNT", 1_000
            )
            found |= {cell.decode(): int(count) for cell, count in _fields(flat).items()}
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

    def __init__(self, connection: _Connection, model: str) -> None:
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
        return [(entry_id.decode(), _fields(flat)[b"c"]) for entry_id, flat in entries if flat]

    async def done(self, places: Sequence[str]) -> None:
        """Forget them."""
        if not places:
            return
        await self._connection.command("XACK", self._key, STORAGE, *places)
        await self._connection.command("XDEL", self._key, *places)


def _threshold(text: bytes) -> float | None:
    return float(text) if text else None


def _text(threshold: float | None) -> str:
    return "" if threshold is None else repr(threshold)


class RedisReviewLog:
    """What people say, in the stream `annotations` (ids that wait in `annotation-ids`), and what they were given."""

    # Each may bring a mask; the store takes hundreds a second.
    LIMIT = 256
    GIVEN = 20_000
    GIVEN_TTL_S = 30 * 86_400

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    async def put(self, model: str, annotation_id: str, body: bytes, mask: bytes) -> str | None:
        """Its place in the log."""
        start = prefix(model)
        keys = [f"{start}annotations", f"{start}annotation-ids"]
        try:
            place: bytes = await self._connection.script(ANNOTATE, keys, [annotation_id, body, mask, self.LIMIT])
        except OutOfMemoryError:
            return None
        return place.decode() or None

    async def read(self, model: str, after: str, *, count: int, block_ms: int) -> list[QueuedAnnotation]:
        """What was said after this place."""
        blocking = ("BLOCK", block_ms) if block_ms > 0 else ()
        key = f"{prefix(model)}annotations"
        reply = await self._connection.command("XREAD", "COUNT", count, *blocking, "STREAMS", key, after)
        found = [(place.decode(), _fields(flat)) for place, flat in _entries(reply)]
        return [QueuedAnnotation(place, said[b"i"].decode(), said[b"b"], said[b"m"]) for place, said in found]

    async def done(self, model: str, annotations: Sequence[QueuedAnnotation]) -> None:
        """Forget them; the ids first, so that a crash between the two leaves none that can't be said again."""
        if annotations:
            start = prefix(model)
            await self._connection.command(
                "HDEL", f"{start}annotation-ids", *(one.annotation_id for one in annotations)
            )
            await self._connection.command("XDEL", f"{start}annotations", *(one.place for one in annotations))

    async def give(self, model: str, reviewer: str, frame_ids: Sequence[str]) -> None:
        """Remember what a reviewer has been given."""
        if frame_ids:
            key = self._given_key(model, reviewer)
            at = (await self._connection.command("TIME"))[0].decode()
            await self._connection.command("ZADD", key, *(part for one in frame_ids for part in (at, one)))
            await self._connection.command("ZREMRANGEBYRANK", key, 0, -self.GIVEN - 1)
            await self._connection.command("EXPIRE", key, self.GIVEN_TTL_S)

    async def given(self, model: str, reviewer: str) -> set[str]:
        """What a reviewer has been given."""
        found = await self._connection.command("ZRANGE", self._given_key(model, reviewer), 0, -1)
        return {one.decode() for one in found}

    def _given_key(self, model: str, reviewer: str) -> str:
        return f"{prefix(model)}given:{hashlib.sha256(reviewer.encode()).hexdigest()[:16]}"
