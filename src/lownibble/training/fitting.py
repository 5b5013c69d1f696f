"""Fitting a run into memory: a dry run before the first step, and smaller microbatches if memory runs out after all.

The effective batch size never changes: a step's rows are split into smaller microbatches, then gradient checkpointing is turned
on, then (CUDA) its checkpoints are offloaded. The choice is stored in checkpoints, so a run that is resumed on as many ranks
splits its rows the same way; on another number each has other shares of rows and weights, and the run is fitted again.

Several ranks make the dry run together and go by the one that needs most. Whatever gets smaller does so on all of them, since a
rank that split its rows otherwise, or began a step again without the others, would be out of step: what one rank alone knows
(whether it holds CUDA graphs, whether memory can be pinned) is asked of all before it is acted on.

With shards a rank whose memory runs out in a pass cannot tell the others, which wait for its weights: so the device's allocator
is not limited to the budget, the dry run stops short of it by its own prediction, and a step that comes close is followed by
smaller ones, as on a CPU. Memory that does run out ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from lownibble.config import CHECKPOINTING, Checkpointing, TrainConfig
from lownibble.errors import TrainingError
from lownibble.kernels.decoded import release_scratch
from lownibble.memory import usage
from lownibble.memory.budget import AIM, ENOUGH_TOKENS, SETTINGS, WORDS, Fit, Needs, Setting, choose
from lownibble.memory.dryrun import DryRun
from lownibble.optim import is_paged, paged_name
from lownibble.options import n_bytes
from lownibble.training.distributed import ALONE, Ranks
from lownibble.training.evaluate import Evaluator
from lownibble.training.microbatches import MicroBatches, Rows
from lownibble.training.passes import Passes

CLOSE = 0.99
"""Fraction of the memory budget at which microbatches become smaller."""


class MemoryGoneError(TrainingError):
    """Out of memory, and neither smaller microbatches nor gradient checkpointing can help any more."""


class Fitting:
    """Memory management of one run.

    Attributes:
        fit: the configuration after fitting it to the memory budget, or unchanged without one.
        warnings: messages for the user that no event has reported yet.
    """

    def __init__(
        self, config: TrainConfig, micro: MicroBatches, passes: Passes, evaluator: Evaluator, device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._ranks = ranks
        self.config, self.micro, self.passes, self.evaluator, self.device = config, micro, passes, evaluator, device
        self.fit = Fit(None, is_paged(config.optim), config.gradient_checkpointing, 0)
        self.warnings: list[str] = []
        self._fraction: float | None = None
        is_limited = device.type == "cuda" and not ranks.sharded
        self._process_budget = n_bytes(config.memory_budget) if config.memory_budget and not is_limited else 0

    def close(self) -> None:
        """Release buffers and restore the process's memory limit."""
        release_scratch()
        if self._fraction is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.device)

    def choose(self, recorded: Fit | None, state_bytes: Callable[[Setting], int]) -> Fit:
        """Choose the fit: as `recorded` in a checkpoint of the same budget, else by a dry run; without a budget, as configured.

        Args:
            state_bytes: setting -> bytes of the optimiser's states.
        Raises:
            ConfigError: no step fits into the memory budget.
        """
        budget, asked = self.config.memory_budget, self.fit
        if recorded is not None:
            return recorded
        if budget is None:
            return asked
        limit = n_bytes(budget)
        if self.device.type == "cuda" and not self._ranks.sharded:
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._fraction = torch.cuda.memory.get_per_process_memory_fraction(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
        elif self.device.type == "cpu" and limit > psutil.virtual_memory().total:
            self.warnings.append(f"the memory budget of {budget} is more than this machine has")
        kinds = self._checkpointing(asked.gradient_checkpointing)
        of_states = {
            setting: state_bytes(setting) for setting in SETTINGS
            if setting.paged >= asked.paged and (not setting.paged or self._pages) and setting.gradient_checkpointing in kinds
        }  # fmt: skip
        needs = Needs(self.micro.longest_row, self.micro.whole, ENOUGH_TOKENS[self.device.type], of_states)
        with DryRun(self.passes, self.micro, self.device, self._ranks.most, may_fail=not self._ranks.sharded) as bench:
            return replace(choose(limit, needs, bench), ranks=self._ranks.words)

    @property
    def _pages(self) -> bool:
        """Whether paging optimiser states would save memory."""
        return paged_name(self.config.optim) is not None and not self.config.fsdp_cpu_offload

    def _checkpointing(self, least: Checkpointing) -> list[Checkpointing]:
        """Kinds of gradient checkpointing that the model has on all ranks, from `least` on."""
        can: dict[Checkpointing, bool] = {False: True, True: self.passes.can_checkpoint, "offload": self.passes.can_offload}
        lacking = dict(zip(can, self._ranks.total(*(int(not has) for has in can.values())), strict=True))
        return [how for how in CHECKPOINTING[CHECKPOINTING.index(least) :] if not lacking[how] or how == least]

    def take(self, fit: Fit) -> None:
        """Apply a fit to microbatches, evaluation and checkpointing."""
        self.fit = fit
        self.micro.max_tokens = self.evaluator.max_tokens = fit.max_tokens
        self.passes.set_checkpointing(fit.gradient_checkpointing)

    def make_room(self) -> None:
        """Trim the C heap before a pass if memory in use plus the pass's would exceed `AIM` of the process's memory budget."""
        if self._process_budget and usage.used_bytes(self.device) + self.fit.room_bytes > AIM * self._process_budget:
            usage.trim_heap()

    def _largest(self, rows: Rows) -> tuple[int, int]:
        """Tokens of a step's largest microbatch as its limit counts them, and the most rows of one, on any rank."""
        dealt = self.micro.dealt(rows)
        return self._ranks.most(max(map(self.micro.tokens, dealt), default=0)), self._ranks.most(max(map(len, dealt), default=0))

    def keep_within(self, rows: Rows) -> None:
        """Shrink microbatches after a step whose peak nearly reached the process's memory budget, contrary to the dry run."""
        if not self._process_budget:
            return
        peak = self._ranks.most(usage.held_peak_bytes(self.device))
        if peak <= CLOSE * self._process_budget:
            return
        largest, most_rows = self._largest(rows)
        if most_rows > 1:
            tokens = int(0.9 * largest)
            self.take(replace(self.fit, max_tokens=tokens))
            self.warnings.append(
                f"a step took {peak / 1e9:.2f} GB, close to the memory budget: forward passes have at most {tokens} tokens from "
                "now on"
            )
            usage.settle(self.device)
            usage.reset_peak(self.device)

    def shrink_step(self, step: int, rows: Rows) -> None:
        """After running out of memory in a step: shrink microbatches from now on, then turn on gradient checkpointing.

        Raises:
            MemoryGoneError: microbatches are single rows, and checkpointing is on or not available.
        """
        release_scratch()
        if self._gave_up_graphs(f"step {step + 1}"):
            return
        usage.settle(self.device)
        tokens, most_rows = self._largest(rows)
        if most_rows > 1:
            self.take(replace(self.fit, max_tokens=tokens // 2))
            what = f"forward passes have at most {tokens // 2} tokens from now on"
        elif more := self._checkpointing(self.fit.gradient_checkpointing)[1:]:
            self.take(replace(self.fit, gradient_checkpointing=more[0]))
            what = f"from now on with {WORDS[more[0]]}, which computes activations twice"
        else:
            how = self.fit.gradient_checkpointing
            raise MemoryGoneError(
                f"Memory ran out in step {step + 1}, with one row of {tokens} tokens in a forward pass"
                f"{f' and {WORDS[how]}' if how else ''}. Lower max_length (--max-length), use "
                "--optim paged_adamw_8bit or --method qlora."
            )
        self.warnings.append(f"memory ran out in step {step + 1}, which began again: {what}")

    def _gave_up_graphs(self, where: str) -> bool:
        """Free the memory of CUDA graphs, if any rank has some, before anything gets smaller; the loop tells of it."""
        dropped = bool(self._ranks.most(int(self.passes.drop_graphs(f"memory ran out in {where}"))))
        if dropped:
            usage.settle(self.device)
        return dropped

    def shrink_evaluation(self, step: int) -> None:
        """After running out of memory in an evaluation: shrink its forward passes from now on.

        Raises:
            MemoryGoneError: a pass is already a single row.
        """
        release_scratch()
        if self._gave_up_graphs(f"the evaluation after step {step}"):
            return
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


def recorded_fit(config: TrainConfig, past: Any, ranks: Ranks = ALONE) -> Fit | None:
    """The fit in a checkpoint's facts, if it was made for the same memory budget, with shards in the same place, and, where there
    is a budget, on the same ranks."""
    asked = past.config["train"] if past and past.fit else {}
    there = (asked.get("memory_budget"), asked.get("fsdp_cpu_offload", False))
    if asked and there == (config.memory_budget, config.fsdp_cpu_offload):
        found = Fit.from_dict(past.fit)
        return found if config.memory_budget is None or found.ranks == ranks.words else None
    return None
