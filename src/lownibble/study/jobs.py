"""Jobs of a study: a job and its record are JSON-serialisable dictionaries, so that any executor can run it.

    {"job": "cell", ...}     one run of the study
    {"job": "speed", ...}    interleaved speed of several methods
    {"job": "base", ...}     packing of a base that runs share

Each runs in its own process (`cell.py`). If that fails in any way, `perform` returns a record with status "failed" and the error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lownibble.study.worker import how_it_ended

LOG_LINES = 20
"""Last lines of a failed process's output that are kept in its record."""

alive: set[subprocess.Popen[str]] = set()
"""Running processes, for the executor that must kill them."""


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; returns its record."""
    return JOBS[job["job"]](job)


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return _run(job)
    except OSError as error:  # the process cannot be started, or the disk is full
        return {"status": "failed", "error": f"The process could not be run: {error}"}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cell-") as folder:
        path, log = Path(folder) / "record.json", Path(folder) / "log"
        with log.open("w") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "lownibble.study.cell"], stdin=subprocess.PIPE, stdout=messages, stderr=messages,
                text=True, start_new_session=True,
            )  # fmt: skip
            alive.add(process)
            assert process.stdin is not None
            try:
                with suppress(BrokenPipeError):  # it has exited already: see its exit code
                    process.stdin.write(json.dumps({**job, "record": str(path)}) + "\n")
                    process.stdin.flush()
                code = process.wait()
            finally:
                process.kill()
                process.wait()
                with suppress(BrokenPipeError):
                    process.stdin.close()
                alive.discard(process)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
        else:
            found = {"status": "failed", "error": how_it_ended(code)}
        if found["status"] != "ok":
            found["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return found


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = dict.fromkeys(("cell", "speed", "base"), _in_a_process)
