"""What a run's record says of it: model, data, memory budget, compilation and speed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from lownibble.data import Dataset, Encoded
from lownibble.lora import count_parameters
from lownibble.lora.experts import adapted_layers
from lownibble.lora.merge_aware import facts_of
from lownibble.lora.provenance import describe
from lownibble.memory import usage
from lownibble.models.head import Head
from lownibble.models.info import info
from lownibble.options import n_bytes
from lownibble.quant import QuantLinear
from lownibble.training.events import Evaluated, Event, Skipped, Started, Stepped
from lownibble.training.loop import Trainer
from lownibble.training.passes import Passes

WARMUP_STEPS = 2
"""Steps excluded from speed figures, while allocators and caches warm up."""


def memory_of_record(folder: Path | None) -> dict[str, Any] | None:
    """The memory section of the record that is in the folder already."""
    try:
        found: dict[str, Any] = json.loads((folder / "record.json").read_text())["memory"] if folder else {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found or None


def history(past: list[Event], events: list[Event]) -> list[Event]:
    """Events of the whole run: those before the checkpoint it was resumed from, then those of this process."""
    first = next(event.first_step for event in events if isinstance(event, Started))
    of_steps = (Stepped, Skipped, Evaluated)
    kept = {(type(e), e.step): e for e in past if isinstance(e, of_steps) and e.step <= first}
    now = {(type(e), e.step) for e in events if isinstance(e, of_steps)}
    return [*(event for key, event in kept.items() if key not in now), *events]


def of_model(model: Any) -> dict[str, Any]:
    """Class, sizes and matmul precision."""
    trainable, total = count_parameters(model)
    quantized, leaves = [m for m in model.modules() if isinstance(m, QuantLinear)], info(model).merge_aware
    return {
        "class": type(model).__name__,
        "parameters": total,
        "trainable_parameters": trainable,
        "compute": sorted({m.compute for m in quantized}),
        "merge_aware": leaves and describe(facts_of(leaves)),
        "head_compute": Head(model).compute,
        "compute_chosen": info(model).compute,
        "quantized_parameters": sum(m.weight.numel() for m in quantized),
        "adapted": adapted_layers(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def of_data(sides: tuple[Dataset, Dataset], encoded: list[Encoded]) -> dict[str, Any]:
    """Names, digests and counts of rows."""
    return {
        "name": sides[0].name,
        "form": encoded[0].form,
        **{f"{side}_rows": len(d.rows) for side, d in zip(("train", "eval"), sides, strict=True)},
        **{f"{side}_digest": d.digest for side, d in zip(("train", "eval"), sides, strict=True)},
        "cut_rows": encoded[0].n_cut,
        "dropped_rows": encoded[0].n_dropped,
    }


def of_budget(trainer: Trainer, told: list[str]) -> dict[str, Any]:
    """How the run fitted into its memory budget; appends a warning to `told` if it did not."""
    if not trainer.config.memory_budget:
        return {}
    budget, peak = n_bytes(trainer.config.memory_budget), usage.highest_bytes(trainer.device)
    if peak > budget:
        told.append(f"the run took {peak / 1e9:.2f} GB, more than its memory budget of {budget / 1e9:.2f} GB")
    return {
        "budget": {"budget_bytes": budget, "whole_tokens": trainer.micro.whole, **trainer.fit.to_dict(), "highest_bytes": peak}
    }


def of_compilation(passes: Passes) -> dict[str, Any]:
    """Which attention ran, whether layers were compiled, and what ran in tiles (None: no microbatch was long)."""
    tiled = passes.tiled
    return {
        "attention": f"torch's: {passes.attention_reason}" if passes.attention_reason else "lownibble",
        "compiled": passes.compiled, "compile_reason": passes.compile_reason, "compile_seconds": passes.compile_seconds,
        "cuda_graphs": 0 if passes.graphs is None else len(passes.graphs),
        "cuda_graphs_reason": passes.graph_reason if passes.graphs is None else passes.graphs.obstacle,
        "tiled": None if tiled is None else sorted(tiled.modules), "untiled": None if tiled is None else tiled.untiled,
    }  # fmt: skip


def of_speed(steps: list[Stepped]) -> dict[str, Any]:
    """Throughput over all steps after warm-up; quartiles over steps show the spread."""
    counted = steps[WARMUP_STEPS:] or steps
    if not counted:
        return {}
    seconds = sum(s.seconds for s in counted)
    rates = [s.tokens / s.seconds for s in counted]
    low, middle, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return {
        "warmup_steps": len(steps) - len(counted),
        "tokens_per_s": sum(s.tokens for s in counted) / seconds,
        "samples_per_s": sum(s.samples for s in counted) / seconds,
        "step_s": seconds / len(counted),
        "tokens_per_s_quartiles": [low, middle, high],
        "padding_share": 1 - sum(s.tokens for s in counted) / sum(s.padded_tokens for s in counted),
    }
