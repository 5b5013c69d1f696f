"""Create optimisers by name; count, allocate and release their states.

Weight decay skips vectors (norms, biases, DoRA's magnitudes), as usual. LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives the
matrices B, and vectors as PEFT does, a larger learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import increment_version

from lownibble.errors import ConfigError
from lownibble.optim.paged_adamw import SIZES, EightBit, Fused, PagedAdamW
from lownibble.optim.specs import Groups, Paging, check_paged, spec

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""QLoRA's and transformers' defaults."""

_FACTOR = "lr_factor"
"""Key in a parameter group: its learning rate as a multiple of the run's."""


def fused(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    return torch.optim.AdamW(groups, fused=True)


def paged(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """Paged AdamW: bit-identical to `fused`, with part of the states in memory."""
    return PagedAdamW(groups, Fused(), paging)


def eight_bit(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits."""
    return PagedAdamW(groups, EightBit(), None)


def paged_eight_bit(groups: Groups, paging: Paging) -> torch.optim.Optimizer:
    """Paged AdamW with both moments in 8 bits."""
    return PagedAdamW(groups, EightBit(), paging)


def make_optimizer(
    kind: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, *,
    page_budget: int | None = None, folder: Path | None = None, fast: Collection[nn.Parameter] = (), ratio: float = 1.0,
    sizes: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> torch.optim.Optimizer:  # fmt: skip
    """Create the optimiser named `kind` over the parameters that require a gradient.

    Args:
        page_budget: bytes of states that a paged optimiser keeps in memory; default: a tenth of them, at least 16 MiB.
        folder: where a paged optimiser on a CPU keeps the rest; default: the system's folder for temporary files.
        fast, ratio: for LoRA+: matrices that, as all vectors, learn at `ratio` times the rate.
        sizes: elements of the whole tensor, for parameters that are shards: small ones have no 8-bit moments.
    Raises:
        ConfigError: the budget is below one page, or was given for an optimiser that is not paged; or the optimiser, one from
            outside, does not keep groups of different rates apart.
    """
    check_paged(kind, page_budget)
    trained = [p for p in parameters if p.requires_grad]
    shared, chosen = {"betas": BETAS, "eps": EPSILON}, {id(p) for p in fast}
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (True, ratio): [], (False, ratio): []}
    for parameter in trained:
        matrix = parameter.ndim > 1
        kinds[matrix, ratio if id(parameter) in chosen or not matrix else 1.0].append(parameter)
    groups: Groups = [
        {"params": members, "weight_decay": weight_decay if matrix else 0.0, "lr": rate * factor, **shared}
        for (matrix, factor), members in kinds.items() if members
    ]  # fmt: skip
    if sizes:
        for group in groups:
            group[SIZES] = [sizes.get(parameter, parameter.numel()) for parameter in group["params"]]
    optimizer = spec(kind).make(groups, Paging(page_budget, folder))
    factors = {id(parameter): factor for (_, factor), members in kinds.items() for parameter in members}
    for group in optimizer.param_groups:
        group[_FACTOR], *others = {factors[id(parameter)] for parameter in group["params"]}
        if others:
            raise ConfigError(
                "The 'loraplus_lr_ratio' of TrainConfig needs an optimiser that keeps parameter groups apart. "
                f"Got optim='{kind}'. Leave it out, or use another optimiser."
            )
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Count the step as a change of each parameter, which torch's fused AdamW does not; merge-aware layers go by it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            increment_version(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, times its ratio of LoRA+."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_FACTOR, 1.0)


def step_if_finite(optimizer: torch.optim.Optimizer, values: torch.Tensor, *, on_device: bool) -> None:
    """Take a step if all `values` are finite.

    `on_device`: the optimiser decides that on the device, by torch's `found_inf`, so that the host need not wait for the values.
    """
    if on_device:
        optimizer.found_inf = values.isfinite().all().logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(values.isfinite().all()):
        optimizer.step()


class StateBytes(NamedTuple):
    """Bytes of an optimiser's states: in total, and resident in device memory now (whole pages)."""

    total: int
    resident: int


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Bytes of the optimiser's states now."""
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    if isinstance(optimizer, PagedAdamW):
        return StateBytes(held + optimizer.total_bytes, held + optimizer.resident_bytes)
    return StateBytes(held, held)


def planned_bytes(kind: str, optimizer: torch.optim.Optimizer) -> int:
    """Device memory in bytes of the optimiser's states once every parameter has taken a step; `kind` is its name."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.planned_bytes
    return sum(spec(kind).state_bytes(p.numel(), p.itemsize) for group in optimizer.param_groups for p in group["params"])


def open_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the missing states, so that a lack of disk space or memory shows before the first step, not during it.

    Raises:
        OutputError: the file of a paged optimiser cannot be created.
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.open()
        return
    if type(optimizer) is not torch.optim.AdamW or optimizer.defaults["amsgrad"]:
        return  # other optimisers' states are unknown before their first step
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def close_states(optimizer: torch.optim.Optimizer) -> None:
    """Release the pages of a paged or 8-bit optimiser, and their file."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.close()


def skipped(optimizer: torch.optim.Optimizer) -> None:
    """Count the last step as not taken, once it is known that `found_inf` was 1 in it; before the next step.

    The optimiser is one whose `OptimizerSpec.skips_on_device` is set. torch's own count on the device, without such steps.
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.take_back_step()
