"""Settings, from the environment: VIGIL_STORE_URL and so on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings

LEAST_QUOTA_BYTES = 256 << 20


def _quota(quota_bytes: int) -> int:
    if quota_bytes != 0 and quota_bytes < LEAST_QUOTA_BYTES:
        raise ValueError(f"0 for no quota, or at least {LEAST_QUOTA_BYTES} bytes")
    return quota_bytes


class Settings(SecuritySettings):
    """Storage's settings.

    Attributes:
        storage_bind: "HOST:PORT" of the gRPC server.
        redis_url: redis://, rediss:// or redis+cluster://.
        store_url: http(s):// of ReductStore, or file:///FOLDER for the embedded store.
        store_token_file: Holds ReductStore's API token.
        metrics_port: Prometheus metrics; 0 for none.
        confirm_after_s: How long after a write a frame is looked for, and a model's next version may be written; longer
            than two RS_ENGINE_COMPACTION_INTERVAL.
        batch_size: Records per write, at most 64.
        flush_ms: How long a batch that is not full waits for more.
        retention_normal_bytes: Normal frames that nobody reviewed and no candidate disagreed about have this quota,
            the oldest going first; 0 keeps them for good, less than 256 MiB is refused: what goes before it was looked
            for would be written again and again. Anything else stays whatever this is.
        retention_normal_fraction: Which part of them is stored at all, from 0 to 1; all while a candidate is compared.
            A model's own `spec.retention` goes before it.
        drain_s: How long calls under way may take at a stop.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    storage_bind: str = "0.0.0.0:50053"
    redis_url: str = "redis://127.0.0.1:6379"
    store_url: str = "http://127.0.0.1:8383"
    store_token_file: Path | None = None
    metrics_port: int = 9090
    confirm_after_s: float = 2.5
    batch_size: int = 32
    flush_ms: int = 250
    retention_normal_bytes: Annotated[int, AfterValidator(_quota)] = 0
    retention_normal_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    drain_s: float = 10.0
    log_level: str = "INFO"
