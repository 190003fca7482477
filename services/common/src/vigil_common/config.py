"""Settings that every service has."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict


class SecuritySettings(BaseSettings):
    """Certificates, tokens and passwords: always files, so that no secret is in the environment.

    Attributes:
        tls_cert_file: The server's certificate chain (PEM); read again when it changes.
        tls_key_file: Its key.
        tls_client_ca_file: Clients must show a certificate of this authority.
        tokens_file: Who may call what; see `vigil_common.access`. Absent: everybody everything.
        health_bind: "HOST:PORT" that answers the probes without TLS and tokens, and nothing else.
        tls_ca_file: Authority of the other services' certificates; their calls go over TLS.
        token_file: Holds the token for calls to other services.
        redis_password_file: Holds Redis' password, read at each connection; without the file there is none. A user
            name is in the URL.
        redis_ca_file: Authority of Redis' certificate, for rediss://.
    """

    model_config = SettingsConfigDict(env_prefix="VIGIL_")

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    tokens_file: Path | None = None
    health_bind: str = ""
    tls_ca_file: Path | None = None
    token_file: Path | None = None
    redis_password_file: Path | None = None
    redis_ca_file: Path | None = None
