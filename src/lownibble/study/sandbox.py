"""Run generated programs for pass@1, each in its own sandboxed process.

`sandboxed.py` defines what a program can do: compute, and read files. This module gives the process an empty folder, a minimal
environment (PATH, LC_ALL), no terminal, and a timeout after which it is killed. A program passes if it runs to its end: the
process then writes a token that it was given and the program was not, so that exiting early does not pass (a program that
searches the stack frames above its own for the token could cheat the score, not the machine). Its output is discarded; what the
process itself answers is kept in a few bytes of memory, which is all that a program can write.
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
from lownibble.study.sandboxed import ANSWER_BYTES, LOCKED, UNABLE

MEMORY_BYTES = 1 << 30
SECONDS = 10.0
"""Default limits of a program: bytes of address space, and seconds of wall-clock time."""


class Outcome(NamedTuple):
    """Whether a program passed, and how it ended if it did not."""

    passed: bool
    reason: str


def run_all(
    programs: Sequence[str], *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES, jobs: int | None = None
) -> list[Outcome]:
    """Run each program, `jobs` at a time (default: one less than the CPUs, at least one).

    Raises:
        ConfigError: this system cannot sandbox a process.
    """
    with ThreadPoolExecutor(jobs or max(1, (os.cpu_count() or 2) - 1)) as pool:
        return list(pool.map(lambda program: run(program, seconds=seconds, memory_bytes=memory_bytes), programs))


def run(program: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run one program.

    Raises:
        ConfigError: this system cannot sandbox a process.
    """
    if sys.platform != "linux":
        raise ConfigError("Generated programs are run on Linux only: what locks them in (seccomp) is Linux's.")
    token = secrets.token_hex(16)
    given = json.dumps({"program": program, "token": token, "memory_bytes": memory_bytes, "seconds": int(seconds) + 1})
    child = Path(__file__).with_name("sandboxed.py")
    with tempfile.TemporaryDirectory(prefix="program-") as folder, os.fdopen(os.memfd_create("answer"), "rb") as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(child)], stdin=subprocess.PIPE, stdout=answer, stderr=subprocess.DEVNULL,
            cwd=folder, env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(given.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Outcome(False, f"not done after {seconds:g} s")
        answer.seek(0)
        said = answer.read(ANSWER_BYTES)
    if process.returncode == UNABLE and not said:
        raise ConfigError("This kernel cannot lock a process in (seccomp filters), so generated programs are not run.")
    if said == LOCKED + token.encode() and process.returncode == 0:
        return Outcome(True, "")
    if process.returncode < 0:
        return Outcome(False, f"ended by {signal.Signals(-process.returncode).name}")
    return Outcome(False, "an exception, or it left before its end")
