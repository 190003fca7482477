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

from typing import TYPE_CHECKING, Any, Self

import redis.asyncio as aredis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vigil_common.streams.redis_connection import Connection
from vigil_common.streams.redis_frames import (
    RedisCandidateSource,
    RedisFrameQueue,
    RedisFrameSource,
    RedisOutcomeSource,
)
from vigil_common.streams.redis_reviews import RedisReviewLog
from vigil_common.streams.redis_routing import RedisRouting
from vigil_common.streams.redis_shadow import RedisComparisonSource, RedisReports, RedisVerdictSource

if TYPE_CHECKING:
    from vigil_common.config import SecuritySettings


class RedisStreams:
    """Everything on one Redis.

    Args:
        connection: Where to.
        budget_bytes: Bytes of frames that a model's queue may hold.
        dedup_window_s: For how long after its verdict a frame id is remembered.
    """

    def __init__(self, connection: Connection, *, budget_bytes: int, dedup_window_s: int) -> None:
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
            return cls(Connection(cluster), budget_bytes=budget_bytes, dedup_window_s=dedup_window_s)
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
        return cls(Connection(client), budget_bytes=budget_bytes, dedup_window_s=dedup_window_s)

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
