"""Learning-rate schedules: (step, total, warm-up) -> factor of the peak rate. Formulas as in transformers' `get_scheduler`."""

from __future__ import annotations

import math
from collections.abc import Callable


def _left(step: int, total: int, warmup: int) -> float:
    """Fraction of the steps after the warm-up that remain, 1 -> 0."""
    return max(0.0, (total - step) / max(1, total - warmup))


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, total, warmup: 1.0,
    "linear": _left,
    "cosine": lambda step, total, warmup: 0.5 * (1 - math.cos(math.pi * _left(step, total, warmup))),
}
"""`lr_scheduler_type` -> factor after the warm-up."""


def warmup_steps(total: int, ratio: float) -> int:
    """Number of linear warm-up steps."""
    return math.ceil(total * ratio)


def learning_rate(kind: str, peak: float, step: int, total: int, warmup: int) -> float:
    """Learning rate of step `step` (0-based): linear from 0 during the warm-up, then the schedule."""
    if step < warmup:
        return peak * step / max(1, warmup)
    return peak * SCHEDULES[kind](step, total, warmup)
