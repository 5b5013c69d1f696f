"""The optimiser: torch's fused AdamW. Weight decay skips vectors (norms, biases), as is usual."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""QLoRA's and transformers' defaults."""


def _adamw(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS, eps=EPSILON, fused=True)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]] = {"adamw": _adamw}
"""`TrainConfig.optim` -> constructor (parameters, learning rate, weight decay)."""


def make_optimizer(kind: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser called `kind` over the parameters that want a gradient."""
    return OPTIMIZERS[kind]([p for p in parameters if p.requires_grad], rate, weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's states."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
