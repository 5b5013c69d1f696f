"""`lownibble bench preference`: steps of DPO, ORPO and KTO next to TRL's trainers, on the embedded model.

Rows are made of sentences of the embedded data: two of them as the prompt, two more as the chosen answer and two others as the
rejected one, about 130 tokens; KTO gets their answers labelled. Contenders of an objective take turns (`processes.py`): ours,
with the reference's log-probabilities computed before; TRL's defaults, which compute them in each step; and TRL with
precompute_ref_log_probs. What is computed before the first step is not timed. Ratios are of rows/s within a round.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lownibble.bench.processes import Command, in_turns
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import load as load_data
from lownibble.measuring.turns import ratio, spread

OBJECTIVES = ("dpo", "orpo", "kto")
METHODS: tuple[Literal["lora", "qlora"], ...] = ("lora", "qlora")
COUNT = 32
"""Rows of pairs."""
MODEL = "demo"


def rows(objective: str) -> list[dict[str, Any]]:
    """Rows for an objective, with TRL's column names."""
    sides = load_data(DataConfig(max_rows=6 * COUNT))
    sentences = [str(row.fields["text"]).strip() for row in sides[0].rows]
    found: list[dict[str, Any]] = []
    for first in range(0, 6 * COUNT, 6):
        prompt, chosen, rejected = (" ".join(sentences[first + n : first + n + 2]) for n in (0, 2, 4))
        if objective == "kto":
            found += [
                {"prompt": prompt, "completion": f" {text}", "label": good} for text, good in ((chosen, True), (rejected, False))
            ]
        else:
            found.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return found


def bench_preference(*, peers: bool = False, repeats: int = 3, model: str = "") -> dict[str, Any]:
    """Measure steps of each objective with each method.

    Args:
        peers: measure TRL too, which must be installed.
        repeats: counted rounds of one step. model: default: the embedded one.
    Raises:
        TrainingError: a contender of ours failed.
    """
    measured: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as name:
        for objective in OBJECTIVES:
            folder = Path(name) / objective
            folder.mkdir()
            for side in ("train", "test"):
                (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(objective)))
            for method in METHODS:
                config = RunConfig(
                    model=model or MODEL, method=method, data=DataConfig(path=str(folder), max_eval_rows=2),
                    lora=LoraConfig(r=16), quant=QuantConfig(compute="exact"),
                    train=TrainConfig(
                        objective=objective, batch_size=2, max_length=256, max_steps=repeats + 1, learning_rate=1e-5,
                    ),
                )  # fmt: skip
                spec = folder / f"{method}.json"
                spec.write_text(json.dumps(config.to_dict()))
                commands = {"ours": Command("lownibble.measuring.turns", (str(spec),))}
                if peers:
                    module = "lownibble.bench.trl_preference"
                    commands["trl"] = Command(module, (str(spec),), may_fail=True)
                    if objective != "orpo":
                        commands["trl_precomputed"] = Command(module, (str(spec), "precomputed"), may_fail=True)
                found = in_turns(commands, repeats, 1)
                failed |= {f"{objective} {method} {contender}": why for contender, why in found.failed.items()}
                measured[f"{objective} {method}"] = _figures(found.answers)
    headlines = {f"{name}: rows/s, ours": figures["rows_per_s"]["ours"]["median"] for name, figures in measured.items()}
    headlines |= {
        f"{name}: ours / {peer} (rows/s)": figures["ratios"][peer]["median"]
        for name, figures in measured.items() for peer in figures["ratios"]
    }  # fmt: skip
    workload = {"model": model or MODEL, "rows": COUNT, "batch_size": 2, "max_length": 256, "r": 16, "rounds": repeats}
    return {"workload": workload, "objectives": measured, "failed": failed, "headlines": headlines}


def _figures(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows/s and peak bytes of each contender, and ratios of ours to the others'. A step of ours has as many rows as TRL's."""
    n_rows = next((given[0]["rows"] for given in answers.values() if "rows" in given[0]), 2)
    rates = {name: [n_rows / answer["seconds"] for answer in given[1:]] for name, given in answers.items()}
    return {
        "rows_per_s": {name: spread(each) for name, each in rates.items()},
        "peak_bytes": {name: max(answer["peak_bytes"] for answer in given) for name, given in answers.items()},
        "ratios": {name: ratio(rates["ours"], each) for name, each in rates.items() if name != "ours"},
    }
