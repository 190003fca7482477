"""Settings, from the environment: VIGIL_REDIS_URL and so on."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings

from vigil_shadow.pairing import WINDOW


class Settings(SecuritySettings):
    """Shadow's settings.

    Attributes:
        shadow_bind: "HOST:PORT" of the gRPC server.
        redis_url: redis://, rediss:// or redis+cluster://.
        storage_address: Storage as HOST:PORT, for what people said and for replays; reports need it for neither.
        metrics_port: Prometheus metrics; 0 for none.
        shadow_batch_size: Most verdicts of one step.
        shadow_window: Verdicts that a frame waits for its pair; over twice the frames that a candidate may be behind.
        shadow_lease_ms: After this long another replica takes over the reports of one that died.
        drain_s: How long calls under way may take at a stop.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    shadow_bind: str = "0.0.0.0:50054"
    redis_url: str = "redis://127.0.0.1:6379"
    storage_address: str | None = None
    metrics_port: int = 9090
    shadow_batch_size: int = 512
    shadow_window: int = WINDOW
    shadow_lease_ms: int = 3_000
    drain_s: float = 5.0
    log_level: str = "INFO"
