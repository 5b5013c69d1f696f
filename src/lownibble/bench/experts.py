"""`lownibble bench experts`: the QLoRA step of a mixture of experts next to PEFT's, and against the number of active experts.

The mixture is random, of Qwen3-MoE's shape, with about 1B parameters and 8 of 64 experts active. Adapters of rank 16 are on
attention and on every expert's weights (PEFT's `target_parameters`). PEFT keeps the experts dense, in float32 and in bfloat16:
bitsandbytes leaves fused experts as they are, so there is no 4-bit peer. It materialises W + scale B A of all experts of a layer
in each pass, whichever are active. Ours computes in float32, and once more with the frozen products in 8 bits.

Every contender is a process of its own, doing the fixed work of `steps.py`, and they take turns (`measuring/turns.py`). The same
weights with 1 to 16 active experts take turns too, afterwards: the step's time should be a constant (attention, decoding the
experts' weights) and a share per active expert. How far it is from the best such line is reported.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lownibble.arch import read_config
from lownibble.bench.peers import EXPERTS, installed
from lownibble.bench.processes import Command, Measured, in_turns
from lownibble.bench.subject import subject
from lownibble.errors import ConfigError
from lownibble.measuring.turns import ratio, spread

MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 4096, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
"""1.04B parameters, of which 1.01B are experts'."""

ACTIVE = (1, 2, 4, 8, 16)
"""Numbers of active experts whose steps are timed."""

OURS = ("qlora_eager", "qlora_int8_eager")
"""Contenders of `contender.py`. Not compiled: a graph ends at each experts' product, so compiling takes minutes for nothing."""


def bench_experts(
    *, peers: bool = False, repeats: int = 3, batch_size: int = 4, length: int = 256, model: str | None = None
) -> dict[str, Any]:
    """Measure training steps of a mixture.

    Args:
        peers: measure PEFT beside it, in both dtypes.
        repeats: counted rounds of a step per contender, and per number of active experts.
        batch_size, length: rows per step and tokens per row, all of them labels.
        model: what to train, see `subject.py`; default: `MIXTURE`.
    Raises:
        ConfigError: the model is no mixture whose configuration has num_experts_per_tok.
        TrainingError: a contender of ours failed.
    """
    with _folder_of(model) as folder:
        config = read_config(folder)
        n_experts = config.get("num_experts") or config.get("num_local_experts")
        if not n_experts or "num_experts_per_tok" not in config:
            raise ConfigError(f"'{model}' has no num_experts and num_experts_per_tok. Give a mixture of experts as --model.")
        work = (str(batch_size), str(length))
        there, missing = installed("cpu", EXPERTS) if peers else ([], {})
        commands = {name: Command("lownibble.bench.contender", (name, str(folder), *work)) for name in OURS}
        commands |= {name: Command("lownibble.bench.peers", (name, str(folder), *work), may_fail=True) for name in there}
        steps = in_turns(commands, repeats, 1)
        with tempfile.TemporaryDirectory() as others:
            active = {k: _with_active(folder, config, k, Path(others)) for k in ACTIVE if k <= n_experts}
            args = {str(k): (OURS[0], str(its), *work) for k, its in active.items()}
            by_active = in_turns({k: Command("lownibble.bench.contender", of) for k, of in args.items()}, repeats, 1)
    times = _by_active(by_active)
    record = _record(steps)
    record["headlines"] |= {f"{k} active: s": found["median"] for k, found in times["seconds"].items()}
    record["headlines"]["furthest from a line in the active experts"] = times["furthest"]
    workload = {
        "model": model or "random Qwen3-MoE", "experts": n_experts, "active": config["num_experts_per_tok"], "r": 16,
        "targets": "attention and experts", "batch_size": batch_size, "length": length, "rounds": repeats, "steps_per_round": 1,
    }  # fmt: skip
    return {"workload": workload, **record, "by_active": times, "failed": steps.failed, "missing": missing}


@contextmanager
def _folder_of(model: str | None) -> Iterator[Path]:
    """The folder of a model with weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(MIXTURE), encoding="utf-8")
        with subject(model or str(path)) as found:
            yield found.folder


def _with_active(folder: Path, config: Mapping[str, Any], k: int, others: Path) -> Path:
    """A folder of the same weights with `k` active experts."""
    made = others / str(k)
    made.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file)
    (made / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": k}), encoding="utf-8")
    return made


def _record(measured: Measured) -> dict[str, Any]:
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in measured.answers.items()}
    figures = {
        name: {
            "tokens_per_s": spread(rates[name]), "peak_bytes": max(answer["peak_bytes"] for answer in given),
            "losses": [loss for answer in given for loss in answer["losses"]], **measured.facts[name],
        } for name, given in measured.answers.items()
    }  # fmt: skip
    pairs = [(ours, peer) for ours in OURS for peer in EXPERTS if peer in rates] + [(OURS[1], OURS[0])]
    ratios = {f"{a}_vs_{b}": ratio(rates[a], rates[b]) for a, b in pairs}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n}: peak GiB": f["peak_bytes"] / 2**30 for n, f in figures.items()}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    headlines |= {
        f"{a}_vs_{b} (peak)": figures[a]["peak_bytes"] / figures[b]["peak_bytes"] for a, b in pairs if b in EXPERTS
    }  # fmt: skip
    return {"contenders": figures, "ratios": ratios, "headlines": headlines}


def _by_active(measured: Measured) -> dict[str, Any]:
    """Seconds of a step by the number of active experts, and the line through the medians (least squares)."""
    seconds = {int(k): [answer["seconds"] for answer in given[1:]] for k, given in measured.answers.items()}
    medians = {k: statistics.median(each) for k, each in seconds.items()}
    return {"seconds": {str(k): spread(each) for k, each in seconds.items()}, **line(medians)}


def line(values: Mapping[int, float]) -> dict[str, float]:
    """The least-squares line through (k, value): its constant, its slope, and the largest distance from it, as a share of the
    value there."""
    slope, constant = statistics.linear_regression(list(values), list(values.values()))
    furthest = max(abs(constant + slope * k - value) / value for k, value in values.items())
    return {"constant_s": constant, "per_active_s": slope, "furthest": furthest}
