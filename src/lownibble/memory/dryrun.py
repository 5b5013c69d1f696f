"""The memory budget's dry run on the real model: the measurements that `budget.choose` uses.

Gradients stay allocated throughout, as in gradient accumulation; free memory is returned to the system before each microbatch, so
that its peak does not include what an earlier one left behind. Nothing is trained: the gradients are dropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lownibble.config import Checkpointing
from lownibble.memory import usage
from lownibble.memory.budget import FIRST_TOKENS, Setting

COMPILED_TOKENS = 256
"""Tokens of the microbatches used for compilation: enough for the compiler to parallelise over threads."""


class Passes(Protocol):
    """Forward and backward passes of a model (`training/passes.py`)."""

    model: Any
    compiled: bool

    def set_checkpointing(self, how: Checkpointing) -> None:
        """Turn gradient checkpointing on or off, or on with offloaded checkpoints."""

    def compile_for(self, batch: Any, tokens: int) -> None:
        """Compile for batches of this kind, with a microbatch of about `tokens` tokens."""

    def backward(self, batch: Any, n_total: int) -> torch.Tensor:
        """Accumulate the gradients of a batch; returns its loss."""


class Rows(Protocol):
    """The rows of a run (`training/microbatches.py`)."""

    def size(self, tokens: int) -> int:
        """Tokens of the largest microbatch of at most `tokens` tokens."""

    def largest(self, tokens: int) -> Any:
        """Return the largest microbatch of at most `tokens` tokens."""


class DryRun:
    """`budget.Bench` over a run's passes; a context manager that leaves no gradients behind.

    Args:
        most: the largest of a number over the ranks of the run, which choose alike.
        may_fail: a microbatch may run out of memory; else that is an error.
    """

    def __init__(
        self, passes: Passes, micro: Rows, device: torch.device, most: Callable[[int], int] = int, *, may_fail: bool = True
    ) -> None:
        self.passes, self.micro, self.device, self._most, self._may_fail = passes, micro, device, most, may_fail
        self._began = False

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.model.zero_grad(set_to_none=True)
        usage.settle(self.device)
        usage.reset_peak(self.device)

    def resident(self, setting: Setting) -> int:
        """Bytes in use between two microbatches; allocates the gradients on the first call."""
        self.passes.set_checkpointing(setting.gradient_checkpointing)
        if not self._began:
            self._backward(FIRST_TOKENS // 2)
            self._began = True
        usage.settle(self.device)
        return self._most(usage.used_bytes(self.device))

    def size(self, tokens: int) -> int:
        """Tokens of the largest microbatch of at most `tokens` tokens."""
        return self.micro.size(tokens) if tokens else 0

    def peak(self, tokens: int) -> int | None:
        """Peak bytes held during that microbatch (CUDA: reserved); None: out of memory."""
        usage.settle(self.device)
        usage.reset_peak(self.device)
        exhausted = False
        try:
            self._backward(tokens)
        except (RuntimeError, MemoryError) as error:
            if not (self._may_fail and usage.is_exhausted(error)):
                raise
            exhausted = True
        if self._most(exhausted):
            return None
        return self._most(usage.held_peak_bytes(self.device))

    def _backward(self, tokens: int) -> None:
        batch = self.micro.largest(tokens)
        if self.passes.compiled:
            self.passes.compile_for(batch, COMPILED_TOKENS)
        self.passes.backward(batch, max(1, batch.n_label_tokens))
