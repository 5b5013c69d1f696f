"""`lownibble bench codecs`: evaluation loss before and after fine-tuning on each codec, and allocated memory against the plan.

The same short run (rows, seed, adapters, exact compute) on a frozen base that is dense and in each codec. The loss before the
first step shows the quantisation loss, the final loss how much of it training recovers. Allocated bytes are measured by torch's
profiler over two steps and compared with the planner's, as in `bench plan`. There is one seed, so differences of a few percent
are not significant.
"""

from __future__ import annotations

import sys
from typing import Any

from lownibble.bench.plan import in_a_process, peak_allocated
from lownibble.config import QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.planning.models import find_shape
from lownibble.quant import layouts

WAYS: dict[str, QuantConfig | None] = {
    "dense": None,
    "nf4": QuantConfig(compute="exact"),
    **{
        name: QuantConfig(quant_type=name, compute="exact")
        for name in ("int8", "fp8", "int4", "mxfp4", "int3", "nf3", "int2", "nf2")
    },
}
"""Name -> quantisation of the base; None: LoRA on a dense base."""

RUN = {"max_steps": 12, "batch_size": 16, "learning_rate": 5e-4, "warmup_ratio": 0.1, "max_length": 128, "group_by_length": True}
STEP = {"max_steps": 2, "batch_size": 4, "max_length": 128, "torch_compile": False}


def bench_codecs(peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Train once on each codec.

    Raises:
        ConfigError: `peers` or `repeats` is given; neither applies.
    """
    if peers or repeats != 1:
        raise ConfigError("'bench codecs' trains once on each codec. Leave --peers and --repeats out.")
    found = {name: _measure(name, quant) for name, quant in WAYS.items()}
    worst = max(abs(way["allocated_error"]) for way in found.values())
    return {
        "workload": {"model": "demo", "data": "demo", "train": RUN, "step": STEP, "seed": 0},
        "codecs": found,
        "headlines": {
            **{f"{name}: evaluation loss": f"{way['loss_before']:.3f} -> {way['loss_after']:.3f}" for name, way in found.items()},
            "allocated against the plan, worst error": worst,
        },
    }


def _measure(name: str, quant: QuantConfig | None) -> dict[str, Any]:
    from lownibble.training import run

    method = "lora" if quant is None else "qlora"
    own: dict[str, Any] = {"method": method, "device": "cpu", "quant": quant or QuantConfig()}
    trained = run(RunConfig(data={"path": "demo", "max_eval_rows": 64}, train=TrainConfig(**RUN), **own)).record
    first, last = trained["evaluations"][0], trained["evaluations"][-1]
    config = RunConfig(data={"path": "demo", "max_rows": 64, "max_eval_rows": 4}, train=TrainConfig(**STEP), **own)
    allocated, batch = in_a_process(config, peak_allocated), trained["memory"]["planned"]
    plan = _plan(config)
    shape = find_shape("demo")
    result = {
        "loss_before": first["loss"], "loss_after": last["loss"],
        "scores_before": first["scores"], "scores_after": last["scores"],
        "codes_bytes": trained["memory"]["codes_bytes"], "constants_bytes": trained["memory"]["constants_bytes"],
        "bits_per_weight": _bits(shape, quant),
        "allocated_bytes": allocated, "planned_bytes": plan, "allocated_error": plan / allocated - 1, "batch": batch.get("batch"),
    }  # fmt: skip
    print(
        f"bench codecs: {name}: loss {first['loss']:.4f} -> {last['loss']:.4f}; allocated {allocated / 1e6:.1f} MB, planned "
        f"{result['allocated_error']:+.2%}",
        file=sys.stderr,
    )
    return result


def _plan(config: RunConfig) -> int:
    """Planned allocated bytes of the largest microbatch in the run's first two steps."""
    from lownibble.memory.planned import plan_of
    from lownibble.training.making import prepare

    trainer, _ = prepare(config)
    trainer.total_steps = 2
    _, plan = plan_of(trainer)
    return plan.allocated.likely


def _bits(shape: Any, quant: QuantConfig | None) -> float:
    """Mean bits per linear weight, quantisation constants included; 32 for a dense base."""
    from lownibble.arch import paths

    if quant is None:
        return 32.0
    linears = {path: (linear.out_features, linear.in_features) for path, linear in paths(shape)}
    n_bytes = sum(layouts.n_bytes(size, quant.for_layer(path)) for path, size in linears.items())
    return 8 * n_bytes / sum(rows * columns for rows, columns in linears.values())
