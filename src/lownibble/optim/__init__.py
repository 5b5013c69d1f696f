"""Optimisers and learning-rate schedules. Submodules are imported lazily, so `specs` can be used without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lownibble.lazy import lazily

if TYPE_CHECKING:
    from lownibble.optim.adamw import (
        close_states,
        make_optimizer,
        open_states,
        planned_bytes,
        set_learning_rate,
        skipped,
        state_bytes,
        step_if_finite,
    )
    from lownibble.optim.schedule import SCHEDULES, learning_rate, warmup_steps
    from lownibble.optim.specs import OptimizerSpec, is_paged, paged_name, plain_name, spec

_ADAMW = (
    "close_states", "make_optimizer", "open_states", "planned_bytes", "set_learning_rate", "skipped", "state_bytes",
    "step_if_finite",
)  # fmt: skip

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(_ADAMW, "adamw"),
        **dict.fromkeys(("SCHEDULES", "learning_rate", "warmup_steps"), "schedule"),
        **dict.fromkeys(("OptimizerSpec", "is_paged", "paged_name", "plain_name", "spec"), "specs"),
    },
)

__all__ = [
    "SCHEDULES", "OptimizerSpec", "close_states", "is_paged", "learning_rate", "make_optimizer", "open_states", "paged_name",
    "plain_name", "planned_bytes", "set_learning_rate", "skipped", "spec", "state_bytes", "step_if_finite", "warmup_steps",
]  # fmt: skip
