"""Mixed precision: a codec for each layer, so that the loss rises least at a given size.

To second order, rounding errors E of a layer's weight raise the loss by half the mean of (g^T E x)^2, x being the layer's inputs
and g the gradients of the loss by its outputs. Inputs and gradients taken as independent (K-FAC's assumption), that is half of

    sum over outputs i of  E[g_i^2] (E R E^T)_ii        R = E[x x^T]

which needs a vector and a matrix per layer, both measured on calibration rows. Which codec each layer gets is then a choice of
one column per layer with the least sum under a limit of bytes: a small integer program, solved exactly by scipy's `milp` (HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from lownibble.calibration.layers import TOKENS_AT_ONCE
from lownibble.calibration.moments import Moments
from lownibble.errors import ConfigError
from lownibble.models.head import Head, hidden_states
from lownibble.quant import PackedWeight, exact_products

FAMILIES = (("nf2", "nf3", "nf4", "int8"), ("int2", "int3", "int4", "int8"))
"""Codecs that are mixed: those of the family that the quant_type belongs to."""


def candidates(quant_type: str) -> tuple[str, ...]:
    """The codecs that may be mixed with a `quant_type`.

    Raises:
        ConfigError: it belongs to no family.
    """
    found = next((family for family in FAMILIES if quant_type in family), None)
    if found is None:
        known = " or ".join(", ".join(family) for family in FAMILIES)
        raise ConfigError(f"'bits' mixes codecs of one family: {known}. Got quant_type '{quant_type}'. Choose one of those.")
    return found


def gradient_squares(model: Any, rows_BT: Tensor, paths: list[str]) -> dict[str, Tensor]:
    """Path -> mean square of the loss's gradient by each output of the layer, (out,) float32, over all tokens.

    The loss is the sum of the next tokens' cross-entropies. The model needs memory for its weights, and for the activations of a
    few rows; no weight gets a gradient.
    """
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def of_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                squares = gradient.float().flatten(0, -2).square().sum(0)
                found[path] = found[path] + squares if path in found else squares

            output.register_hook(add)

        return of_output

    rows_BT = rows_BT.to(model.get_input_embeddings().weight.device)
    few = max(1, TOKENS_AT_ONCE // rows_BT.shape[1])
    with _frozen(model), exact_products(model):
        handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
        handles.append(model.get_input_embeddings().register_forward_hook(lambda *args: args[2].detach().requires_grad_()))
        head = Head(model)
        try:
            for rows in rows_BT.split(few):
                hidden = hidden_states(model, rows, None)[:, :-1].flatten(0, 1)
                loss = nn.functional.cross_entropy(head(hidden).float(), rows[:, 1:].flatten(), reduction="sum")
                torch.autograd.backward(loss)
        finally:
            for handle in handles:
                handle.remove()
    return {path: squares / rows_BT.numel() for path, squares in found.items()}


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Without gradients of parameters, in evaluation mode."""
    training, wanted = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def loss_increase(weight: Tensor, packed: PackedWeight, moments: Moments, squares: Tensor) -> float:
    """About how much packing raises the loss of a token, by the formula above.

    Args:
        weight: (out, in) float32. squares: (out,) of `gradient_squares`.
    """
    off = weight - packed.dequantize(torch.float32)
    return float(0.5 * (((off @ moments.matrix) * off).sum(1) * squares).sum())


def check_budget(sizes: Mapping[str, Mapping[str, int]], budget: float) -> None:
    """Check that some choice fits.

    Raises:
        ConfigError: the smallest choice is larger than the budget.
    """
    least = sum(min(of.values()) for of in sizes.values())
    if least > budget:
        raise ConfigError(f"No choice of codecs is that small: the smallest takes {least / budget:.2f} x as much. Raise 'bits'.")


def choose(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: float) -> dict[str, str]:
    """Path -> codec with the least sum of costs whose sizes are at most `budget` in all.

    Args:
        costs, sizes: path -> codec -> its cost, its bytes.
    Raises:
        ConfigError: as `check_budget`.
    """
    check_budget(sizes, budget)
    columns = [(path, codec) for path, of in costs.items() for codec in of]
    cost = np.array([costs[path][codec] for path, codec in columns])
    size = np.array([sizes[path][codec] for path, codec in columns], dtype=float)
    rows = {path: row for row, path in enumerate(costs)}
    one = np.zeros((len(rows), len(columns)))
    one[[rows[path] for path, _ in columns], range(len(columns))] = 1
    found = milp(
        cost / max(cost.max(), 1e-300),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1)],
        integrality=np.ones(len(columns)), bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-6},
    )  # fmt: skip
    assert found.success, found.message  # the smallest choice fits
    return dict(columns[i] for i in np.flatnonzero(found.x > 0.5))
