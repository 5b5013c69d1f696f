"""`lownibble bench quality`: does QLoRA with int8 frozen-base matmuls learn as well as with exact ones?

The same run with both, for several seeds and one or two tasks: the embedded one and the rows of `data`. The seed sets the row
order and the adapter initialisation, so runs are paired by seed, and the mean difference is given with its standard error. The
reference is the seed noise of the exact run: `within` means that the mean difference is at most the standard deviation over
seeds, so that the choice of compute matters less than the seed; it does not show that there is no difference. A score over n rows
has a sampling error (0.016 for an accuracy of 0.5 over 1000 rows), so many rows are evaluated.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from lownibble.config import COMPARE_TRAIN, DataConfig, QuantConfig, RunConfig
from lownibble.data import load as load_data
from lownibble.errors import ConfigError
from lownibble.training import run

COMPUTES = ("exact", "int8")

HEADLINES = ("exact_mean", "exact_sd", "int8_mean", "difference_mean", "difference_se")

NLI = {"prompt_template": "{premise}\nClaim: {hypothesis}\nThe claim is a", "completion_template": " {label}"}
"""Templates for natural-language inference rows (premise, hypothesis, label)."""


def bench_quality(*, peers: bool = False, repeats: int = 3, data: str | None = None, max_eval_rows: int = 1000) -> dict[str, Any]:
    """Train the embedded model with exact and int8 compute.

    Args:
        peers: must be false.
        repeats: number of seeds; at least two.
        data: second task: labelled natural-language inference rows.
        max_eval_rows: evaluation rows per task.
    Raises:
        ConfigError: `peers` is given, or there are fewer than two seeds.
        BackendError: 8-bit products are not supported here.
    """
    if peers or repeats < 2:
        raise ConfigError(
            "'bench quality' compares Lownibble with itself over at least two seeds. Leave --peers out, --repeats 3."
        )
    if data:
        load_data(DataConfig(path=data, **NLI))  # report invalid rows before training
    tasks: dict[str, dict[str, Any]] = {}
    heads: set[str] = set()
    for name, path in (("demo", "demo"), *([(Path(data).name, data)] if data else [])):
        runs: dict[str, list[dict[str, float]]] = {compute: [] for compute in COMPUTES}
        for seed in range(repeats):
            for compute in COMPUTES:
                figures, head = _run(path, max_eval_rows, seed, compute)
                runs[compute].append(figures)
                if compute == "int8":
                    heads.add(head)
                print(f"bench quality: {name}, seed {seed}, {compute}: {runs[compute][-1]}", file=sys.stderr)
        tasks[name] = {"runs": runs, "figures": {figure: _compare(runs, figure) for figure in runs["exact"][0]}}
    headlines = {
        f"{task}: {name}, {what}": figure[what]
        for task, found in tasks.items() for name, figure in found["figures"].items()
        for what in HEADLINES
    }  # fmt: skip
    headlines["differences smaller than between seeds"] = str(
        all(f["within"] for found in tasks.values() for f in found["figures"].values())
    )
    workload = {
        "model": "demo", "seeds": repeats, "train": COMPARE_TRAIN.to_dict(), "max_eval_rows": max_eval_rows,
        "head": "/".join(sorted(heads)),
    }  # fmt: skip
    return {"workload": workload, "tasks": tasks, "headlines": headlines}


def _run(path: str, max_eval_rows: int, seed: int, compute: Any) -> tuple[dict[str, float], str]:
    """Train once; returns the final evaluation loss and scores, and the head's compute precision."""
    train = COMPARE_TRAIN.with_options(seed=seed, eval_steps=None, torch_compile=False)
    data = DataConfig(path=path, max_eval_rows=max_eval_rows, **({} if path == "demo" else NLI))
    result = run(RunConfig(method="qlora", data=data, quant=QuantConfig(compute=compute), train=train))
    last = result.record["evaluations"][-1]
    return {"loss": last["loss"], **last["scores"]}, result.record["model"]["head_compute"]


def _compare(runs: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    exact, int8 = ([found[name] for found in runs[compute]] for compute in COMPUTES)
    differences = [b - a for a, b in zip(exact, int8, strict=True)]
    mean, deviation = statistics.fmean(differences), statistics.stdev(exact)
    return {
        "exact_mean": statistics.fmean(exact), "exact_sd": deviation,
        "int8_mean": statistics.fmean(int8), "int8_sd": statistics.stdev(int8), "difference_mean": mean,
        "difference_se": statistics.stdev(differences) / len(differences) ** 0.5, "differences": differences,
        "within": abs(mean) <= deviation,
    }  # fmt: skip
