"""`lownibble bench memory`: does a run stay within its memory budget, and how much of it does it use?

Training runs of the embedded model, each in its own process, over methods, batch sizes, lengths and budgets. A run's peak is the
higher of two: the resident set size sampled from outside a hundred times a second, and the kernel's high-water mark read inside.
Finally, a budget that is too small must be refused, and a run with the budget that the error message names must stay within it.
The rows are the demo's sentences, joined to texts of uneven length.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from lownibble.config import DataConfig
from lownibble.data import load as load_data
from lownibble.errors import ConfigError, TrainingError
from lownibble.options import n_bytes


class Case(NamedTuple):
    """One run: its budget and its command-line flags."""

    memory_budget: str
    flags: str


CASES = (
    Case("6GB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false"),
    Case("2GB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false"),
    Case("1.3GB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false"),
    Case("1.1GB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false"),
    Case("2.5GB", "--method qlora --batch-size 4 --max-length 512 --torch-compile true"),
    Case("1.2GB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false --packing"),
    Case("2.2GB", "--method qlora --batch-size 4 --max-length 512 --torch-compile true --packing"),
    Case("2GB", "--method lora --batch-size 16 --max-length 128 --torch-compile false"),
    Case("2.2GB", "--method lora --batch-size 8 --max-length 256 --torch-compile false --gradient-accumulation-steps 2"),
    Case("1.6GB", "--method lora --batch-size 8 --max-length 512 --torch-compile false --packing"),
    Case("3.2GB", "--method full --batch-size 8 --max-length 256 --torch-compile false"),
    Case("2.6GB", "--method full --batch-size 8 --max-length 256 --torch-compile false"),
)
TOO_SMALL = Case("900MB", "--method qlora --batch-size 8 --max-length 256 --torch-compile false")

STEPS, ROWS = 6, 400


def bench_memory(*, peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Run every case `repeats` times.

    Raises:
        ConfigError: `peers` is given; none of them has a memory budget.
        TrainingError: a run failed.
    """
    if peers:
        raise ConfigError("'bench memory' has no peers: none of them keeps to a memory budget. Leave --peers out.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "rows.jsonl")
        runs = [_run(case, folder) for case in CASES for _ in range(repeats)]
        refused = _refused(folder)
    gained = [run["share"] for run in runs if run["gave_up"]]
    within = sum(run["peak_bytes"] <= run["budget_bytes"] for run in runs)
    return {
        "workload": {"model": "demo", "rows": ROWS, "steps": STEPS},
        "runs": runs,
        "refused": refused,
        "headlines": {
            "runs within their budget": f"{within} of {len(runs)}",
            "highest share of the budget": max(run["share"] for run in runs),
            "lowest share where something was given up": min(gained),
            "planned to measured peak, worst error": max(abs(run["planned_error"]) for run in runs if run["gave_up"]),
            "too small a budget: refused, and the named one does": refused["the_named_budget_does"],
        },
    }


def _write_rows(path: Path) -> None:
    """Write `ROWS` texts of one to fourteen sentences as JSONL."""
    sentences = [str(row.fields["text"]) for row in load_data(DataConfig(max_rows=4000))[0].rows]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            file.write(json.dumps({"text": " ".join(draw.choices(sentences, k=draw.randint(1, 14)))}) + "\n")


def _run(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case; returns its budget, peak, plan and the configuration after fitting it to the memory budget."""
    code, output, errors, seen = _watched(case, folder)
    if code:
        raise TrainingError(f"'lownibble train {case.flags}' within {case.memory_budget} ended with exit code {code}: {errors}")
    record = json.loads(output)
    fit = record["memory"]["budget"]
    budget, peak = fit["budget_bytes"], max(seen, fit["highest_bytes"])
    train = record["config"]["train"]
    gave_up = (
        fit["max_tokens"] is not None or fit["paged"] or fit["gradient_checkpointing"] != train["gradient_checkpointing"]
    )  # fmt: skip
    found = {
        "flags": case.flags, "budget_bytes": budget, "peak_bytes": peak, "seen_from_outside_bytes": seen, "share": peak / budget,
        "gave_up": gave_up, "planned_bytes": fit["peak_bytes"], "planned_error": fit["peak_bytes"] / peak - 1,
        "max_tokens": fit["max_tokens"], "whole_tokens": fit["whole_tokens"], "paged": fit["paged"],
        "gradient_checkpointing": fit["gradient_checkpointing"], "tokens_per_s": record["speed"]["tokens_per_s"],
        "compile_peak_bytes": record["memory"]["compile_peak_bytes"],
        "warnings": record["warnings"],
    }  # fmt: skip
    print(f"bench memory: {case.memory_budget} {case.flags}: {peak / 1e9:.2f} GB, share {peak / budget:.3f}", file=sys.stderr)
    return found


def _refused(folder: Path) -> dict[str, Any]:
    """Run with a budget that is too small, then with the one that the error message names."""
    code, _, errors, _ = _watched(TOO_SMALL, folder)
    named = re.search(r"memory_budget='([^']+)'", errors)
    if code != 2 or not named:
        raise TrainingError(f"A budget of {TOO_SMALL.memory_budget} was not refused as it must be, but: {errors}")
    found = {"budget": TOO_SMALL.memory_budget, "message": errors.strip(), "named": named[1]}
    try:
        again = _run(TOO_SMALL._replace(memory_budget=named[1]), folder)
    except TrainingError as error:
        return {**found, "the_named_budget_does": False, "error": str(error)}
    return {**found, "the_named_budget_does": again["peak_bytes"] <= n_bytes(named[1]), "run": again}  # fmt: skip


def _watched(case: Case, folder: Path) -> tuple[int, str, str, int]:
    """Run a training process; returns (exit code, stdout, stderr, highest sampled resident set size in bytes)."""
    command = [
        sys.executable, "-m", "lownibble.cli.main", "train", "--json", "--data", str(folder / "rows.jsonl"), *case.flags.split(),
        "--memory-budget", case.memory_budget, "--max-steps", str(STEPS), "--max-eval-rows", "16",
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory(dir=folder) as output,
        (folder / "out").open("w+") as out,
        (folder / "err").open("w+") as err,
    ):
        process = psutil.Popen([*command, "--output", f"{output}/run"], stdout=out, stderr=err)
        most = 0
        while process.poll() is None:
            with suppress(psutil.Error):  # it may have ended meanwhile
                most = max(most, process.memory_info().rss)
            time.sleep(0.01)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read(), most
