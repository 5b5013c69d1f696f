"""`lownibble bench preference`: steps of DPO, ORPO and KTO next to TRL's trainers, on the embedded model.

Rows are made of sentences of the embedded data: two of them as the prompt, two more as the chosen answer and two others as the
rejected one, about 130 tokens; KTO gets their answers labelled. Contenders of an objective take turns (`processes.py`): ours,
compiled as a run of some length is, with the reference's log-probabilities computed before; TRL's defaults, which compute them in
each step; and TRL with precompute_ref_log_probs. What is computed before the first step is not timed. All have the same rows in
the same order, and no row twice: rates are in rows/s, so a step of longer rows must be one for all. `first_losses` shows that
they are: at its first step each is the same model (ORPO's loss depends on the rows; DPO's is log 2 and KTO's 1/2). TRL's ORPO
begins each prompt with the tokenizer's bos token, which this tokenizer itself does not, so its first loss is another one.
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

OBJECTIVES: tuple[Literal["dpo", "orpo", "kto"], ...] = ("dpo", "orpo", "kto")
METHODS: tuple[Literal["lora", "qlora"], ...] = ("lora", "qlora")
BATCH = 2
"""Rows in a step; of dpo and orpo each is two sequences."""
LENGTH = 256
TRL = "lownibble.bench.trl_preference"


def rows(objective: str, count: int) -> list[dict[str, Any]]:
    """Rows of `count` pairs for an objective, with TRL's column names; of kto, two for each."""
    side = load_data(DataConfig(max_rows=6 * count))[0]
    sentences = [str(row.fields["text"]).strip() for row in side.rows]
    found: list[dict[str, Any]] = []
    for first in range(0, 6 * count, 6):
        prompt, chosen, rejected = (" ".join(sentences[first + n : first + n + 2]) for n in (0, 2, 4))
        if objective == "kto":
            found += [
                {"prompt": prompt, "completion": f" {text}", "label": good} for text, good in ((chosen, True), (rejected, False))
            ]
        else:
            found.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return found


def bench_preference(*, peers: bool = False, repeats: int = 3, model: str = "demo") -> dict[str, Any]:
    """Measure steps of each objective with each method.

    Args:
        peers: measure TRL too; one that fails, or is not installed, is left out and named.
        repeats: counted rounds of one step. model: what to train.
    Raises:
        TrainingError: a contender of ours failed.
    """
    measured: dict[str, Any] = {}
    failed: dict[str, str] = {}
    steps = 1 + repeats
    with TemporaryDirectory(prefix="lownibble-preference-") as name:
        for objective in OBJECTIVES:
            folder = Path(name) / objective
            folder.mkdir()
            lines = [json.dumps(row) + "\n" for row in rows(objective, BATCH * steps)]
            (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / "test.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
            for method in METHODS:
                config = RunConfig(
                    model=model, method=method, data=DataConfig(path=str(folder)), lora=LoraConfig(r=16),
                    quant=QuantConfig(compute="exact"),
                    train=TrainConfig(
                        objective=objective, batch_size=BATCH, max_length=LENGTH, max_steps=steps, learning_rate=1e-5,
                        torch_compile=True,
                    ),
                )  # fmt: skip
                spec = folder / f"{method}.json"
                spec.write_text(json.dumps(config.to_dict()))
                commands = {"ours": Command("lownibble.measuring.turns", (str(spec),))}
                if peers:
                    commands["trl"] = Command(TRL, (str(spec),), may_fail=True)
                    if objective != "orpo":  # which has no reference
                        commands["trl_precomputed"] = Command(TRL, (str(spec), "precomputed"), may_fail=True)
                found = in_turns(commands, repeats, 1)
                failed |= {f"{objective} {method}, {contender}": why for contender, why in found.failed.items()}
                measured[f"{objective} {method}"] = _figures(found.answers)
    headlines = {f"{name}: rows/s, ours": figures["rows_per_s"]["ours"]["median"] for name, figures in measured.items()}
    headlines |= {
        f"{name}: ours / {peer} (rows/s)": found["median"]
        for name, figures in measured.items() for peer, found in figures["ratios"].items()
    }  # fmt: skip
    workload = {"model": model, "batch_size": BATCH, "max_length": LENGTH, "r": 16, "targets": "all-linear", "rounds": repeats}
    return {"workload": workload, "objectives": measured, "failed": failed, "headlines": headlines}


def _figures(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows/s, peak bytes and first loss of each contender, and ratios of our rows/s to the others'."""
    rates = {name: [BATCH / answer["seconds"] for answer in given[1:]] for name, given in answers.items()}
    return {
        "rows_per_s": {name: spread(each) for name, each in rates.items()},
        "peak_bytes": {name: max(answer["peak_bytes"] for answer in given) for name, given in answers.items()},
        "first_losses": {name: given[0]["losses"][0] for name, given in answers.items()},
        "ratios": {name: ratio(rates["ours"], each) for name, each in rates.items() if name != "ours"},
    }
