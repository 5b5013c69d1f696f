"""Optimisers as the training loop uses them: made by name, their states counted, opened and closed.

Weight decay skips vectors (norms, biases), as is usual.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lownibble.errors import ConfigError
from lownibble.optim.paged_adamw import EightBit, Fused, PagedAdamW
from lownibble.optim.specs import Groups, Paging, is_paged, paged_name, spec

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""QLoRA's and transformers' defaults."""


def fused(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    return torch.optim.AdamW(groups, fused=True)


def paged(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """The same bits; states in pages of which a part is in memory."""
    return PagedAdamW(groups, Fused(), paging)


def eight_bit(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """Both moments in 8 bits."""
    return PagedAdamW(groups, EightBit(), None)


def paged_eight_bit(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """Both."""
    return PagedAdamW(groups, EightBit(), paging)


def make_optimizer(
    kind: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, *,
    page_budget: int | None = None, folder: Path | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimiser called `kind` over the parameters that want a gradient.

    Args:
        page_budget: bytes of states that a paged optimiser keeps in memory; default: a tenth of them, at least 16 MiB.
        folder: where a paged optimiser on a CPU keeps the others; default: the system's folder for temporary files.
    Raises:
        ConfigError: the budget is below one page, or there are no pages.
    """
    if page_budget is not None and not is_paged(kind):
        instead = f"Set optim='{paged_name(kind)}' (--optim), or leave the budget out." if paged_name(kind) else "Leave it out."
        raise ConfigError(f"The 'optim_page_budget' of TrainConfig is for paged optimisers. Got optim='{kind}'. {instead}")
    trained = [p for p in parameters if p.requires_grad]
    shared = {"lr": rate, "betas": BETAS, "eps": EPSILON}
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, **shared},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, **shared},
    ]
    return spec(kind).make([g for g in groups if g["params"]], Paging(page_budget, folder))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class StateBytes(NamedTuple):
    """Bytes of an optimiser's states: all of them, and what they take of the device's memory now (whole pages)."""

    total: int
    resident: int


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Bytes of the optimiser's states."""
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    if isinstance(optimizer, PagedAdamW):
        return StateBytes(held + optimizer.total_bytes, held + optimizer.resident_bytes)
    return StateBytes(held, held)


def planned_bytes(kind: str, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the device's memory that the states of the optimiser called `kind` will take once every parameter has taken a
    step."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.planned_bytes
    return sum(spec(kind).state_bytes(p.numel(), p.itemsize) for group in optimizer.param_groups for p in group["params"])


def open_states(optimizer: torch.optim.Optimizer) -> None:
    """Make room for the states that are not there yet, so that a folder or a memory that cannot hold them is known before the
    first step, and not when a part of the parameters has taken it.

    Raises:
        OutputError: the file of a paged optimiser cannot be made.
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.open()
        return
    if not isinstance(optimizer, torch.optim.AdamW):
        return  # of another optimiser the states are not known before its first step
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def close_states(optimizer: torch.optim.Optimizer) -> None:
    """Drop the states that are held outside torch's tensors, and their file."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.close()
