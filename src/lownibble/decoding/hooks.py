"""Hooks that add low-rank branches to what a model's own modules return, for tokens of different adapters.

They are registered once and stay for the model's lifetime, since whoever keeps graphs of a model's steps looks at its hooks: they
do nothing but in a step with adapters. All decoders of a model share them, and what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lownibble.decoding.mixture import Tokens
from lownibble.models import experts
from lownibble.quant.experts import Ends, QuantExperts


class _Hooked(NamedTuple):
    """Modules that have hooks, and what those read."""

    modules: list[nn.Module]
    tokens: Tokens


_HOOKED: WeakKeyDictionary[Any, _Hooked] = WeakKeyDictionary()
"""Model -> its hooks, which must not refer to the model."""


def hooked(model: Any, modules: list[nn.Module]) -> Tokens:
    """What the hooks of these modules read; registers them if they are not there, as after a change of the modules."""
    there = _HOOKED.get(model)
    if there is not None and len(there.modules) == len(modules) and all(map(is_, there.modules, modules)):
        return there.tokens
    tokens = Tokens()
    _HOOKED[model] = _Hooked(modules, tokens)

    def sort(container: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tokens.branches:
            tokens.sort(args[1] if len(args) > 1 else kwargs["top_k_index"], container.num_experts)

    for index, module in enumerate(modules):
        hook: Callable[..., Any] = _add_of_experts if isinstance(module, QuantExperts) else _add
        module.register_forward_hook(partial(hook, tokens, index))
    for _, container in experts.containers(model):
        container.register_forward_pre_hook(sort, with_kwargs=True)
    return tokens


def _add(tokens: Tokens, index: int, module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    if tokens.rows is not None:
        tokens.add_rows(index, args[0], y)
    return tokens.add(index, module.bias, args[0], y) if tokens.branches else y


def _add_of_experts(tokens: Tokens, index: int, module: Any, args: tuple[Tensor, Ends], y_SN: Tensor) -> Tensor:
    return tokens.add_of_experts(index, args[0], y_SN) if tokens.branches else y_SN
