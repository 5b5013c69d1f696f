"""The passes of the memory budget's dry run, on the real model: what `budget.choose` measures with.

Gradients are there all the time, as in accumulation; what is free is given back before each pass, so that a pass shows what it
takes and not what an earlier one left behind. Nothing is trained: the gradients are dropped at the end.
"""

from __future__ import annotations

import torch

from lownibble.training import memory
from lownibble.training.budget import FIRST_TOKENS, Setting
from lownibble.training.microbatches import MicroBatches
from lownibble.training.passes import Passes, kind

COMPILED_TOKENS = 256
"""Size of the passes that compile: enough for the compiler to see that work is worth dividing among threads."""


class DryRun:
    """`budget.Bench` over a run's passes; a context manager that leaves no gradients behind."""

    def __init__(self, passes: Passes, micro: MicroBatches, device: torch.device) -> None:
        self.passes, self.micro, self.device = passes, micro, device
        self._began = False

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.model.zero_grad(set_to_none=True)
        memory.settle(self.device)
        memory.reset_peak(self.device)

    def resident(self, setting: Setting) -> int:
        """Bytes in use between two passes."""
        self.passes.set_checkpointing(setting.gradient_checkpointing)
        if not self._began:
            self._backward(FIRST_TOKENS // 2)
            self._began = True
        memory.settle(self.device)
        return memory.used_bytes(self.device)

    def size(self, tokens: int) -> int:
        """Tokens of the largest pass of at most so many."""
        return self.micro.size(tokens) if tokens else 0

    def peak(self, tokens: int) -> int | None:
        """Highest bytes in use during that pass; None: memory ran out."""
        memory.settle(self.device)
        memory.reset_peak(self.device)
        try:
            self._backward(tokens)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            return None
        return memory.held_peak_bytes(self.device)

    def _backward(self, tokens: int) -> None:
        batch = self.micro.largest(tokens)
        if self.passes.compiled:
            self.passes.compile([self.passes.small(kind(batch), COMPILED_TOKENS)])
        self.passes.backward(batch, max(1, batch.n_label_tokens))
