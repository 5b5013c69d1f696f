"""The passes of the memory budget's dry run, on the real model: what `budget.choose` measures with.

Gradients are there all the time, as in accumulation; what is free is given back before each pass, so that a pass shows what it
takes and not what an earlier one left behind. Nothing is trained: the gradients are dropped at the end.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from lownibble.memory import usage
from lownibble.memory.budget import FIRST_TOKENS, Setting

COMPILED_TOKENS = 256
"""Size of the passes that compile: enough for the compiler to see that work is worth dividing among threads."""


class Passes(Protocol):
    """Forward and backward passes of a model (`training/passes.py`)."""

    model: Any
    compiled: bool

    def set_checkpointing(self, on: bool) -> None:
        """Compute activations again in backward, or keep them."""

    def compile_for(self, batch: Any, tokens: int) -> None:
        """Compile for batches of this kind, by a pass over about so many tokens."""

    def backward(self, batch: Any, n_total: int) -> float:
        """Add the gradients of a batch; returns its loss."""


class Rows(Protocol):
    """The rows of a run (`training/microbatches.py`)."""

    def size(self, tokens: int) -> int:
        """Tokens of the largest pass of at most so many."""

    def largest(self, tokens: int) -> Any:
        """That pass."""


class DryRun:
    """`budget.Bench` over a run's passes; a context manager that leaves no gradients behind."""

    def __init__(self, passes: Passes, micro: Rows, device: torch.device) -> None:
        self.passes, self.micro, self.device = passes, micro, device
        self._began = False

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.model.zero_grad(set_to_none=True)
        usage.settle(self.device)
        usage.reset_peak(self.device)

    def resident(self, setting: Setting) -> int:
        """Bytes in use between two passes."""
        self.passes.set_checkpointing(setting.gradient_checkpointing)
        if not self._began:
            self._backward(FIRST_TOKENS // 2)
            self._began = True
        usage.settle(self.device)
        return usage.used_bytes(self.device)

    def size(self, tokens: int) -> int:
        """Tokens of the largest pass of at most so many."""
        return self.micro.size(tokens) if tokens else 0

    def peak(self, tokens: int) -> int | None:
        """Highest bytes in use during that pass; None: memory ran out."""
        usage.settle(self.device)
        usage.reset_peak(self.device)
        try:
            self._backward(tokens)
        except (RuntimeError, MemoryError) as error:
            if not usage.is_exhausted(error):
                raise
            return None
        return usage.held_peak_bytes(self.device)

    def _backward(self, tokens: int) -> None:
        batch = self.micro.largest(tokens)
        if self.passes.compiled:
            self.passes.compile_for(batch, COMPILED_TOKENS)
        self.passes.backward(batch, max(1, batch.n_label_tokens))
