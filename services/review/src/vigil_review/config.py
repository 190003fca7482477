"""Settings, from the environment: VIGIL_REVIEW_BIND and so on."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings


class Settings(SecuritySettings):
    """The review page's settings.

    People log in with a token of their own, which is what storage is asked with; the service's own token
    (`token_file`) is only for workers. Browsers are not asked for a certificate, whatever `tls_client_ca_file` says.

    Attributes:
        review_bind: "HOST:PORT" of the page; HTTPS where `tls_cert_file` is set.
        storage_address: Storage as HOST:PORT.
        inference_address: A model's live workers as HOST:PORT or file:PATH, "{model}" standing for its name and
            "{resource}" and "{namespace}" for its AnomalyModel's, see `vigil_common.grpc.workers`; they are asked for
            heat map and mask. Empty: pages go without.
        session_s: After so many seconds without a click people log in again.
        metrics_port: Prometheus metrics; 0 for none.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    review_bind: str = "0.0.0.0:8080"
    storage_address: str = "127.0.0.1:50053"
    inference_address: str = ""
    session_s: float = 8 * 3600.0
    metrics_port: int = 9090
    log_level: str = "INFO"
