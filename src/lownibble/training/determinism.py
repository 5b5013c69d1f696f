"""Deterministic training on CUDA, for `--deterministic`.

Lownibble's kernels and the library's matrix products give the same bits each time they run on the same device, because they add
in a fixed order. What does not, by torch's default, is the backward pass of attention, whose kernels add gradients of the
queries in the order in which they finish, and the gradient of a trained embedding. torch has deterministic versions of both,
which are slower; an operation that has none raises an error with its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lownibble.errors import ConfigError

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""Environment variable, and its values with which cuBLAS is deterministic: torch refuses products without one."""


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside the block torch takes deterministic algorithms only.

    Raises:
        ConfigError: cuBLAS is configured not to be deterministic.
    """
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise ConfigError(
            f"deterministic=True cannot be done with {WORKSPACE}={given}. Set it to {' or '.join(WORKSPACES)}, or leave it out."
        )
    memory: Any = torch.utils.deterministic  # its switch is a property of the module
    filling = memory.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # costs a write of each tensor, and finds no fault of ours
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filling
