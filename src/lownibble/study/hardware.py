"""The planner's tables for the articles' model sizes, which are too large for the machine of a small study."""

from __future__ import annotations

from functools import cache
from typing import Any

from lownibble.config import DataConfig, PlanConfig, TrainConfig
from lownibble.planning.plan import plan

MODELS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")

TRAIN = TrainConfig(batch_size=4, max_length=512)

CARDS = ("rtx-4090", "l40s", "a100-40gb", "a100-80gb", "h200")
NUMBERS = (2, 4, 8, 16)
"""Kinds of cards, and numbers of them besides one, for `fewest_cards`."""

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


@cache
def fewest_cards(model: str = MODELS[-1]) -> list[dict[str, Any]]:
    """Each kind of card and method: the smallest number of cards on which the model fits (None: on none of `NUMBERS`), with what
    options, and device memory of a step on each (GiB). Several train with fsdp, each with a batch of its own."""
    options: dict[str, Any] = {"model": model, "gpu": ",".join(CARDS), "train": TRAIN, "data": DataConfig(path="none")}
    made = [plan(PlanConfig(**options))]
    for number in NUMBERS:
        train = TRAIN.with_options(batch_size=number * TRAIN.batch_size, parallel="fsdp")
        made.append(plan(PlanConfig(**{**options, "train": train}, gpus=[number])))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for each in made for row in each.rows):
        verdict = row.verdict
        key = (verdict.device.title, verdict.method)
        first = found.setdefault(key, {"device": key[0], "method": key[1], "cards": None})
        if verdict.fits and first["cards"] is None:
            gib = verdict.memory.device.likely / 2**30
            first |= {"cards": row.ranks.gpus if row.ranks else 1, "verdict": verdict.words, "gib": gib}
    return list(found.values())
