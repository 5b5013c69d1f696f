"""Jobs of a study: a job and its record are JSON-serialisable dictionaries, so that any executor can run it.

    {"job": "cell", ...}     one run of the study
    {"job": "speed", ...}    interleaved speed of several methods
    {"job": "base", ...}     packing of a base that runs share

Each runs in its own process (`cell.py`), a cell with `ranks` in so many. `devices`: the CUDA devices that they see, given by the
executor. If a job fails in any way, `perform` returns a record with status "failed" and the error.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lownibble.study.processes import run_module, why_failed

LOG_LINES = 20
"""Last lines of a failed process's output that are kept in its record."""


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; returns its record."""
    return JOBS[job["job"]](job)


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return _run(job)
    except OSError as error:  # the process cannot be started, or the disk is full
        return {"status": "failed", "error": f"The process could not be run: {error}"}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    ranks = job.get("ranks", 1)
    with tempfile.TemporaryDirectory(prefix="cell-") as folder:
        log, paths = Path(folder) / "log", [Path(folder) / f"record-{rank}.json" for rank in range(ranks)]
        began = time.monotonic()
        with log.open("w") as messages:
            codes = run_module(
                "lownibble.study.cell", ranks=ranks, devices=job.get("devices"), output=messages,
                line=lambda rank: json.dumps({**job, "record": str(paths[rank])}),
            )  # fmt: skip
        left: dict[int, dict[str, Any]] = {r: json.loads(path.read_text()) for r, path in enumerate(paths) if path.exists()}
        found = left.get(0, {"status": "failed"})
        if "measured" in found:
            found["measured"]["seconds"] = time.monotonic() - began  # the process's start and end, too
        if found["status"] != "ok":
            errors = {rank: record["error"] for rank, record in left.items() if record["status"] != "ok"}
            found = {**found, "error": why_failed(codes, errors, ranks)}
            found["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return found


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = dict.fromkeys(("cell", "speed", "base"), _in_a_process)
