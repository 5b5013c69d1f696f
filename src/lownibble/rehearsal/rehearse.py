"""Dry run of a training run (`lownibble train --dry-run`): planned and measured memory, and the estimated duration.

Loads the model and the data as the run would, takes its first steps and the one with the largest microbatch, and writes nothing.
The trained weights are discarded.
"""

from __future__ import annotations

import statistics
from itertools import islice
from typing import Any

from lownibble import record
from lownibble.config import RunConfig
from lownibble.errors import TrainingError
from lownibble.memory import planned, usage
from lownibble.optim import close_states
from lownibble.training.events import Skipped, Stepped
from lownibble.training.loop import Trainer
from lownibble.training.making import prepare
from lownibble.training.microbatches import Rows

STEPS = 4
"""Steps taken from the beginning of the run; the first is not timed."""


def rehearse(config: RunConfig) -> dict[str, Any]:
    """Do a dry run; returns its record.

    Raises:
        InputError: the configuration is invalid.
        TrainingError: a step was skipped.
    """
    config = config.with_options(train=config.train.with_options(output_dir=None, resume=False))
    trainer, baseline = prepare(config)
    try:
        trainer.set_up()
        usage.settle(trainer.device)
        usage.reset_peak(trainer.device)
        taken = [trainer.step(number, rows) for number, rows in _chosen(trainer)]
    finally:
        close_states(trainer.optimizer)
    wrong = next((step.reason for step in taken if isinstance(step, Skipped)), None)
    if wrong:
        raise TrainingError(f"A step of the dry run could not be taken: {wrong}.")
    peak = usage.peak_bytes(trainer.device)
    steps = [step for step in taken if isinstance(step, Stepped)]
    rates = sorted(step.tokens / step.seconds for step in steps[1:STEPS] or steps)
    tokens = trainer.micro.planned_tokens(trainer.total_steps)
    return {
        **record.new("dry-run"),
        "status": "ok",
        "config": config.to_dict(),
        "environment": record.environment(trainer.device),
        "run": {
            "steps": trainer.total_steps, "tokens": tokens, "rows": len(trainer.micro.rows), "cut_rows": trainer.cut_rows,
            "longest_row": trainer.micro.longest_row,
        },
        "memory": {
            "baseline_bytes": baseline, "peak_bytes": peak, "fit": trainer.fit.to_dict(),
            "planned": planned.RunPlan(trainer).beside_measured(peak),
        },
        "speed": {
            "compiled": trainer.passes.compiled, "compile_seconds": trainer.passes.compile_seconds,
            "tokens_per_s": {"low": rates[0], "median": statistics.median(rates), "high": rates[-1]},
            "run_s": {"low": tokens / rates[-1], "likely": tokens / statistics.median(rates), "high": tokens / rates[0]},
        },
        "warnings": trainer.warnings,
    }  # fmt: skip


def _chosen(trainer: Trainer) -> list[tuple[int, Rows]]:
    """(number, rows) of the first steps, and of the step with the largest microbatch."""
    steps = list(islice(enumerate(trainer.micro.steps()), min(planned.STEPS, trainer.total_steps)))

    def largest(step: tuple[int, Rows]) -> int:
        return max(trainer.micro.tokens(rows) for rows in trainer.micro.dealt(step[1]))

    first, most = steps[:STEPS], max(steps, key=largest)
    return first if most in first else [*first, most]
