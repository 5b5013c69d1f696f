"""What a study has done for it, wherever that happens: a job is a dictionary that can be sent anywhere, and so is its record.

    {"job": "cell", ...}     one run of the study
    {"job": "speed", ...}    several methods taking turns

Each is a process of its own (`cell.py`). Whatever goes wrong there, `perform` returns a record: "failed", and the reason.
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
"""Of a failed process's messages, kept in its record."""

alive: set[subprocess.Popen[str]] = set()
"""Processes at work, for the one who must end them."""


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; returns its record."""
    return JOBS[job["job"]](job)


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return _run(job)
    except OSError as error:  # no process to be had, no room for its files
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
                with suppress(BrokenPipeError):  # it is gone already, which its exit code says
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


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"cell": _in_a_process, "speed": _in_a_process}
