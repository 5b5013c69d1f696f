"""Find where a loss or a gradient became non-finite (NaN or inf).

The forward pass is repeated with the same seed and a hook on every module: the origin is the first module with finite inputs and
a non-finite output. If the whole forward pass is finite, the origin is in backward: gradients are non-finite from one layer down
to the first, so the last parameter (in model order) with a non-finite gradient is nearest to the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    if isinstance(value, dict):  # ModelOutput too
        return all(map(_finite, value.values()))
    return True


def origin(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Describe where values became non-finite. `forward` repeats the step's forward pass; its gradients must still be there."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach()):
            return f"parameter '{name}' is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not found and not _finite(output) and _finite(arguments) and _finite(keywords):
                found.append(f"module '{name}' ({type(module).__name__}) gives values that are not finite")

        return hook

    handles = [module.register_forward_hook(look(name), with_kwargs=True) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not _finite(loss):
        return "every layer is finite, the loss itself is not (the head or a label)"
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return f"the gradient of '{wrong[-1]}' is not finite" if wrong else "the gradients are finite, their norm is not"
