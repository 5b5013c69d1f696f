"""Iterate over an optimiser's states part by part, for checkpoints: the same content whether they are paged or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lownibble.errors import OutputError
from lownibble.optim.eight_bit import BLOCK
from lownibble.optim.paged_adamw import PagedAdamW

Shape = tuple[torch.dtype, tuple[int, ...]]


def elements_per_value(key: str) -> int:
    """Elements of a parameter that share a value of the state `key`."""
    return BLOCK if key.endswith("_absmax") else 1


def shapes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Shape]:
    """Dtype and shape of each state of a parameter; empty before its first step."""
    state = optimizer.state.get(parameter)
    if not state:
        return {}
    paged = optimizer.shapes(parameter) if isinstance(optimizer, PagedAdamW) else {}
    return {**{key: (value.dtype, tuple(value.shape)) for key, value in state.items()}, **paged}


def parts(optimizer: torch.optim.Optimizer, *, change: bool = False) -> Iterator[tuple[Tensor, str, int, Tensor]]:
    """Yield (parameter, state name, offset, flat values) of all states; the values are valid until the next item.

    change: whether the caller writes into them.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield parameter, key, 0, value.view(-1)
    if isinstance(optimizer, PagedAdamW):
        yield from optimizer.parts(change=change)


def allocate(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, wanted: dict[str, Shape]) -> None:
    """Allocate a parameter's states in a new optimiser, to be filled through `parts`.

    Raises:
        OutputError: this optimiser has other states.
    """
    if not isinstance(optimizer, PagedAdamW):
        optimizer.state[parameter] = {
            key: torch.empty(shape, dtype=dtype, device=parameter.device) for key, (dtype, shape) in wanted.items()
        }  # fmt: skip
        return
    optimizer.begin(parameter)
    if shapes(optimizer, parameter) != wanted:
        raise OutputError(
            f"The checkpoint's optimiser states are {sorted(wanted)}, this optimiser's {sorted(shapes(optimizer, parameter))}, "
            "or their types differ. Resume with the same --optim."
        )
