"""Settings, from the environment: VIGIL_MODEL and so on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings


class Settings(SecuritySettings):
    """A worker's settings.

    Attributes:
        inference_bind: "HOST:PORT" of the gRPC server.
        redis_url: redis://, rediss:// or redis+cluster://.
        model: Whose frames to judge.
        model_version: 0 for the newest.
        model_digest: Refuse any other bundle.
        storage_address: Where to load the bundle from, by gRPC.
        store_url: Where to load it from directly, if no storage_address is given.
        store_token_file: Holds the store's token.
        engine: "auto" times what the bundle has, on this node, and takes the fastest that holds its parity.
        precision: On OpenVINO.
        threads: For one run.
        runs: How many runs may go on at a time; 0 for as many as there are CPUs for.
        batch_size: Most images of one run; 0 for as many as are judged within a few milliseconds.
        cache_dir: Writable, for the extracted bundle.
        metrics_port: Prometheus metrics; 0 for none.
        claim_idle_ms: Frames that another worker has held for longer are taken over; later where the model is slow.
        max_image_pixels: Larger images are refused.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_", protected_namespaces=())

    inference_bind: str = "0.0.0.0:50052"
    redis_url: str = "redis://127.0.0.1:6379"
    model: str
    model_version: int = 0
    model_digest: str | None = None
    storage_address: str | None = None
    store_url: str | None = None
    store_token_file: Path | None = None
    engine: Literal["auto", "onnxruntime", "openvino"] = "auto"
    precision: Literal["f32", "bf16"] = "f32"
    threads: int = 1
    runs: int = 0
    batch_size: int = 0
    cache_dir: Path | None = None
    metrics_port: int = 9092
    claim_idle_ms: int = 5_000
    max_image_pixels: int = 50_000_000
    log_level: str = "INFO"
