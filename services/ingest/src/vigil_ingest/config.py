"""Settings, from the environment: VIGIL_REDIS_URL and so on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings


class Settings(SecuritySettings):
    """Ingest's settings.

    Attributes:
        ingest_bind: "HOST:PORT" of the gRPC server.
        redis_url: redis://, rediss:// or redis+cluster://.
        metrics_port: Prometheus metrics; 0 for none.
        queue_budget_bytes: Bytes of frames that a model's queue may hold.
        max_image_bytes: Larger images are refused; at most 60 MiB, for clients take no message over 64.
        max_image_pixels: Images of more pixels are refused before they are decoded.
        window: Frames in flight on one stream.
        client_calls: Calls of one client (its token's name, or its address without tokens) at once.
        client_frames_per_s: Frames of one client; 0 for any number.
        client_bytes_per_s: Image bytes of one client; 0 for any number.
        client_refused_per_s: Bad frames of one client that are answered at once; more wait for their answers.
        held_bytes: Image bytes of all clients on their way into the queue.
        verdict_timeout_s: How long a client waits for a verdict.
        drain_s: How long frames under way may take at a stop.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    ingest_bind: str = "0.0.0.0:50051"
    redis_url: str = "redis://127.0.0.1:6379"
    metrics_port: int = 9090
    queue_budget_bytes: int = 256 << 20
    max_image_bytes: Annotated[int, Field(ge=1024, le=60 << 20)] = 32 << 20
    max_image_pixels: int = 50_000_000
    window: int = 256
    client_calls: int = 1024
    client_frames_per_s: float = 0.0
    client_bytes_per_s: float = 0.0
    client_refused_per_s: float = 50.0
    held_bytes: int = 512 << 20
    verdict_timeout_s: float = 30.0
    drain_s: float = 20.0
    log_level: str = "INFO"
