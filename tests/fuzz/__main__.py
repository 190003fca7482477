"""`make fuzz SECONDS=… SEED=…`: each target in a process of its own, with bounds on time and memory.

An input that ends in anything but an answer or a `VigilError`, that takes over two seconds, or for which the process
grows past its bound, is written to `out/fuzz/TARGET-…`. Fix it, and keep the input in `tests/fuzz/corpus/TARGET/`,
from where `make test` runs it ever after. Targets take turns; a target's inputs follow from the seed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.mutate import MAX_BYTES
from tests.fuzz.seeds import changed, seeds
from tests.fuzz.targets import TARGETS, run

if TYPE_CHECKING:
    from types import FrameType

HANG_S = 2.0
# A picture of a million pixels decodes into some tens of megabytes.
GROWTH_BYTES = 512 << 20
POOL = 400
OUT = Path("out/fuzz")


class HangError(Exception):
    """An input took too long."""


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fuzz(name: str, seconds: float, seed: int, current: Path) -> int:
    """In a process of its own; returns how many inputs broke the target."""
    chance = random.Random(f"{seed} {name}")
    target, pool = TARGETS[name], seeds(name)
    # The input under way, for when the process itself dies of it.
    with current.open("wb+") as file:
        file.truncate(8 + MAX_BYTES)
        shown = mmap.mmap(file.fileno(), 8 + MAX_BYTES)

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"over {HANG_S} s")

    signal.signal(signal.SIGALRM, too_long)
    for data in pool:
        run(target, data)  # imports and caches are no growth
    before = _rss()
    seen: set[str] = set()
    broken: set[str] = set()
    count, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = changed(name, pool, chance)
        shown[: 8 + len(data)] = len(data).to_bytes(8, "little") + data
        count += 1
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            how = run(target, data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            how = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            if how not in broken:
                broken.add(how)
                _keep(name, data, how, traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if _rss() - before > GROWTH_BYTES:
            _keep(name, data, "memory", f"grew by {(_rss() - before) >> 20} MiB")
            broken.add("memory")
            before = _rss()
        if how not in seen:
            seen.add(how)
            if len(pool) < POOL:
                pool.append(data)
    grown = (_rss() - before) >> 20
    print(f"  {name}: {count} inputs, {len(seen)} ways to end, grown {grown} MiB, broken {len(broken)}")
    return len(broken)


def _keep(name: str, data: bytes, how: str, detail: str) -> None:
    path = OUT / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"BROKEN {name}: {how}\n  input kept as {path}\n{detail}", flush=True)


def main() -> int:
    """Give each target its share of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--child", type=Path)
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if asked.child is not None:
        return min(_fuzz(asked.target, asked.seconds, asked.seed, asked.child), 100)
    names = [asked.target] if asked.target else list(TARGETS)
    print(f"fuzz: {len(names)} targets, {asked.seconds:g} s, seed {asked.seed}", flush=True)
    broken = 0
    for name in names:
        share = asked.seconds / len(names)
        current = OUT / f"{name}.current"
        options = ["--target", name, "--seconds", str(share), "--seed", str(asked.seed), "--child", str(current)]
        try:
            with (OUT / f"{name}.log").open("w") as log:  # libtiff's complaints
                command = [sys.executable, "-m", "tests.fuzz", *options]
                code = subprocess.run(command, check=False, timeout=share + 60, stderr=log).returncode
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        if code < 0 or code > 100:
            shown = current.read_bytes()
            _keep(name, shown[8 : 8 + int.from_bytes(shown[:8], "little")], f"the process ended with {code}", "")
            code = 1
        broken += code
        current.unlink(missing_ok=True)
    print(f"fuzz: targets={len(names)} broken={broken} seed={asked.seed}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
