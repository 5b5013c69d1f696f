"""Other forward functions for modules of a model, installed for a block and removed after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Inside the block each module runs the forward function that it is paired with."""
    pairs = list(forwards)
    before = [vars(module).get("forward") for module, _ in pairs]  # such as accelerate's hooks
    for module, forward in pairs:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), own in zip(pairs, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own
