"""The planner's table for the articles' model sizes, which are too large for the machine of a small study."""

from __future__ import annotations

from functools import cache
from typing import Any

from lownibble.config import DataConfig, PlanConfig, TrainConfig
from lownibble.planning.plan import plan

MODELS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")

TRAIN = TrainConfig(batch_size=4, max_length=512)

TOKENS = 10_000_000
"""Training tokens that hours and dollars are for."""


@cache
def hardware_table() -> dict[str, Any]:
    """Each model, device and method: device memory of a step (GiB), whether it fits, hours and dollars."""
    rows = []
    for model in MODELS:
        made = plan(PlanConfig(model=model, train=TRAIN, tokens=TOKENS, data=DataConfig(path="none")))
        for row in made.rows:
            verdict, speed = row.verdict, row.speed
            rows.append({
                "model": model, "device": verdict.device.title, "method": verdict.method, "fits": verdict.fits,
                "verdict": verdict.words, "gib": verdict.memory.device.likely / 2**30,
                "device_gib": verdict.device.memory_bytes / 2**30,
                "hours": None if speed is None or speed.hours is None else speed.hours.likely,
                "dollars": None if speed is None or speed.dollars is None else speed.dollars.likely,
            })  # fmt: skip
    return {"batch_size": TRAIN.batch_size, "max_length": TRAIN.max_length, "tokens": TOKENS, "rows": rows}
