"""Optimisers and learning-rate schedules."""

from lownibble.optim.adamw import PAGED, close_states, make_optimizer, open_states, planned_bytes, set_learning_rate, state_bytes
from lownibble.optim.schedule import SCHEDULES, learning_rate, warmup_steps

__all__ = [
    "PAGED",
    "SCHEDULES",
    "close_states",
    "learning_rate",
    "make_optimizer",
    "open_states",
    "planned_bytes",
    "set_learning_rate",
    "state_bytes",
    "warmup_steps",
]
