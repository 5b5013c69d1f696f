"""`lownibble bench parallel`: training of the embedded model on two ranks of this machine (gloo), on a CPU.

Weak scaling: two ranks, one thread each, that train one run, against two processes that train a run each with half of its batch,
at the same time. Both have the machine's processors to the same degree (two threads of one core, mostly), so the ratio of the
steps' times is what the ranks cost: waiting for each other, and adding up. In turns, medians of each.

Memory with FSDP2: bytes of tensors that each rank holds against those of the plan, and the peak of loading above what the process
held before, against the rank's shards and the largest group whole: a decoder layer, or embeddings, norm and head.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lownibble import record
from lownibble.errors import ConfigError, TrainingError
from lownibble.study.processes import run_module

MODEL = DATA = "demo"
BATCH, LENGTH, STEPS, RANKS = 4, 128, 8, 2
KINDS = ("weights", "codes", "constants", "adapters", "optimizer")
"""Kinds of bytes that a rank holds between steps."""


def bench_parallel(*, peers: bool = False, repeats: int = 3) -> dict[str, Any]:
    """Measure both; `repeats`: rounds of the weak scaling.

    Raises:
        ConfigError: `peers` is given: none of them shards these weights on a CPU.
        TrainingError: a run failed.
    """
    if peers:
        raise ConfigError("'bench parallel' has no peers: they do not shard 4-bit weights on a CPU. Leave --peers out.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scaling = _scaling(folder, repeats)
        memory = {method: _memory(folder, method) for method in ("qlora", "lora")}
    ratio = scaling["ratio"]["median"]
    loading = max(each["load_peak_bytes"] / each["load_bound_bytes"] for found in memory.values() for each in found["held"])
    worst = max((abs(each["error"]) for found in memory.values() for each in found["held"]), default=0.0)
    return {
        **record.new("bench-parallel"), "status": "ok", "environment": record.environment(), "ranks": RANKS,
        "work": {"model": MODEL, "rows_of_a_rank": BATCH, "max_length": LENGTH, "steps": STEPS},
        "weak_scaling": scaling, "fsdp_memory": memory,
        "headlines": {
            "weak scaling of ddp, two ranks": f"{ratio:.2f}", "fsdp: held against planned, at worst": f"{worst:.2%}",
            "fsdp: peak of loading, imports included, against shards and the largest group, at worst": f"{loading:.2f}",
        },
    }  # fmt: skip


def _scaling(folder: Path, repeats: int) -> dict[str, Any]:
    alone, together = [], []
    for turn in range(repeats):
        apart = [folder / f"alone-{turn}-{number}" for number in range(RANKS)]
        with ThreadPoolExecutor(RANKS) as pool:
            alone.append(statistics.mean(map(_step_s, pool.map(_train, apart))))
        together.append(_step_s(_train(folder / f"ranks-{turn}", "--parallel", "ddp", ranks=RANKS)))
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return {
        "alone_s": alone, "ranks_s": together,
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }  # fmt: skip


def _memory(folder: Path, method: str) -> dict[str, Any]:
    found = _train(folder / f"fsdp-{method}", "--parallel", "fsdp", "--method", method, ranks=RANKS)
    planned = found["memory"]["planned"]["plan"]["kinds"]
    expected = sum(planned[kind] for kind in KINDS)
    held = []
    for rank, memory in enumerate(found["parallel"]["memory"]):
        n_bytes = sum(memory[f"{kind}_bytes"] for kind in KINDS)
        bound = n_bytes - memory["optimizer_bytes"] + memory["largest_group_bytes"]
        held.append({
            "rank": rank, "held_bytes": n_bytes, "planned_bytes": expected, "error": n_bytes / expected - 1,
            "load_peak_bytes": memory["load_peak_bytes"], "load_bound_bytes": bound,
        })  # fmt: skip
    return {"method": method, "planned_kinds": planned, "held": held}


def _train(output: Path, *extra: str, ranks: int = 1) -> dict[str, Any]:
    """The record of a run, with `BATCH` packs for each rank."""
    flags = [
        "train", "--model", MODEL, "--data", DATA, "--device", "cpu", "--batch-size", str(ranks * BATCH), "--max-length",
        str(LENGTH), "--max-steps", str(STEPS), "--packing", "--torch-compile", "false", "--max-eval-rows", "8", "--output",
        str(output), *extra,
    ]  # fmt: skip
    with output.with_suffix(".txt").open("w+") as messages:
        codes = run_module("lownibble", *flags, ranks=ranks, threads=1, output=messages)
        if len(codes) < ranks or any(codes.values()):
            messages.seek(0)
            raise TrainingError(f"A run of the benchmark failed: {messages.read()[-500:]}")
    found: dict[str, Any] = json.loads((output / "record.json").read_text())
    return found


def _step_s(run: dict[str, Any]) -> float:
    """Median seconds of a step, without the first two."""
    return float(statistics.median(step["seconds"] for step in run["steps"][2:]))
