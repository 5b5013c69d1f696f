"""One run in a separate process: `python -m lownibble.study.worker SPEC.json`.

A process per run keeps memory figures separate and turns any failure, even a kill by the system, into a recorded result. The
specification is a `RunConfig`; the record is written to its output folder, that of a failed rank beside the specification
(`failure_file`). Exit code 0 if the run succeeded, 1 if it failed and a record says why, 130 if it was interrupted. The process
ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lownibble import launch
from lownibble.config import RunConfig
from lownibble.study.processes import end_with_standard_input


def main(spec: str) -> int:
    """Run the specification in the file `spec`; returns the exit code."""
    config = RunConfig(**json.loads(Path(spec).read_text()))
    end_with_standard_input()
    from lownibble import record
    from lownibble.memory.usage import kept_heap
    from lownibble.training import ProgressSink, run

    try:
        with kept_heap():
            run(config, sinks=[ProgressSink(config.method)])
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # every failure becomes a record; the parent reports it and continues
        failure = failed(config, f"{type(error).__name__}: {error}")
        failure["environment"] = record.environment()
        record.write(failure_file(spec, launch.rank()), failure)
        if launch.should_tell(str(error)):
            print(f"{config.method}: failed: {error}", file=sys.stderr)
        return 1
    return 0


def failure_file(spec: str | Path, rank: int) -> Path:
    """Where a rank that failed leaves its record."""
    return Path(spec).with_name(f"failed-{rank}.json")


def failed(config: RunConfig, error: str) -> dict[str, Any]:
    """The record of a run that failed."""
    from lownibble import record

    return {**record.new("train"), "status": "failed", "error": error, "config": config.to_dict()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
