"""`lownibble bench gpu`: everything worth measuring on a CUDA device in one run of limited time (`make gpu`).

Parts run in the order of what they are worth, each in a process of its own: first whether what runs on CUDA only computes what
it should (`contact.py`), then training step, kernels, plan against measured, decoding, the tests marked `gpu`. A part may take
what is left of the time, less a share kept for each part after it, so that slow peers cannot use all of it. Checks, training,
decoding and plans save their records as they go; a part that runs out of time, or fails, leaves what it had measured, and the
next one starts. Random weights are made once, for all parts.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from lownibble import record
from lownibble.bench.contact import TIME_LIMIT_S as CONTACT_S
from lownibble.bench.processes import end
from lownibble.bench.subject import subject
from lownibble.errors import ConfigError
from lownibble.models import pick_device

MODEL, TIME_LIMIT_S = "llama-3-8b", 480
GRACE_S = 30.0
"""Seconds beyond its own time limit after which the first part is ended."""
LEAST_S = 5.0
"""A part is not begun with less time than this."""
_OUTCOME = re.compile(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


class Part(NamedTuple):
    """A part: its command, the record that it writes, and the share of the whole time kept for it."""

    name: str
    command: list[str]
    output: Path
    share: float


def bench_gpu(
    *, peers: bool = False, repeats: int | None = None, output: str = "benchmarks/results", time_limit: float = TIME_LIMIT_S,
    model: str = MODEL, batch_size: int = 4, length: int = 1024,
) -> dict[str, Any]:  # fmt: skip
    """Measure a CUDA device.

    Args:
        peers: measure the installed peers, too.
        repeats: counted rounds of the parts that have rounds; None: their own defaults.
        output: folder of the records: `{contact,train,kernels,plan,decode,gpu-tests}-cuda.json`, and of what this returns,
            `parts-cuda.json`.
        time_limit: seconds for all parts together, making the weights included.
        model: what to train, plan and decode with; see `subject.py`.
        batch_size, length: rows and tokens per row of a training step.
    Returns:
        what became of each part (`run_parts`); `status` is failed if one did, not if the time was up.
    Raises:
        ConfigError: there is no CUDA device, or no room for the weights.
    """
    if pick_device().type != "cuda":
        raise ConfigError(
            "'bench gpu' measures a CUDA device, and torch sees none. Run it on a machine with one; 'bench train' measures a CPU."
        )
    until, folder = time.monotonic() + time_limit, Path(output)
    outcomes = run_parts([contact_part(folder, time_limit)], time.monotonic() + min(time_limit, CONTACT_S + GRACE_S), time_limit)
    with subject(model) as found:
        work = ["--batch-size", str(batch_size), "--max-length", str(length)]
        asked = ["--peers"] * peers + (["--repeats", str(repeats)] if repeats else [])
        parts = parts_of(str(found.folder), folder, work, asked)
        outcomes |= run_parts(parts, until, max(0.0, until - time.monotonic()))
    headlines = {name: f"{each['status']}, {each['seconds']:.0f} s" for name, each in outcomes.items()}
    workload = {"model": found.name, "random_weights": found.random, "time_limit_s": time_limit, "peers": peers}
    status = "failed" if any(each["status"] == "failed" for each in outcomes.values()) else "ok"
    told = {"status": status, "workload": workload, "parts": outcomes, "headlines": headlines}
    environment = record.environment(pick_device())
    record.write(folder / "parts-cuda.json", {**record.new("bench-gpu"), "environment": environment, **told})
    return told


def contact_part(folder: Path, time_limit: float) -> Part:
    """The first part, which needs no weights; it keeps to its time by itself."""
    output = folder / "contact-cuda.json"
    seconds = max(1, int(min(CONTACT_S, time_limit / 4)))
    command = [sys.executable, "-m", "lownibble", "bench", "contact", "--time-limit", str(seconds)]
    return Part("contact", [*command, "--json", "--output", str(output)], output, 1.0)


def parts_of(model: str, folder: Path, work: list[str], asked: list[str]) -> list[Part]:
    """The parts that measure, in order; tests only where the working folder has them and pytest is installed."""
    bench, of_model = [sys.executable, "-m", "lownibble", "bench"], ["--model", model]
    commands = (
        ("train", [*bench, "train", *of_model, *work, *asked], 0.5),
        ("kernels", [*bench, "kernels", *asked], 0.1),
        ("plan", [*bench, "plan", *of_model, *work], 0.1),
        ("decode", [*bench, "decode", *of_model, *asked], 0.2),
    )
    parts = [
        Part(name, [*command, "--json", "--output", str(folder / f"{name}-cuda.json")], folder / f"{name}-cuda.json", share)
        for name, command, share in commands
    ]
    if Path("tests").is_dir() and importlib.util.find_spec("pytest"):
        output = folder / "gpu-tests-cuda.json"
        parts.append(Part("gpu-tests", [sys.executable, "-m", "lownibble.bench.gpu", str(output)], output, 0.1))
    return parts


def run_parts(parts: list[Part], until: float, total_s: float) -> dict[str, dict[str, Any]]:
    """Run the parts one after another until that time (`time.monotonic`); returns name -> outcome.

    An outcome has `status` (ok, failed, out of time, not begun), `seconds`, `record` (its path, None if the part wrote none) and,
    if it failed, `error`.
    """
    outcomes = {}
    for number, part in enumerate(parts):
        kept = total_s * sum(later.share for later in parts[number + 1 :])
        left = until - time.monotonic()
        seconds = max(left - kept, min(left, total_s * part.share))
        if seconds < LEAST_S:
            outcomes[part.name] = {"status": "not begun", "seconds": 0.0, "record": None}
        else:
            outcomes[part.name] = _run(part, seconds)
        print(f"bench gpu: {part.name}: {outcomes[part.name]['status']}", file=sys.stderr)
    return outcomes


def _run(part: Part, seconds: float) -> dict[str, Any]:
    before, began = _stamp(part.output), time.monotonic()
    # a file, not a pipe, which whatever outlives the part (compile workers have sessions of their own) would keep open
    with tempfile.TemporaryFile("w+") as answer:
        process = subprocess.Popen(part.command, stdout=answer, start_new_session=True)
        try:
            status = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
        answer.seek(0)
        told = answer.read()
    written = str(part.output) if _stamp(part.output) != before else None
    found: dict[str, Any] = {"status": status, "seconds": time.monotonic() - began, "record": written}
    return {**found, "error": _error(told, process.returncode)} if status == "failed" else found


def _error(told: str, code: int) -> str:
    """The error in a command's JSON document, if it ended with one."""
    try:
        return str(json.loads(told)["error"])
    except (ValueError, KeyError, TypeError):
        return f"It ended with exit code {code}. Its messages are above."


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a record is written anew."""
    found = path.stat() if path.exists() else None
    return found and (found.st_ino, found.st_mtime_ns)


def gpu_tests(tests: Path) -> list[str]:
    """The test files with the mark `gpu`, and the folders whose conftest sets it, relative to the folder that holds `tests`.

    Others may need what a machine with a card lacks, and a file that cannot be imported is an error of the whole run.
    """
    marked = {path for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")}
    by_folder = {path.parent for path in tests.rglob("conftest.py") if "mark.gpu" in path.read_text(encoding="utf-8")}
    rest = {path for path in marked if path.parent not in by_folder}
    return sorted(str(path.relative_to(tests.parent)) for path in by_folder - {tests} | rest)


def run_tests(output: str) -> int:
    """Run the tests marked `gpu` of the working folder, and write their record after each; returns pytest's exit code.

    Its own process, so that it can be ended: what had run by then is in the record.
    """
    options = ["-m", "gpu", "-vv", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *gpu_tests(Path("tests")), *options]
    base = {**record.new("bench-gpu-tests"), "environment": record.environment(pick_device())}
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if _OUTCOME.match(line):
                record.write(output, {**base, "status": "partial", **_outcomes(lines)})
        code = process.wait()
    record.write(output, {**base, "status": "ok" if code == 0 else "failed", **_outcomes(lines), "tail": "".join(lines)[-4000:]})
    print("".join(lines[-20:]), file=sys.stderr)
    return code


def _outcomes(lines: list[str]) -> dict[str, Any]:
    """Tests by outcome, and the names of those that failed, from pytest's lines."""
    found = [(match[1], match[2].lower()) for line in lines if (match := _OUTCOME.match(line))]
    return {
        "tests": dict(Counter(outcome for _, outcome in found)),
        "failed": [name for name, outcome in found if outcome in ("failed", "error")],
    }


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1]))
