"""Who may do what: tokens with roles and models, kept as hashes.

The tokens file is YAML; a token is 32 random bytes or more (`openssl rand -hex 32`), so one SHA-256 of it is enough:

    tokens:
      - name: line-1                 # in logs and audit
        sha256: 9f86d081884c7d65...  # of the token
        roles: [stream]
        models: [solar-cells]        # absent: every model
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vigil_common.errors import Forbidden, InvalidInput, Unauthenticated
from vigil_common.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

log = get_logger()


class Role(enum.StrEnum):
    """What a token is for; `admin` may do everything."""

    STREAM = "stream"
    REVIEW = "review"
    PUBLISH = "publish"
    # Vigil's own parts: workers load bundles, the operator reads reports.
    SERVE = "serve"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls.

    Attributes:
        name: As in the tokens file.
        roles: What it may do.
        models: Whose frames and versions; None for every model's.
    """

    name: str
    roles: frozenset[Role]
    models: frozenset[str] | None


# Without a tokens file everybody is this one.
ANYBODY = Principal("anybody", frozenset({Role.ADMIN}), None)
_principal: ContextVar[Principal] = ContextVar("principal", default=ANYBODY)


def principal() -> Principal:
    """Who made the call under way."""
    return _principal.get()


def enter(who: Principal) -> None:
    """Say who made the call under way."""
    _principal.set(who)


def may(model: str) -> bool:
    """Whether the call under way may touch a model."""
    who = _principal.get()
    return who.models is None or model in who.models


def authorize(model: str) -> None:
    """Let the call under way touch a model.

    Raises:
        Forbidden: MODEL_NOT_ALLOWED.
    """
    if not may(model):
        name = principal().name
        raise Forbidden("MODEL_NOT_ALLOWED", f"token {name} has no access to model {model[:64] or '(all)'}")


def require(who: Principal, roles: Collection[Role], method: str) -> None:
    """Let a principal call a method.

    Raises:
        Forbidden: ROLE_MISSING.
    """
    if Role.ADMIN not in who.roles and who.roles.isdisjoint(roles):
        wanted = " or ".join(sorted({*roles, Role.ADMIN}))
        raise Forbidden("ROLE_MISSING", f"token {who.name} may not call {method}; it needs the role {wanted}")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    roles: Annotated[frozenset[Role], Field(min_length=1)]
    models: frozenset[str] | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[list[_Entry], Field(min_length=1)]


class Tokens:
    """The tokens file, read again when it changes: a rotated secret needs no restart.

    A change that can't be read is logged, and what was read before goes on.

    Raises:
        InvalidInput: TOKENS_INVALID, at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed_ns = 0
        self._known: Mapping[bytes, Principal] = {}
        self._load()

    def _load(self) -> None:
        changed_ns = self._path.stat().st_mtime_ns
        if changed_ns == self._changed_ns:
            return
        try:
            document = _Document.model_validate(yaml.safe_load(self._path.read_text()))
        except (ValueError, yaml.YAMLError, RecursionError) as error:  # among them what is no UTF-8, or no date
            # Pydantic's own text repeats the input, which may hold a token pasted by mistake.
            fields = (
                [".".join(map(str, e["loc"])) for e in error.errors()] if isinstance(error, ValidationError) else []
            )
            where = ", ".join(fields) or "it is not YAML"
            raise InvalidInput("TOKENS_INVALID", f"{self._path} is not a tokens file: {where}") from None
        self._known = {
            bytes.fromhex(entry.sha256): Principal(entry.name, entry.roles, entry.models) for entry in document.tokens
        }
        self._changed_ns = changed_ns

    def authenticate(self, authorization: str | None) -> Principal:
        """Who sends this `authorization` value ("Bearer TOKEN").

        Raises:
            Unauthenticated: TOKEN_MISSING, TOKEN_UNKNOWN.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("TOKEN_MISSING", 'send metadata "authorization: Bearer TOKEN"')
        try:
            self._load()
        except (OSError, InvalidInput) as error:  # in the middle of a change, or a slip: who could call still can
            log.warning("tokens_unreadable", file=str(self._path), detail=str(error))
        digest = hashlib.sha256(token.strip().encode()).digest()
        found = None
        for known, who in self._known.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = who
        if found is None:
            raise Unauthenticated("TOKEN_UNKNOWN", "nobody has this token; ask for a new one")
        return found
