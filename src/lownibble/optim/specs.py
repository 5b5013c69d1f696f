"""The optimisers: how each is made, what states it keeps, and whether those can be paged. No torch: the planner asks too.

    adamw              torch's fused AdamW
    paged_adamw        the same bits; states in pages of which a part is in memory   (transformers: paged_adamw_32bit)
    adamw_8bit         both moments in 8 bits                                        (transformers: adamw_8bit, adamw_bnb_8bit)
    paged_adamw_8bit   both                                                          (transformers: paged_adamw_8bit)

One from outside is an `OptimizerSpec` in `registry.OPTIMIZERS`: a torch optimiser whose states are tensors is checkpointed,
resumed and counted like these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lownibble.registry import OPTIMIZERS

if TYPE_CHECKING:
    import torch

PAGE_BYTES = 1 << 20
"""Size of a page of states: small enough that one just read is still in the second-level cache when it is used, large enough that
Python's part in moving it does not show. A power of two, as the allocator of pinned memory would make it anyway."""

SMALLEST_PAGED, SHARE_PAGED = 16 << 20, 10
"""What a paged optimiser keeps in memory where nothing else is said: at least so many bytes, or one part in so many of its
states."""

SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""Elements from which a parameter's moments are in 8 bits, and how many of them share a constant."""

FLOAT32 = 4

Groups = list[dict[str, Any]]
"""Parameter groups, each with 'params', 'lr', 'betas', 'eps' and 'weight_decay'."""


@dataclass(frozen=True)
class Paging:
    """How much of the states may be resident (None: a tenth, at least 16 MiB), and the folder of the file with the rest."""

    budget_bytes: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser.

    Attributes:
        build: (groups, paging) -> the optimiser, or 'module:function' that is imported when one is made.
        state_bytes: (elements, bytes of one) of a parameter -> bytes of its states.
        plain, paged: names of the one with the same states that does not page, and that does; None: there is none.
    """

    build: Callable[[Groups, Paging], torch.optim.Optimizer] | str
    state_bytes: Callable[[int, int], int]
    plain: str | None = None
    paged: str | None = None

    def make(self, groups: Groups, paging: Paging) -> torch.optim.Optimizer:
        """The optimiser over these groups."""
        if not isinstance(self.build, str):
            return self.build(groups, paging)
        module, _, function = self.build.partition(":")
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), function)(groups, paging)
        return made


def spec(name: str) -> OptimizerSpec:
    """The optimiser called so."""
    found: OptimizerSpec = OPTIMIZERS[name]
    return found


def plain_name(name: str) -> str:
    """The optimiser with the same states that does not page."""
    return spec(name).plain or name


def paged_name(name: str) -> str | None:
    """The optimiser with the same states that pages, or None."""
    return spec(name).paged


def is_paged(name: str) -> bool:
    """Whether the optimiser pages its states."""
    return spec(name).paged == name


def both_moments(n: int, itemsize: int) -> int:
    """Two tensors of the parameter's size and type."""
    return 2 * n * itemsize


def both_moments_8bit(n: int, itemsize: int) -> int:
    """Two codes an element and a constant a block; small parameters have their moments in float32."""
    return 2 * n * FLOAT32 if n < SMALLEST_8BIT else 2 * n + 2 * FLOAT32 * -(-n // BLOCK_8BIT)


ADAMW = OptimizerSpec("lownibble.optim.adamw:fused", both_moments, "adamw", "paged_adamw")
PAGED_ADAMW = OptimizerSpec("lownibble.optim.adamw:paged", both_moments, "adamw", "paged_adamw")
ADAMW_8BIT = OptimizerSpec("lownibble.optim.adamw:eight_bit", both_moments_8bit, "adamw_8bit", "paged_adamw_8bit")
PAGED_ADAMW_8BIT = OptimizerSpec("lownibble.optim.adamw:paged_eight_bit", both_moments_8bit, "adamw_8bit", "paged_adamw_8bit")
