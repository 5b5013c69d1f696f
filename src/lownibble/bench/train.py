"""`lownibble bench train`: the training step of LoRA and QLoRA, next to PEFT and PEFT + bitsandbytes.

Each contender lives in its own process (`contender.py`) and they take turns (`training/turns.py`). The first round warms up
and is not counted.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from lownibble.training.turns import TurnTaker, play, ratio, spread

OURS, PEERS = ("lora", "qlora"), ("peft_lora", "peft_bnb_qlora")
RATIOS = (("qlora", "lora"), ("lora", "peft_lora"), ("qlora", "peft_bnb_qlora"), ("qlora", "peft_lora"))


def bench_train(
    *, peers: bool = False, repeats: int = 5, steps: int = 2, batch_size: int = 4, length: int = 256
) -> dict[str, Any]:
    """Measure training steps of `batch_size` x `length` tokens, all of them labels, on the embedded model.

    Args:
        peers: measure PEFT and PEFT + bitsandbytes too (they must be installed).
        repeats: counted rounds, of `steps` steps a contender.
    Raises:
        TrainingError: a contender's process failed.
    """
    names = OURS + (PEERS if peers else ())
    tokens = batch_size * length * steps
    with ExitStack() as stack:
        takers = []
        for name in names:  # one after the other: a peer's load should not disturb another's memory figures
            takers.append(stack.enter_context(TurnTaker(name, "lownibble.bench.contender", name, str(batch_size), str(length))))
            takers[-1].ready()
            print(f"bench train: {name} is ready", file=sys.stderr)
        answers = play(takers, repeats, steps)
    rates = {name: [tokens / sum(answer["seconds"]) for answer in given[1:]] for name, given in answers.items()}
    ratios = {f"{a}_vs_{b}": ratio(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    figures = {}
    for taker in takers:
        train_peak = max(answer["train_peak_bytes"] for answer in answers[taker.name])
        figures[taker.name] = {
            "tokens_per_s": spread(rates[taker.name]),
            "peak_bytes": max(train_peak, taker.facts["load_peak_bytes"]),
            "train_peak_bytes": train_peak,
            **taker.facts,
            "losses": [loss for answer in answers[taker.name] for loss in answer["losses"]],
        }
    workload = {"model": "demo", "batch_size": batch_size, "length": length, "r": 16, "targets": "all-linear", "rounds": repeats}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n}: peak GiB": f["peak_bytes"] / 2**30 for n, f in figures.items()}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    return {"workload": {**workload, "steps_per_round": steps}, "contenders": figures, "ratios": ratios, "headlines": headlines}
