"""`lownibble bench dropin`: the same TRL run on bitsandbytes' 4-bit layers and, one import changed, on Lownibble's.

All contenders are TRL's SFTTrainer with PEFT (`trl_run.py`), on the embedded model and its sentences as conversations, padded;
they take turns. TRL casts the adapters to bfloat16 on bitsandbytes' layers and leaves them in float32 on ours.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lownibble.config import DataConfig, RunConfig, TrainConfig
from lownibble.data import load as load_data
from lownibble.errors import ConfigError
from lownibble.measuring.turns import TurnTaker, play, ratio, spread

LAYERS = {"trl_lownibble": "lownibble", "trl_lownibble_int8": "lownibble-int8", "trl_bitsandbytes": "bitsandbytes"}
"""Contender -> LAYERS argument of `trl_run.py`."""
_STEPS = 5


def bench_dropin(*, peers: bool = False, repeats: int = 8) -> dict[str, Any]:
    """Measure tokens/s and peak memory of each contender.

    Args:
        peers: must be true: the comparison needs bitsandbytes, PEFT and TRL.
        repeats: counted rounds.
    Raises:
        ConfigError: without peers.
        TrainingError: a contender's process failed.
    """
    if not peers:
        raise ConfigError("'bench dropin' compares peers with one import changed. Give --peers, with TRL, PEFT and bitsandbytes.")
    with tempfile.TemporaryDirectory(prefix="lownibble-dropin-") as folder, ExitStack() as stack:
        spec = Path(folder) / "spec.json"
        config = RunConfig(data=_conversations(Path(folder)), train=TrainConfig(batch_size=8, max_length=256))
        spec.write_text(json.dumps(config.to_dict()))
        takers = [
            stack.enter_context(TurnTaker(name, "lownibble.bench.trl_run", str(spec), "padded", layers))
            for name, layers in LAYERS.items()
        ]
        for taker in takers:
            taker.ready()
        answers = play(takers, repeats, _STEPS)
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in answers.items()}
    figures = {
        name: {"tokens_per_s": spread(rates[name]), "peak_bytes": max(a["peak_bytes"] for a in answers[name])} for name in LAYERS
    }
    other = rates["trl_bitsandbytes"]
    ratios = {f"{name}_vs_trl_bitsandbytes": ratio(found, other) for name, found in rates.items() if found is not other}
    headlines = {f"{name}: tokens/s": found["tokens_per_s"]["median"] for name, found in figures.items()}
    headlines |= {f"{name} (tokens/s)": found["median"] for name, found in ratios.items()}
    work = {
        "model": "demo", "batch_size": 8, "length": 256, "r": config.lora.r, "targets": "all-linear", "rounds": repeats,
        "steps_a_turn": _STEPS,
    }  # fmt: skip
    return {"workload": work, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _conversations(folder: Path) -> DataConfig:
    """Write the embedded sentences as user and assistant turns to a JSONL file; returns its data configuration."""
    rows = load_data(DataConfig(max_rows=2000))[0].rows
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            asked = {"role": "user", "content": f"Is this positive or negative? {row.fields['text']}"}
            file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": row.fields["label"]}]}) + "\n")
    return DataConfig(path=str(path))
