"""`lownibble bench paging`: the cost of keeping only a tenth of AdamW's states in memory, and whether training is bit-identical.

Full fine-tuning of the embedded model and LoRA, each with all optimiser states in memory and with a page budget of a tenth of
them, each in its own process, taking turns on the same packs. After each turn a SHA-256 digest of all trained parameters is
compared, so a single differing bit shows. Runs are not compiled: compilation would affect all four alike.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lownibble.config import DataConfig, LoraConfig, Method, RunConfig, TrainConfig
from lownibble.errors import ConfigError, TrainingError
from lownibble.measuring.turns import TurnTaker, play, ratio, spread

METHODS: tuple[Method, ...] = ("full", "lora")
BATCH_SIZE, LENGTH, SHARE = 4, 256, 10


def bench_paging(*, peers: bool = False, repeats: int = 5) -> dict[str, Any]:
    """Take turns for `repeats` rounds of one step.

    Raises:
        ConfigError: `peers` is given; bitsandbytes pages on CUDA only.
        TrainingError: a process ended early, or a turn changed no parameter.
    """
    if peers:
        raise ConfigError("'bench paging' has no peers here: bitsandbytes pages on CUDA only. Leave --peers out.")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        takers: dict[str, TurnTaker] = {}
        state_bytes: dict[str, int] = {}
        for method in METHODS:
            plain = takers[method] = stack.enter_context(_taker(method, folder, {}))
            plain.ready()
            state_bytes[method] = 2 * 4 * int(plain.facts["trainable_parameters"])
            budget = state_bytes[method] // SHARE
            name = f"{method}_paged"
            takers[name] = stack.enter_context(_taker(name, folder, {"optim": "paged_adamw", "optim_page_budget": f"{budget}B"}))
            takers[name].ready()
        answers = play(list(takers.values()), repeats, 1)
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in answers.items()}
    digests = {name: [a["digest"] for a in given] for name, given in answers.items()}
    same = {method: digests[method] == digests[f"{method}_paged"] for method in METHODS}
    if not all(len(set(of)) == len(of) for of in digests.values()):
        raise TrainingError("A turn trained nothing, so that equal parameters prove nothing.")
    ratios = {f"{method}_paged_vs_{method}": ratio(rates[f"{method}_paged"], rates[method]) for method in METHODS}
    return {
        "workload": {"model": "demo", "batch_size": BATCH_SIZE, "length": LENGTH, "rounds": repeats, "page_budget": f"1/{SHARE}"},
        "contenders": {
            name: {"tokens_per_s": spread(rates[name]), "peak_bytes": max(a["peak_bytes"] for a in given)}
            for name, given in answers.items()
        },
        "ratios": ratios,
        "state_bytes": state_bytes,
        "same_bits": same,
        "headlines": {
            **{f"{name.replace('_vs_', ' / ')}, tokens/s": found["median"] for name, found in ratios.items()},
            **{f"{method}: same bits after {repeats + 1} steps": str(equal) for method, equal in same.items()},
        },
    }  # fmt: skip


def _taker(name: str, folder: Path, options: dict[str, Any]) -> TurnTaker:
    """Start a run; the method is `name` without a `_paged` suffix."""
    train = TrainConfig(
        batch_size=BATCH_SIZE, max_length=LENGTH, packing=True, max_steps=1000, torch_compile=False, learning_rate=1e-4, **options
    )  # fmt: skip
    run = RunConfig(
        method=name.removesuffix("_paged"), data=DataConfig(mask_prompt=False, max_eval_rows=8), lora=LoraConfig(), train=train
    )  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(run.to_dict()))
    return TurnTaker(name, "lownibble.measuring.turns", str(path))
