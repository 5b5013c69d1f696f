"""Running programs that a model wrote: each in a locked process of its own, for pass@1.

What a program can do is in `sandboxed.py`: compute, and read files. From here the process gets an empty folder, no environment,
no terminal, and a time after which it is killed. A program passes if it comes to its end: the process then says a token that it
was given and the program was not, so that leaving early is no way to pass (a program that goes looking for the token in the
frames above its own could cheat the score, not the machine). What it prints is thrown away.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lownibble.errors import ConfigError
from lownibble.study.sandboxed import UNABLE

MEMORY_BYTES = 1 << 30
SECONDS = 10.0
"""Limits of a program, where none are given."""


class Outcome(NamedTuple):
    """Whether a program passed, and how it ended if it did not."""

    passed: bool
    reason: str


def run_all(
    programs: Sequence[str], *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES, jobs: int | None = None
) -> list[Outcome]:
    """Run each program; so many at a time (default: one less than the processors, at least one).

    Raises:
        ConfigError: this system cannot lock a process in.
    """
    with ThreadPoolExecutor(jobs or max(1, (os.cpu_count() or 2) - 1)) as pool:
        return list(pool.map(lambda program: run(program, seconds=seconds, memory_bytes=memory_bytes), programs))


def run(program: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run one program.

    Raises:
        ConfigError: this system cannot lock a process in.
    """
    if sys.platform != "linux":
        raise ConfigError("Generated programs are run on Linux only: what locks them in (seccomp) is Linux's.")
    token = secrets.token_hex(16)
    given = json.dumps({"program": program, "token": token, "memory_bytes": memory_bytes, "seconds": int(seconds) + 1})
    child = Path(__file__).with_name("sandboxed.py")
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(child)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=folder, env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(given.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Outcome(False, f"not done after {seconds:g} s")
    if process.returncode == UNABLE:
        raise ConfigError("This kernel cannot lock a process in (seccomp filters), so generated programs are not run.")
    if said == token.encode() and process.returncode == 0:
        return Outcome(True, "")
    if process.returncode < 0:
        return Outcome(False, f"ended by {signal.Signals(-process.returncode).name}")
    return Outcome(False, "an exception, or it left before its end")
