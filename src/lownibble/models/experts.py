"""Mixtures of experts: which modules hold the experts' weights, and the pass through them.

transformers marks a module of fused experts by what its decorator `use_experts_implementation` sets (whether weights are turned,
whether there is a gate, a bias, a norm), and lets others register an implementation for all of them (`ALL_EXPERTS_FUNCTIONS`). So
a container is known by what it is, no list of models is kept, and gates, clamps and norms stay the model's own code. Mixtures
whose experts are modules of their own (a list of MLPs) need none of this: their layers are linear layers like others.

Weights of three dimensions that no such module holds (Llama 4's, JetMoE's) are read by the model's own code; they stay dense,
which is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.models.expert_pass import expert_pass, normalises, sides_of
from lownibble.quant.experts import DenseExperts, Ends, dense_product

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of a container's weights, in the order in which it has them."""

IMPLEMENTATION = "lownibble"
"""Our name among transformers' implementations of the experts' pass."""

_MARKS = ("is_transposed", "has_gate", "has_bias", "_apply_gate")


def is_container(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts of a mixture, with an implementation that others may replace."""
    return all(hasattr(module, mark) for mark in _MARKS) and any(hasattr(module, name) for name in WEIGHTS)


def containers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of every container of experts."""
    return ((path, module) for path, module in model.named_modules() if is_container(module))


def expert_weights(model: nn.Module) -> dict[str, Any]:
    """Path -> the dense parameter, or the module that holds it, of the weights of every mixture's experts, in the order in which
    PEFT goes through them."""
    return {
        f"{path}.{name}": getattr(container, name)
        for path, container in containers(model) for name in WEIGHTS if hasattr(container, name)
    }  # fmt: skip


def shapes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Path -> (E, out, in) of the weights of every mixture's experts, dense or held by modules."""
    return {
        f"{path}.{name}": shape_of(container, name)
        for path, container in containers(model) for name in WEIGHTS if hasattr(container, name)
    }  # fmt: skip


def tell_unknown(model: nn.Module) -> None:
    """Warn of weights of three dimensions that stay dense, because the model's own code computes with them.

    Warns:
        UserWarning: there are some (named, with their share of the model).
    """
    unknown, parameters = of_other_form(model), dict(model.named_parameters())
    if unknown:
        share = sum(parameters[name].numel() for name in unknown) / sum(p.numel() for p in parameters.values())
        names = ", ".join(sorted({name.rpartition(".")[2] for name in unknown}))
        warnings.warn(
            f"{len(unknown)} weights of {type(model).__name__} ({names}; {share:.0%} of the model) stay dense: its code computes "
            "with the weights of all experts itself.",
            stacklevel=3,
        )


def of_other_form(model: nn.Module) -> list[str]:
    """Names of dense weights of three dimensions, one matrix for each expert, that no container holds."""
    held, counts = tuple(f"{path}." for path in shapes(model)), _numbers_of_experts(model)
    found = [name for name, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point() and len(p) in counts]
    return [name for name in found if not f"{name}.".startswith(held)]


def number_in(config: Any) -> int:
    """The number of experts that a configuration names, or 0."""
    found = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return next((count for count in found if isinstance(count, int)), 0)


def _numbers_of_experts(model: Any) -> set[int]:
    """What the configurations of a model's parts call numbers of experts."""
    return {count for part in model.modules() if hasattr(part, "config") and (count := number_in(part.config)) > 1}


def shape_of(container: Any, name: str) -> tuple[int, int, int]:
    """(E, out, in) of a container's weight."""
    held: Any = getattr(container, name)
    is_module = isinstance(held, nn.Module)
    n_experts, rows, columns = (held.weight if is_module else held).shape
    turned = container.is_transposed and not is_module
    return (n_experts, columns, rows) if turned else (n_experts, rows, columns)


def place(container: Any, name: str, module: nn.Module) -> None:
    """Put a module in the place of a weight, dense or already a module; of `DenseExperts`, its parameter."""
    known = vars(container).setdefault(_BEFORE, (container.config._experts_implementation, list(container._parameters)))
    container._parameters.pop(name, None)
    container._modules.pop(name, None)
    if isinstance(module, DenseExperts):
        container.register_parameter(name, module.parameter)
        _, order = known  # PEFT goes by it
        container._parameters = {each: container._parameters[each] for each in order if each in container._parameters}
    else:
        container.add_module(name, module)
        if _check_implementation not in container._forward_pre_hooks.values():
            container.register_forward_pre_hook(_check_implementation)
    container.config._experts_implementation = IMPLEMENTATION


def _check_implementation(container: Any, _: Any) -> None:
    """Before the pass through a container: raise ModelError if it is not ours, and weights are modules."""
    chosen = container.config._experts_implementation
    if chosen != IMPLEMENTATION and any(name in container._modules for name in WEIGHTS):
        raise ModelError(
            f"The model's experts were set to the implementation '{chosen}', which knows no packed or adapted weights. Call "
            f"model.set_experts_implementation('{IMPLEMENTATION}')."
        )


_BEFORE = "_lownibble_before"
"""Attribute of a container that has held modules: the implementation and the order of parameters that it had."""


def restore_implementation(model: nn.Module) -> None:
    """Give a model all of whose experts are dense parameters again the implementation that it had."""
    if all(isinstance(held, nn.Parameter) for held in expert_weights(model).values()):
        for _, container in containers(model):
            before, _ = vars(container).pop(_BEFORE, (IMPLEMENTATION, []))
            if before != IMPLEMENTATION:  # the first container's; others share its configuration
                container.config._experts_implementation = before


def goes_by_expert(model: nn.Module) -> bool:
    """Whether a mixture's experts run our pass, as some are packed or adapted."""
    return any(container.config._experts_implementation == IMPLEMENTATION for _, container in containers(model))


def _product(container: Any, name: str, x_SK: Tensor, ends: Ends) -> Tensor:
    held = getattr(container, name)
    if isinstance(held, nn.Module):
        y: Tensor = held(x_SK, ends)
        return y
    return dense_product(x_SK, held.transpose(1, 2) if container.is_transposed else held, ends)


def experts_forward(container: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The pass through a container: (T, K) -> (T, K), as transformers' `grouped_mm_experts_forward`.

    Args:
        container: the module that holds the weights.
        hidden_states: (T, K). top_k_index, top_k_weights: (T, k) the experts of each token and their shares.
    """
    k, (T, K) = top_k_index.shape[-1], hidden_states.shape
    expert_of_row, order_S = top_k_index.reshape(-1).sort(stable=True)
    ends = Ends.of(expert_of_row, container.num_experts)
    if torch.is_grad_enabled() and not ops.current(hidden_states.device).experts_at_once:
        held = [getattr(container, name) for name in WEIGHTS if hasattr(container, name)]
        if sides := sides_of(container, held):
            return expert_pass(hidden_states, top_k_weights.reshape(-1)[order_S], order_S // k, ends, sides)

    def project(name: str, x_SK: Tensor) -> Tensor:
        y_SN = _product(container, name, x_SK, ends)
        return y_SN + getattr(container, f"{name}_bias")[expert_of_row] if container.has_bias else y_SN

    x_SF = project("gate_up_proj" if container.has_gate else "up_proj", hidden_states[order_S // k])
    x_SF = container._apply_gate(x_SF) if container.has_gate else container.act_fn(x_SF)
    y_SK = project("down_proj", x_SF)
    if normalises(container):
        y_SK = container.post_expert_norm(y_SK)
    y_SK = y_SK * top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
    sorted_place = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return y_SK[sorted_place].view(T, k, K).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
