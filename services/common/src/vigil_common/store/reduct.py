"""The stores on ReductStore 1.21.

What decides the code, each pinned by a contract test: an acknowledged write may be lost with the server (hence
`confirm`), one writer per entry, records that come late damage an entry (hence `tracks`), label names that kill the
server (hence `labels.check`), 409 does not mean stored, a batch holds about 90 records and 512,000 header bytes, and
queries guess the types of labels.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from reduct import BucketSettings, QuotaType, ReductError

from vigil_common.logging import get_logger
from vigil_common.store.find import find_frame
from vigil_common.store.reduct_client import FORBIDDEN, open_bucket, translated
from vigil_common.store.reduct_query import Reading
from vigil_common.store.reduct_write import Writing
from vigil_common.store.tracks import Tracks, base_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from vigil_common.errors import VigilError
    from vigil_common.store.ports import FrameFilter, Labelling, Record, StoredRecord, Written

# A block's description is written anew at each compaction and filtered whole by each query: with the server's default
# of 1,024 records a record costs it 3 to 7 ms of CPU, with 128 0.8 to 1.4, with these 0.6 to 1.0. Fewer still gain
# nothing more, and are more files.
BLOCK_RECORDS = 64
# Under a quota: blocks in it, how large one is at most, and how many may be free when it counts as full.
BLOCKS, MAX_BLOCK_BYTES, FULL_BLOCKS = 16, 64_000_000, 3

log = get_logger()


def frame_settings(quota_bytes: int = 0) -> BucketSettings:
    """What a bucket of frames is to have; a quota of 0 leaves the quota as it is, at first none."""
    if not quota_bytes:
        return BucketSettings(max_block_records=BLOCK_RECORDS)
    # Whole blocks go at once, so they must be small beside the quota.
    block_bytes = max(1, min(MAX_BLOCK_BYTES, quota_bytes // BLOCKS))
    return BucketSettings(
        quota_type=QuotaType.FIFO,
        quota_size=quota_bytes,
        max_block_size=block_bytes,
        max_block_records=BLOCK_RECORDS,
    )


async def _settle(bucket: Any, settings: BucketSettings, *, must: bool) -> None:
    """Give a bucket that has others these settings, which takes the server's own token."""
    found = (await bucket.get_settings()).model_dump()
    if settings.model_dump(exclude_none=True).items() <= found.items():
        return
    try:
        await bucket.set_settings(settings)
    except ReductError as error:
        if must or error.status_code != FORBIDDEN:
            raise
        log.warning("bucket_settings_differ", bucket=bucket.name, wanted=settings.model_dump(exclude_none=True))


class ReductFrameStore:
    """Images with labels in one bucket; entry "MODEL/CAMERA"."""

    def __init__(self, client: Any, bucket: Any, *, stride_us: int = 1, quota_bytes: int = 0) -> None:
        self._client = client
        self._bucket = bucket
        self._quota_bytes = quota_bytes
        self.tracks = Tracks()
        self._reading = Reading(bucket, self.tracks)
        self._writing = Writing(bucket, self.tracks, self._reading, stride_us=stride_us)

    @classmethod
    async def open(
        cls,
        url: str,
        token: str | None = None,
        bucket: str = "vigil-frames",
        *,
        timeout_s: float = 30.0,
        stride_us: int = 1,
        quota_bytes: int = 0,
    ) -> Self:
        """Connect; makes the bucket where it is missing.

        Args:
            url: Of the server.
            token: Its API token.
            bucket: Name of the bucket.
            timeout_s: For each call.
            stride_us: How far a record moves whose time is taken.
            quota_bytes: The oldest go once there is more; 0: nothing goes.

        Raises:
            Unavailable: Nobody answers.
        """
        settings = frame_settings(quota_bytes)
        client, opened = await open_bucket(url, token, bucket, settings, timeout_s)
        try:
            async with translated():
                await _settle(opened, settings, must=bool(quota_bytes))
        except BaseException:
            await client.__aexit__(None, None, None)
            raise
        return cls(client, opened, stride_us=stride_us, quota_bytes=quota_bytes)

    async def write(self, records: Sequence[Record]) -> list[Written | Exception]:
        """Write a batch; see the port."""
        return await self._writing.write(records)

    def forget(self, model: str) -> None:
        """Look at the server again before this model is written to; see the port."""
        self.tracks.forget(model)

    async def label(self, changes: Sequence[Labelling]) -> list[VigilError | None]:
        """Label stored records; see the port."""
        return await self._writing.label(changes)

    async def confirm(self, entry: str, expected: Mapping[int, str]) -> set[int]:
        """Which of these stand there now."""
        return await self._reading.confirm(entry, expected)

    async def counts(self) -> dict[str, int]:
        """How many records each camera has now."""
        counts: Counter[str] = Counter()
        async with translated():
            for entry in await self._bucket.get_entry_list():
                counts[base_of(entry.name)] += entry.record_count
        return dict(counts)

    async def horizon_us(self) -> int | None:
        """What is older than this goes as soon as it is written."""
        async with translated():
            info = await self._bucket.info()
        full = self._quota_bytes and info.size * BLOCKS >= self._quota_bytes * (BLOCKS - FULL_BLOCKS)
        return int(info.oldest_record) if full else None

    async def uptime_s(self) -> float:
        """Seconds since the server started, whole ones, rounded down."""
        async with translated():
            return float((await self._client.info()).uptime)

    def query(self, where: FrameFilter, *, limit: int) -> AsyncIterator[StoredRecord]:
        """Matching records by time; see the port."""
        return self._reading.query(where, limit=limit)

    async def read(self, entry: str, timestamp_us: int) -> tuple[StoredRecord, bytes]:
        """One record with its body, checked against its digest."""
        return await self._reading.read(entry, timestamp_us)

    async def find(self, model: str, frame_id: str, camera: str | None = None) -> StoredRecord:
        """The record of a frame id; see the port."""
        return await find_frame(self, model, frame_id, camera)

    async def close(self) -> None:
        """Release connections."""
        await self._client.__aexit__(None, None, None)
