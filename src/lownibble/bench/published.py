"""`lownibble bench published`: planned memory next to peaks published by others.

The planner plans Lownibble's own step. Extra memory of other libraries is added for the comparison: if they materialise the
logits of all tokens, the end of forward also holds the hidden states and their gradient, and the logits in the (16-bit)
activation dtype and in float32, each with its gradient; if they keep each adapter's input in float32 (PEFT on a 16-bit model),
those copies. `assumed` names settings that a row's source leaves open, so a large error is as often a wrong assumption as a fault
of the planner; `why` gives what is known about the error.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lownibble.arch import ModelShape, paths
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.options import n_bytes, read_toml
from lownibble.planning import hardware
from lownibble.planning import memory as planner
from lownibble.planning.models import find_shape

PEAKS = Path(planner.__file__).with_name("published.toml")


def bench_published(*, peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Plan every row of `published.toml` and compute its error.

    Raises:
        ConfigError: `peers` or `repeats` is given; nothing is run.
    """
    if peers or repeats != 1:
        raise ConfigError(
            "'bench published' compares plans with figures of others; nothing runs. Leave --peers and --repeats out."
        )
    rows = [_row(peak) for peak in read_toml(PEAKS)["peak"]]
    open_, stated = ([abs(row["error"]) for row in rows if bool(row["assumed"]) == known] for known in (True, False))
    worst = max(rows, key=lambda row: abs(row["error"]))
    return {
        "workload": {"rows": len(rows)},
        "rows": rows,
        "headlines": {
            **{f"{row['text']}, {row['figure']}": f"{row['error']:+.1%}" for row in rows},
            "settings stated, worst error": max(stated),
            "settings partly assumed, median error": statistics.median(open_),
            "worst": f"{worst['error']:+.0%}: {worst['text']} ({worst['source']}): {worst['why']}",
        },
    }


def _row(peak: dict[str, Any]) -> dict[str, Any]:
    shape, device = find_shape(peak["model"]), hardware.device(peak.get("gpu", "a100-80gb"))
    settings = dict(peak["settings"])
    lora = LoraConfig(**{key: settings.pop(key) for key in ("r", "target_modules") if key in settings})
    train = TrainConfig(**settings)
    plan = planner.plan_memory(
        shape, device, peak["method"], quant=QuantConfig(), lora=lora, train=train, dtype=peak.get("dtype", "auto")
    )
    tokens = train.batch_size * train.max_length
    copies = tokens * 4 * _adapted_width(shape, lora) if peak.get("copies") else 0
    logits = plan.instants["forward"] + tokens * (2 * 2 * shape.hidden + 2 * (2 + 4) * shape.vocab)
    more = copies + (max(0, logits - plan.allocated.likely) if peak["head"] == "whole" else 0)
    figures = {"allocated": plan.allocated, "reserved": plan.reserved, "device": plan.device}
    figure = figures[peak["figure"]]
    assert figure is not None
    planned, published = figure.likely + more, n_bytes(peak["bytes"])
    return {
        **{key: peak.get(key, "") for key in ("text", "source", "model", "method", "figure", "head", "assumed", "why")},
        "settings": peak["settings"], "published_bytes": published, "planned_bytes": planned, "of_logits_and_copies_bytes": more,
        "error": planned / published - 1,
    }  # fmt: skip


def _adapted_width(shape: ModelShape, lora: LoraConfig) -> int:
    """Sum of `in_features` over all linear layers with an adapter."""
    names = lora.target_modules
    return sum(linear.in_features for path, linear in paths(shape) if names == "all-linear" or path.endswith(tuple(names)))
