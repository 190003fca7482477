"""Redis' users, one per service, each with no more than it needs: `python -m vigil_common.streams.acl FOLDER`.

The command writes FOLDER/users.acl for Redis' `aclfile`, which holds hashes alone, and each user's password in
FOLDER/NAME, to be given to its service as VIGIL_REDIS_PASSWORD_FILE beside `redis://NAME@HOST:PORT`. Called again it
keeps the passwords that are there. `default` is off; `admin` is for people.

What a script does is held against its caller's rights command by command, and a script that is stopped half-way stays
half done: give a service less than this only after the tests have run with it. Keys named to EVALSHA need the right to
read and write, so what a service may only read its scripts name by themselves.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

MODELS = "vigil:models"
ADMIN = "admin"
# What a cluster's client asks. Redis 7.0 starts with no file that names a command which it does not know.
ANYWHERE = "ping cluster|slots cluster|shards command"


@dataclass(frozen=True, slots=True)
class Grant:
    """Commands on keys.

    Attributes:
        commands: By their names.
        write: A model's keys without their prefix, or `vigil:models`; may be read, too.
        read: The same, to be read alone.
    """

    commands: str
    write: str = ""
    read: str = ""

    def __str__(self) -> str:
        keys = [f"~{_pattern(key)}" for key in self.write.split()] + [
            f"%R~{_pattern(key)}" for key in self.read.split()
        ]
        return f"({' '.join([*keys, *(f'+{command}' for command in self.commands.split())])})"


def _pattern(key: str) -> str:
    return key if key == MODELS else f"vigil:{{*}}:{key}"


_GROUPS = Grant("xgroup|create", "frames verdicts comparisons")
_FOLLOW = Grant("hgetall xread", read="routing routing-changes")
_REPORT = "shadow-report:* shadow-joint:* shadow-open:* shadow-worst:* shadow-details:*"
# Routes are written by whoever decides them.
_DECIDE = (
    Grant("eval evalsha", "routing routing-changes frames"),
    Grant("hmget hset hdel hincrby hgetall", "routing"),
    Grant("xadd xread", "routing-changes"),
    Grant("xinfo|stream xgroup|create xgroup|destroy", "frames"),
    Grant("hset hsetnx expire", "shadow-report:*"),
    Grant("xlen", read="annotations"),
    Grant("sadd smembers", MODELS),
    Grant("time"),
)

USERS: dict[str, tuple[Grant, ...]] = {
    "ingest": (
        _GROUPS,
        _FOLLOW,
        Grant("eval evalsha", "frames budget frame:*"),
        Grant("xadd", "frames"),
        Grant("hmget hset expire", "budget frame:*"),
        Grant("exists xread xtrim", "replies:*"),
    ),
    "inference": (
        _GROUPS,
        _FOLLOW,
        Grant("eval evalsha", "frames verdicts unstored dead shadow-verdicts shadow-sequence"),
        Grant("xreadgroup xclaim xpending xrange xack xinfo|consumers xgroup|delconsumer", "frames"),
        Grant("hmget", read="routing"),
        Grant("xadd", "verdicts dead replies:* shadow-verdicts"),
        Grant("expire xlen xtrim memory|usage", "replies:*"),
        Grant("zadd", "unstored"),
        Grant("hmget hset hdel expire", "frame:*"),
        Grant("incr", "shadow-sequence"),
    ),
    "shadow": (
        _FOLLOW,
        Grant("hget", read="routing"),
        Grant("smembers", read=MODELS),
        Grant("eval evalsha", f"shadow-owner shadow-cursor* comparisons shadow-verdicts {_REPORT}"),
        Grant("get set del", "shadow-owner"),
        Grant("hget hmget hset", "shadow-cursor*"),
        Grant("hget hset hsetnx hincrby hdel hgetall hmget hscan expire", _REPORT),
        Grant("zadd zcard zrange zrevrange zremrangebyrank", "shadow-worst:*"),
        Grant("xadd", "comparisons"),
        Grant("xread xtrim", "shadow-verdicts"),
    ),
    "storage": (
        *_DECIDE,
        _GROUPS,
        Grant("eval evalsha", "owner frames verdicts unstored budget routing annotations annotation-ids"),
        Grant("get set del", "owner"),
        Grant("exists xlen xrange xtrim xack xpending xinfo|groups xgroup|setid", "frames"),
        Grant("exists xreadgroup xack xtrim xpending xinfo|groups", "verdicts"),
        Grant("xreadgroup xack xdel", "comparisons"),
        Grant("zrange zrangebyscore zcard zrem", "unstored"),
        Grant("hget hset hmget", "budget"),
        Grant("hget", read="routing"),
        Grant("hincrby", "shadow-report:*"),
        Grant("xlen", read="dead"),
        Grant("get", read="keep-fraction"),
        Grant("xadd xlen xread xdel", "annotations"),
        Grant("hget hset hdel", "annotation-ids"),
        Grant("zadd zremrangebyrank zrange expire", "given:*"),
    ),
    "operator": (
        *_DECIDE,
        _GROUPS,
        Grant("del", "routing routing-changes"),
        Grant("exists xlen", "frames"),
        Grant("srem", MODELS),
        Grant("get set del", "keep-fraction"),
    ),
    # Scales workers by what live has yet to judge.
    "keda": (Grant("xinfo|groups xpending xlen", read="frames"), Grant("info")),
}


def acl_file(passwords: dict[str, str]) -> str:
    """What Redis reads.

    Args:
        passwords: By user; one for each of `USERS`, and the admin's.
    """
    lines = ["user default off"]
    anywhere = " ".join(f"+{command}" for command in ANYWHERE.split())
    lines += [
        f"user {name} on {_hash(passwords[name])} {anywhere} {' '.join(map(str, may))}" for name, may in USERS.items()
    ]
    return "\n".join([*lines, f"user {ADMIN} on {_hash(passwords[ADMIN])} ~* &* +@all", ""])


def _hash(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def write(folder: Path) -> Path:
    """Write passwords and file, for their owner's eyes; returns the file."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    passwords = {}
    for name in (*USERS, ADMIN):
        path = folder / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        passwords[name] = path.read_text().strip()
    file = folder / "users.acl"
    file.touch(mode=0o600)
    file.write_text(acl_file(passwords))
    return file


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and its argument
        sys.exit("usage: python -m vigil_common.streams.acl FOLDER")
    print(write(Path(sys.argv[1])))  # noqa: T201 - it is a command
