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
from urllib.parse import unquote, urlsplit, urlunsplit

import redis.asyncio as aredis
from redis._parsers import _AsyncHiredisParser
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from vigil_common.errors import InvalidInput
from vigil_common.streams import redis_connection
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
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from vigil_common.config import SecuritySettings

CONNECT_TIMEOUT_S = 2.0
# So much is sent within one time-out, as to a line of 2 Mbit/s.
PIECE_BYTES = 1 << 20


class _PasswordFile(CredentialProvider):
    """The password, read anew for each connection since it may be rotated.

    No file in a folder that is there is no password: a Secret may hold the authority's certificate alone.
    """

    def __init__(self, user: str, path: Path) -> None:
        if not path.parent.is_dir():
            raise InvalidInput(
                "REDIS_PASSWORD_FOLDER_MISSING", f"VIGIL_REDIS_PASSWORD_FILE is {path}, but there is no {path.parent}"
            )
        self._user = user
        self._path = path

    def get_credentials(self) -> Any:
        """What AUTH is given; nothing where there is neither user nor password."""
        try:
            password = self._path.read_text().strip()
        except FileNotFoundError:
            password = ""
        if self._user:
            return self._user, password
        return (password,) if password else ()

    async def get_credentials_async(self) -> Any:
        """The same."""
        return self.get_credentials()


class _InPieces(aredis.Connection):
    """Gives each piece of what is large the time-out that redis-py has for all, as `_Patient` does for answers."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's
        """Send what was packed."""
        for piece in [command] if isinstance(command, str | bytes) else _pieces(command):
            await super().send_packed_command(piece, check_health)


def _pieces(command: Iterable[bytes]) -> Iterator[list[Any]]:
    piece: list[memoryview] = []
    left = PIECE_BYTES
    for part in command:
        view = memoryview(part)
        while len(view) >= left:
            yield [*piece, view[:left]]
            piece, view, left = [], view[left:], PIECE_BYTES
        piece.append(view)
        left -= len(view)
    yield piece


class _Tls(_InPieces, SSLConnection):
    """Reads the certificates anew at each connection, since they may be rotated."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


class _Patient(_AsyncHiredisParser):
    """Takes an answer for as long as more of it comes.

    redis-py's time-out is for all of it: a large image would never come over a slow line.
    """

    def on_connect(self, connection: Any) -> None:
        """Know whose time-out it is."""
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._connection = connection

    async def read_from_socket(self) -> bool:
        """Take more, and wait anew for what follows."""
        await super().read_from_socket()  # type: ignore[no-untyped-call]
        self._connection.update_current_socket_timeout(-1)
        return True


def _without_user(url: str) -> tuple[str, str]:
    """The user of a URL, and the rest."""
    parts = urlsplit(url)
    return unquote(parts.username or ""), urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


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
        """Open `redis://` or `rediss://` for one node, `redis+cluster://` or `rediss+cluster://` for a cluster.

        The library's own retries are off: a repeated XADD is a second frame, a repeated XREADGROUP strands entries.

        Raises:
            InvalidInput: REDIS_PASSWORD_FOLDER_MISSING.
        """
        retry = Retry(NoBackoff(), 0)
        more: dict[str, Any] = {}
        if security is not None and security.redis_password_file is not None and not urlsplit(url).password:
            user, url = _without_user(url)
            more["credential_provider"] = _PasswordFile(user, security.redis_password_file)
        if security is not None and security.redis_ca_file is not None:
            more["ssl_ca_certs"] = str(security.redis_ca_file)
        if security is not None and security.tls_cert_file and security.tls_key_file and url.startswith("rediss"):
            # Shown to a server that asks for one.
            more |= {"ssl_certfile": str(security.tls_cert_file), "ssl_keyfile": str(security.tls_key_file)}
        if "+cluster://" in url:
            plain = url.replace("+cluster://", "://", 1)
            cluster = RedisCluster.from_url(
                plain,
                protocol=2,
                retry=retry,
                socket_timeout=redis_connection.SOCKET_TIMEOUT_S,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                driver_info=None,
                **more,
            )
            cluster.connection_kwargs["parser_class"] = _Patient
            for node in cluster.startup_nodes:
                node.connection_kwargs["parser_class"] = _Patient
            # Raw replies, but for what the cluster client itself asks.
            for name in set(cluster.response_callbacks) - {"COMMAND", "CLUSTER SLOTS", "CLUSTER SHARDS"}:
                del cluster.response_callbacks[name]
            kind = _Tls if plain.startswith("rediss") else _InPieces
            cluster.connection_kwargs["connection_class"] = kind
            for node in cluster.startup_nodes:
                node.connection_class = kind
            return cls(Connection(cluster), budget_bytes=budget_bytes, dedup_window_s=dedup_window_s)
        client = aredis.Redis.from_url(
            url,
            protocol=2,
            retry=retry,
            parser_class=_Patient,
            socket_timeout=redis_connection.SOCKET_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            # A pooled connection may have died with the server; redis-py checks before it is used again.
            health_check_interval=0,
            max_connections=256,
            # Else it says its name at each connection, by a command that Redis 7.0 does not know.
            driver_info=None,
            **more,
        )
        # Raw replies: the callbacks would build objects that nobody reads.
        client.response_callbacks.clear()
        client.connection_pool.connection_class = _Tls if url.startswith("rediss") else _InPieces
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
