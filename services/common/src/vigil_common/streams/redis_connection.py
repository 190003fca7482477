"""Commands and scripts on one Redis or a cluster, and what all that stands there has in common."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

import redis.asyncio as aredis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from vigil_common.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Groups of readers.
LIVE = "live"
SHADOW = "shadow"
STORAGE = "storage"
# Storage has one owner at a time, so its consumer has one name and finds its own pending entries again.
OWNER = "owner"
# Calls that share a round trip, and those that share one run of a script, in which the server does nothing else.
EACH_AT_MOST, CALL_AT_MOST, CALL_BYTES = 64, 16, 1 << 20
# No connection is waited for longer than this without a sign of it.
SOCKET_TIMEOUT_S = 5.0
# What a server says that can't serve now: in a failover, while its disk is full, without its replicas, while somebody's
# script runs for long.
AWAY = ("READONLY", "UNBLOCKED", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ")


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


OWN = Script.load("own")


def away(error: BaseException) -> bool:
    """Whether Redis is away, rather than the command wrong."""
    if isinstance(error, ResponseError):
        # redis-py cuts the code off those that it has a class for.
        return isinstance(error, ReadOnlyError | ClusterDownError | TryAgainError) or str(error).startswith(AWAY)
    if isinstance(error, RuntimeError):
        # uvloop's word for a connection that was reset between two writes; redis-py lets it through.
        return "handler is closed" in str(error)
    # The cluster client's own words: it reaches no node, or the nodes don't agree yet.
    if isinstance(error, RedisClusterException | ClusterError):
        return True
    return isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)


class OverMemory(Unavailable):
    """Redis serves, and takes nothing more that costs memory."""


def passing(error: BaseException) -> bool:
    """Whether the same command may work later."""
    return isinstance(error, OutOfMemoryError) or away(error)


def unavailable(error: BaseException) -> Unavailable:
    """The same for the caller."""
    if isinstance(error, OutOfMemoryError):
        return OverMemory("QUEUE_UNAVAILABLE", f"Redis is over its memory ({error}); try again", retry_after_s=1.0)
    return Unavailable("QUEUE_UNAVAILABLE", f"Redis is away ({error}); try again", retry_after_s=1.0)


@contextmanager
def translated() -> Iterator[None]:
    """Turn lost connections, and servers that can't serve this now, into `Unavailable`."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError, RuntimeError) as error:
        if not passing(error):
            raise
        raise unavailable(error) from error


def prefix(model: str) -> str:
    """Start of every key of a model."""
    return f"vigil:{{{model}}}:"


@dataclass(frozen=True, slots=True)
class Shared:
    """Keys and arguments that a script has for all that it is given."""

    keys: tuple[str, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Each:
    script: Script
    shared: Shared
    key: str
    arguments: Sequence[Any]
    future: asyncio.Future[Any]


def _grouped(waiting: Sequence[_Each]) -> list[list[_Each]]:
    """What may go into one call, and does not keep the server busy for long."""
    groups: list[list[_Each]] = []
    open_groups: dict[tuple[str, Shared], tuple[list[_Each], int]] = {}
    for each in waiting:
        size = sum(len(value) for value in each.arguments if isinstance(value, bytes))
        group, held = open_groups.get((each.script.sha, each.shared), ([], 0))
        if not group or len(group) == CALL_AT_MOST or held + size > CALL_BYTES:
            group, held = [], 0
            groups.append(group)
        group.append(each)
        open_groups[each.script.sha, each.shared] = group, held + size
    return groups


def _call(group: Sequence[_Each]) -> tuple[Any, ...]:
    """The script, and what follows it in EVALSHA."""
    script, shared = group[0].script, group[0].shared
    keys = [*shared.keys, *(each.key for each in group)]
    return script, len(keys), *keys, *shared.arguments, *(value for each in group for value in each.arguments)


def _settle(group: Sequence[_Each], result: Any) -> None:
    """Each its part of the answer, or all the error."""
    for index, each in enumerate(group):
        if each.future.done():
            continue
        if isinstance(result, BaseException):
            each.future.set_exception(unavailable(result) if passing(result) else result)
        else:
            each.future.set_result(result[index])


class Connection:
    """Commands and scripts on one node or a cluster; concurrent script calls travel together."""

    def __init__(self, client: aredis.Redis | RedisCluster) -> None:
        self.client: Any = client
        self.clustered = isinstance(client, RedisCluster)
        # By what travels together: all of a server's, or of a cluster, where a part may be away, each model's.
        self._waiting: dict[str, list[_Each]] = {}
        self._flushers: dict[str, asyncio.Task[None]] = {}
        # Connections that nobody uses at the moment; on one node.
        self._idle: list[Any] = []
        # How often a server said that it can't serve; what was connected before the last time is not used again.
        self._left = 0

    async def command(self, *arguments: Any) -> Any:
        """One command."""
        with translated():
            return await self._execute(*arguments)

    async def _execute(self, *arguments: Any) -> Any:
        if self.clustered:
            return await self._of_cluster(*arguments)
        (answer,) = await self._converse([arguments])
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    async def _of_cluster(self, *arguments: Any) -> Any:
        try:
            return await self.client.execute_command(*arguments)
        except RedisError as error:
            failed = getattr(error, "last_failed_node_name", None)
            if failed is not None:
                # Where the slots are is asked anew now, and all models wait for it: of the server that hangs last.
                with suppress(RedisError, RedisClusterException, OSError):
                    await self.client.initialize(last_failed_node_name=failed)
            raise

    async def _converse(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Commands in one round trip, on a connection that nobody else uses; what the server refuses is an answer.

        redis-py's own way to a connection (pool, locks, its observers) costs as much again as all that is done here.
        """
        line = self._idle.pop() if self._idle else self.client.connection_pool.make_connection()
        answers: list[Any] = []
        left, refused = self._left, False
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
                    refused = refused or away(error)
        except BaseException as error:
            # An answer that still comes would be taken for that of the next command.
            await line.disconnect(nowait=True)
            anonymous = isinstance(line, aredis.SSLConnection) and not line.certfile
            if anonymous and isinstance(error, RedisConnectionError | OSError):
                # The server's own word for it is often overtaken by the end of the connection.
                raise RedisConnectionError(f"{error}; if it wants a client certificate, there is none") from error
            raise
        if refused:
            # After a failover another server answers at the same address, and this one as a replica for long.
            self._left += 1
            while self._idle:
                await self._idle.pop().disconnect(nowait=True)
        if left == self._left:
            self._idle.append(line)
        else:
            await line.disconnect(nowait=True)
        return answers

    async def commands(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Several commands in one round trip; errors come back as values, but that it is away is raised."""
        if self.clustered:
            calls = (self._of_cluster(*command) for command in commands)
            results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        else:
            results = await self._converse(commands)
        for result in results:
            if isinstance(result, BaseException) and passing(result):
                raise unavailable(result)
        return results

    async def script(self, script: Script, keys: list[str], arguments: list[Any]) -> Any:
        """Run a script; loads it where the server does not know it."""
        with translated():
            try:
                return await self._execute("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._execute("EVAL", script.source, len(keys), *keys, *arguments)

    async def script_on_each(self, script: Script, shared: Shared, key: str, arguments: Sequence[Any]) -> Any:
        """A script's answer for one of the things it is given many of.

        Calls made while one is under way share the next round trip (and its fsync), and those of one `shared` a call.

        Args:
            script: Takes the shared keys, then one of each thing; the shared arguments, then those of each thing; and
                answers with a list, one element for each thing.
            shared: Keys and arguments of all.
            key: The thing's.
            arguments: The thing's.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        way = shared.keys[0] if self.clustered else ""
        waiting = self._waiting.setdefault(way, [])
        waiting.append(_Each(script, shared, key, arguments, future))
        flusher = self._flushers.get(way)
        if flusher is None or flusher.done():
            self._flushers[way] = asyncio.create_task(self._flush(waiting))
        return await future

    async def _flush(self, waiting: list[_Each]) -> None:
        while waiting:
            batch = waiting[:EACH_AT_MOST]
            del waiting[:EACH_AT_MOST]
            groups = _grouped(batch)
            calls = [_call(group) for group in groups]
            results: Sequence[Any]
            try:
                results = await self.commands([("EVALSHA", script.sha, *rest) for script, *rest in calls])
            except Exception as error:  # noqa: BLE001 - carried to who asked
                results = [error] * len(groups)
            for group, (script, *rest), result in zip(groups, calls, results, strict=True):
                final = result
                if isinstance(result, NoScriptError):
                    try:
                        final = await self._execute("EVAL", script.source, *rest)
                    except Exception as error:  # noqa: BLE001 - likewise
                        final = error
                _settle(group, final)

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
        return entries_of(reply)

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            await self._idle.pop().disconnect()
        await self.client.aclose()


def entries_of(reply: Any) -> list[tuple[bytes, Any]]:
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


def fields_of(flat: Any) -> dict[bytes, bytes]:
    """Fields of an entry: flat list, list of pairs, or already a dict."""
    if isinstance(flat, dict):
        return flat
    return dict(zip(flat[::2], flat[1::2], strict=True))


def raise_errors(results: list[Any]) -> list[Any]:
    """The results of several commands, where none of them is an error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
