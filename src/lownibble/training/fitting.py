"""How a run keeps within memory: the dry run before its first step, and smaller passes where memory runs out after all.

The effective batch stays the same whatever is given up: a step's rows are dealt to smaller forward passes, then activations are
computed twice (gradient checkpointing). What was chosen is in checkpoints, so that a resumed run deals its rows the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from lownibble.config import TrainConfig
from lownibble.data import Batch
from lownibble.errors import TrainingError
from lownibble.kernels.decoded import release_scratch
from lownibble.memory import usage
from lownibble.memory.budget import AIM, ENOUGH_TOKENS, SETTINGS, Fit, Needs, Setting, choose
from lownibble.memory.dryrun import DryRun
from lownibble.optim import is_paged, paged_name
from lownibble.options import n_bytes
from lownibble.training.evaluate import Evaluator
from lownibble.training.microbatches import MicroBatches, Rows
from lownibble.training.passes import Passes

CLOSE = 0.99
"""Share of the memory budget at which steps become smaller."""


class MemoryGoneError(TrainingError):
    """Memory ran out and there is nothing left to give up."""


class Fitting:
    """The memory of one run.

    Attributes:
        fit: what the memory budget left of the configuration, or all of it.
        warnings: what a user should know and no event has told yet.
    """

    def __init__(
        self, config: TrainConfig, micro: MicroBatches, passes: Passes, evaluator: Evaluator, device: torch.device
    ) -> None:
        self.config, self.micro, self.passes, self.evaluator, self.device = config, micro, passes, evaluator, device
        self.fit = Fit(None, is_paged(config.optim), config.gradient_checkpointing, 0)
        self.warnings: list[str] = []
        self._fraction: float | None = None
        self._process_budget = n_bytes(config.memory_budget) if config.memory_budget and device.type == "cpu" else 0

    def close(self) -> None:
        """Give the process's settings back."""
        release_scratch()
        if self._fraction is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.device)

    def choose(self, recorded: Fit | None, state_bytes: Callable[[Setting], int]) -> Fit:
        """How the steps fit into memory: as `recorded` in a checkpoint of the same budget, else by a dry run.

        Args:
            state_bytes: of the optimiser with a setting.
        Raises:
            ConfigError: no step fits into the memory budget.
        """
        budget, asked = self.config.memory_budget, self.fit
        if recorded is not None:
            return recorded
        if budget is None:
            return asked
        limit = n_bytes(budget)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._fraction = torch.cuda.memory.get_per_process_memory_fraction(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
        elif limit > psutil.virtual_memory().total:
            self.warnings.append(f"the memory budget of {budget} is more than this machine has")
        of_states = {
            setting: state_bytes(setting) for setting in SETTINGS
            if setting.paged >= asked.paged and (not setting.paged or paged_name(self.config.optim) is not None)
            and setting.gradient_checkpointing >= asked.gradient_checkpointing
            and (self.passes.can_checkpoint or not setting.gradient_checkpointing)
        }  # fmt: skip
        needs = Needs(self.micro.longest_row, self.micro.whole, ENOUGH_TOKENS[self.device.type], of_states)
        with DryRun(self.passes, self.micro, self.device) as bench:
            return choose(limit, needs, bench)

    def take(self, fit: Fit) -> None:
        """Go on this way."""
        self.fit = fit
        self.micro.max_tokens = self.evaluator.max_tokens = fit.max_tokens
        self.passes.set_checkpointing(fit.gradient_checkpointing)

    def make_room(self) -> None:
        """Before a pass that would not fit into the process's memory budget beside what the C heap holds and does not use."""
        if self._process_budget and usage.used_bytes(self.device) + self.fit.room_bytes > AIM * self._process_budget:
            usage.trim_heap()

    def keep_within(self, batches: list[Batch]) -> None:
        """After a step that took all of the memory budget, which the dry run did not foresee: smaller passes."""
        peak = usage.peak_bytes(self.device) if self._process_budget else 0
        if peak > CLOSE * self._process_budget and any(batch.n_rows > 1 for batch in batches):
            tokens = int(0.9 * max(batch.input_ids.numel() for batch in batches))
            self.take(replace(self.fit, max_tokens=tokens))
            self.warnings.append(
                f"a step took {peak / 1e9:.2f} GB, close to the memory budget: forward passes have at most {tokens} tokens from "
                "now on"
            )
            usage.settle(self.device)
            usage.reset_peak(self.device)

    def shrink_step(self, step: int, rows: Rows) -> None:
        """After memory ran out in a step: smaller passes from now on, then checkpointing.

        Raises:
            MemoryGoneError: both are as small as can be.
        """
        release_scratch()
        usage.settle(self.device)
        batches = self.micro.batches(rows)
        tokens = max(self.micro.tokens(passed) for passed in self.micro.dealt(rows))
        if any(batch.n_rows > 1 for batch in batches):
            self.take(replace(self.fit, max_tokens=tokens // 2))
            what = f"forward passes have at most {tokens // 2} tokens from now on"
        elif self.passes.can_checkpoint and not self.fit.gradient_checkpointing:
            self.take(replace(self.fit, gradient_checkpointing=True))
            what = "activations are computed twice from now on (gradient checkpointing)"
        else:
            raise MemoryGoneError(
                f"Memory ran out in step {step + 1}, with one row of {tokens} tokens in a forward pass"
                f"{' and gradient checkpointing' * self.fit.gradient_checkpointing}. Lower max_length (--max-length), use "
                "--optim paged_adamw_8bit or --method qlora."
            )
        self.warnings.append(f"memory ran out in step {step + 1}, which began again: {what}")

    def shrink_evaluation(self, step: int) -> None:
        """After memory ran out in an evaluation: smaller passes there from now on.

        Raises:
            MemoryGoneError: a pass is as small as can be.
        """
        release_scratch()
        usage.settle(self.device)
        tokens = self.evaluator.halve()
        if not tokens:
            raise MemoryGoneError(
                f"Memory ran out in the evaluation after step {step}, with one row in a forward pass. Lower max_length "
                "(--max-length), or use --method qlora."
            )
        self.warnings.append(
            f"memory ran out in the evaluation after step {step}: its forward passes have at most {tokens} tokens from now on"
        )


def recorded_fit(config: TrainConfig, past: Any) -> Fit | None:
    """The fit in a checkpoint's facts, if it was made for the same budget."""
    if past and past.config["train"].get("memory_budget") == config.memory_budget and past.fit:
        return Fit.from_dict(past.fit)
    return None
