"""`lownibble bench parallel`: training of the embedded model on two ranks of this machine (gloo), on a CPU.

Weak scaling: two ranks, one thread each, that train one run, against two processes that train a run each with half of its batch,
at the same time. Both have the machine's processors to the same degree (two threads of one core, mostly), so the ratio of the
steps' times is what the ranks cost: waiting for each other, and adding up. In turns, medians of each.

Memory with FSDP2: bytes of tensors that each rank holds against those of the plan, and the peak of loading above the process's
start against the rank's shards and one decoder layer as it comes from the file.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lownibble import record
from lownibble.errors import ConfigError, TrainingError

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
    worst = max((abs(each["error"]) for found in memory.values() for each in found["held"]), default=0.0)
    return {
        **record.new("bench-parallel"), "status": "ok", "environment": record.environment(), "ranks": RANKS,
        "work": {"model": "demo", "rows_of_a_rank": BATCH, "max_length": LENGTH, "steps": STEPS},
        "weak_scaling": scaling, "fsdp_memory": memory,
        "headlines": {
            "weak scaling of ddp, two ranks": f"{ratio:.2f}", "fsdp: held against planned, at worst": f"{worst:.2%}",
        },
    }  # fmt: skip


def _scaling(folder: Path, repeats: int) -> dict[str, Any]:
    alone, together = [], []
    for turn in range(repeats):
        apart = [_start(folder / f"alone-{turn}-{rank}", BATCH, []) for rank in range(RANKS)]
        alone.append(statistics.mean(_step_s(process) for process in apart))
        ranks = _ranks(folder / f"ranks-{turn}", ["--parallel", "ddp"])
        together.append(_step_s(ranks[0]))
        _step_s(ranks[1], silent=True)
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return {
        "alone_s": alone, "ranks_s": together,
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }  # fmt: skip


def _memory(folder: Path, method: str) -> dict[str, Any]:
    first, second = _ranks(folder / f"fsdp-{method}", ["--parallel", "fsdp", "--method", method])
    found = _answer(first)
    _step_s(second, silent=True)
    planned = found["memory"]["planned"]["plan"]["kinds"]
    expected = sum(planned[kind] for kind in KINDS)
    held = []
    for rank, memory in enumerate(found["parallel"]["memory"]):
        n_bytes = sum(memory[f"{kind}_bytes"] for kind in KINDS)
        held.append({
            "rank": rank, "held_bytes": n_bytes, "planned_bytes": expected, "error": n_bytes / expected - 1,
            "load_peak_bytes": memory["load_peak_bytes"],
        })  # fmt: skip
    return {"method": method, "planned_kinds": planned, "held": held}


def _flags(output: Path, batch: int, extra: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "lownibble", "train", "--model", "demo", "--data", "demo", "--device", "cpu", "--batch-size",
        str(batch), "--max-length", str(LENGTH), "--max-steps", str(STEPS), "--packing", "--torch-compile", "false",
        "--max-eval-rows", "8", "--output", str(output), "--json", *extra,
    ]  # fmt: skip


def _start(output: Path, batch: int, extra: Sequence[str], **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        _flags(output, batch, extra), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _ranks(output: Path, extra: Sequence[str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    return [
        _start(output, RANKS * BATCH, extra, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(RANKS)
    ]  # fmt: skip


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate()
    if process.returncode:
        raise TrainingError(f"A run of the benchmark failed: {errors[-500:]}")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {}
    return answer


def _step_s(process: subprocess.Popen[str], *, silent: bool = False) -> float:
    """Median seconds of a step, without the first two; `silent`: of a rank that prints none."""
    answer = _answer(process)
    return 0.0 if silent else statistics.median(step["seconds"] for step in answer["steps"][2:])
