"""Mixed precision: a codec for each layer, so that the loss rises least at a given size.

To second order, rounding errors E of a layer's weight raise a token's loss by half the mean of (g^T E x)^2 over tokens: x are
the layer's inputs, g the gradients of the loss by its outputs, and the Fisher information stands for the Hessian. Both are kept
for some tokens of the calibration rows. Which codec each layer gets is then a choice of one column per layer with the least sum
under a limit of bytes: a small integer program, solved exactly by scipy's `milp` (HiGHS).

The largest hundredth of the tokens' terms is left out: single tokens (the first of a row, whose hidden states are hundreds of
times larger) count for most of the mean in some layers, and the loss does not follow them. Rejected: g and x taken as independent
(K-FAC's assumption), which needs no tokens, but overrates the layers of attention's values up to fifteen times (`docs/log.md`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from lownibble.calibration.layers import TOKENS_AT_ONCE
from lownibble.errors import ConfigError
from lownibble.models.head import Head, hidden_states
from lownibble.quant import PackedWeight, exact_products

FAMILIES = (("nf2", "nf3", "nf4", "int8"), ("int2", "int3", "int4", "int8"))
"""Codecs that are mixed: those of the family that the quant_type belongs to."""

SAMPLE_BYTES = 1 << 30
"""Of inputs and gradients that are kept, on the CPU: 880 tokens of a 135M Llama, 200 of an 8B one in 16 bits."""

TRIMMED = 0.01
"""Share of the tokens, those with the largest terms, that are left out."""


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


class Tokens(NamedTuple):
    """What a layer saw and what the loss asked of it: inputs (n, in) and gradients by its outputs (n, out), on the CPU.

    share: of a token in the mean over all tokens.
    """

    inputs: Tensor
    gradients: Tensor
    share: float


def sample_tokens(model: Any, rows_BT: Tensor, paths: list[str]) -> dict[str, Tokens]:
    """Path -> the layer's inputs and gradients for evenly spaced tokens, as many as take `SAMPLE_BYTES` in all layers.

    The loss is the sum of the next tokens' cross-entropies. The model needs memory for its weights, and for the activations of a
    few rows; no weight gets a gradient.
    """
    embeddings = model.get_input_embeddings().weight
    widths = sum(sum(model.get_submodule(path).weight.shape) for path in paths)
    stride = max(1, math.ceil(rows_BT.numel() * widths * embeddings.itemsize / SAMPLE_BYTES))
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    gradients: dict[str, list[Tensor]] = {path: [] for path in paths}

    def some(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten(0, -2)[::stride].to("cpu", copy=True)

    def hook(path: str) -> Any:
        def of_output(module: nn.Module, args: Any, output: Tensor) -> None:
            x = some(args[0])

            def add(gradient: Tensor) -> None:  # not called where the output is not used
                inputs[path].append(x)
                gradients[path].append(some(gradient))

            output.register_hook(add)

        return of_output

    rows_BT = rows_BT.to(embeddings.device)
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
    share = stride / rows_BT.numel()
    return {path: Tokens(torch.cat(inputs[path]), torch.cat(gradients[path]), share) for path in paths if inputs[path]}


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


def loss_increase(weight: Tensor, packed: PackedWeight, tokens: Tokens) -> float:
    """About how much packing raises the loss of a token, by the formula above. `weight`: (out, in) float32."""
    off = weight - packed.dequantize(torch.float32)
    inputs, gradients = (each.to(off.device, torch.float32) for each in tokens[:2])
    terms = ((inputs @ off.t()) * gradients).sum(1).square().sort().values
    return 0.5 * tokens.share * float(terms[: len(terms) - int(TRIMMED * len(terms))].sum())


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
