"""Settings, from the environment: VIGIL_WORKER_IMAGE and so on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from vigil_common.config import SecuritySettings

from vigil_operator.render import USER, WorkerSettings


class Settings(SecuritySettings):
    """The operator's settings.

    Attributes:
        redis_url: The queue, as the operator reaches it.
        storage_address: Storage, as the operator reaches it.
        shadow_address: The shadow service.
        watch_namespaces: Where AnomalyModels are looked after, with commas; empty for everywhere.
        operator_namespace: Where the operator itself is, and its Lease.
        operator_name: Of its Deployment, and its Lease.
        operator_pod: Who holds the Lease; empty for host and process.
        http_bind_port: /healthz, /readyz; 0 for none.
        metrics_port: Prometheus metrics; 0 for none.
        worker_image: The inference image.
        worker_image_pull_policy: As in a Pod.
        worker_image_pull_secrets: Names of Secrets in the models' namespaces, with commas.
        worker_redis_url: The queue, as workers reach it; empty for redis_url.
        worker_storage_address: Storage, as workers reach it; empty for storage_address.
        worker_redis_secret: A Secret in the models' namespaces: `password`, and `ca.crt` for rediss://.
        worker_redis_users: Whether it holds a password per user instead, each under its name.
        worker_tls_secret: A Secret there: `tls.crt`, `tls.key`, `ca.crt`.
        worker_token_secret: A Secret there: `token`, for calls to storage.
        worker_tokens_secret: A Secret there: `tokens.yaml`, who may call workers.
        worker_priority_class: Their PriorityClass.
        worker_run_as_user: Their user and group; 0: the cluster decides, or else their image.
        worker_log_level: Least level that they log.
        worker_otlp_endpoint: Where they send their frames' spans; empty for nowhere.
        worker_otlp_certificate_file: A file in them: the authority of that collector's certificate.
        log_level: Least level logged.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    redis_url: str = "redis://127.0.0.1:6379"
    storage_address: str = "127.0.0.1:50053"
    shadow_address: str = "127.0.0.1:50054"
    watch_namespaces: str = ""
    operator_namespace: str = ""
    operator_name: str = "vigil-operator"
    operator_pod: str = ""
    http_bind_port: int = 8080
    metrics_port: int = 9090
    worker_image: Annotated[str, Field(min_length=1)]
    worker_image_pull_policy: str = ""
    worker_image_pull_secrets: str = ""
    worker_redis_url: str = ""
    worker_storage_address: str = ""
    worker_redis_secret: str = ""
    worker_redis_users: bool = False
    worker_tls_secret: str = ""
    worker_token_secret: str = ""
    worker_tokens_secret: str = ""
    worker_priority_class: str = ""
    worker_run_as_user: int = USER
    worker_log_level: str = "INFO"
    worker_otlp_endpoint: str = ""
    worker_otlp_certificate_file: str = ""
    log_level: str = "INFO"

    def workers(self) -> WorkerSettings:
        """What all workers have in common; whether there is KEDA the cluster tells."""
        return WorkerSettings(
            image=self.worker_image,
            redis_url=self.worker_redis_url or self.redis_url,
            storage_address=self.worker_storage_address or self.storage_address,
            image_pull_policy=self.worker_image_pull_policy,
            image_pull_secrets=names(self.worker_image_pull_secrets),
            redis_secret=self.worker_redis_secret,
            redis_users=self.worker_redis_users,
            tls_secret=self.worker_tls_secret,
            token_secret=self.worker_token_secret,
            tokens_secret=self.worker_tokens_secret,
            priority_class=self.worker_priority_class,
            run_as_user=self.worker_run_as_user,
            operator_namespace=self.operator_namespace,
            log_level=self.worker_log_level,
            otlp_endpoint=self.worker_otlp_endpoint,
            otlp_certificate_file=self.worker_otlp_certificate_file,
        )


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
