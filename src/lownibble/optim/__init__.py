"""Optimisers and learning-rate schedules."""

from lownibble.optim.adamw import make_optimizer, set_learning_rate, state_bytes
from lownibble.optim.schedule import SCHEDULES, learning_rate, warmup_steps

__all__ = ["SCHEDULES", "learning_rate", "make_optimizer", "set_learning_rate", "state_bytes", "warmup_steps"]
